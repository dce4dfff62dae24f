"""What UNets have in common: they are sampled by DDIM."""

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.denoisers import ModelFiles
from pipelines.denoisers.family import Family, checked
from pipelines.denoisers.schedulers import DdimConfig
from policies.diffusion.ddim import DenoisingSchedule
from policies.diffusion.schedule import Schedule
from policies.rl.settings import SamplingSettings


def denoising_schedule(scheduler: Any, sampling: SamplingSettings) -> DenoisingSchedule:
    """The tables of a diffusers ``DDIMScheduler`` for ``sampling.steps`` steps, which are set, by the scheduler's own
    arithmetic. Raises ValueError where there are none."""
    config = DdimConfig.model_validate({name: scheduler.config[name] for name in DdimConfig.model_fields})
    steps = config.steps(sampling.steps)
    scheduler.set_timesteps(sampling.steps)
    scheduler.timesteps = timesteps = torch.tensor(steps.timesteps)
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    least = 0 if config.rescale_betas_zero_snr else 1e-30
    if len(alphas) != config.num_train_timesteps or not (
        alphas[0] < 1 and alphas[-1] >= least and (alphas.diff() < 0).all()
    ):
        raise ValueError(
            "scheduler: its betas do not lead from less to more noise in as many steps as num_train_timesteps: check "
            "beta_start, beta_end, beta_schedule and trained_betas"
        )
    previous = torch.tensor(steps.previous)
    final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
    schedule = DenoisingSchedule(
        timesteps=timesteps,
        alpha=alphas[timesteps],
        alpha_previous=torch.where(previous >= 0, alphas[previous.clamp(min=0)], final),
        eta=sampling.eta,
        prediction_type=config.prediction_type,
        clip=config.clip_sample_range if config.clip_sample else math.inf,
    )
    return checked(schedule, steps)


class DdimFamily(Family):
    """UNets that predict ε, v or x_0."""

    def __init__(self, pipeline: Any, files: ModelFiles) -> None:
        super().__init__(pipeline, files)
        # (steps, step, η) → the timestep of the scheduler's own step; None where that step gives nan.
        self._stock_times: dict[tuple[int, int, float], int | None] = {}

    @staticmethod
    def scheduler(config: Any) -> Any:
        """DDIM."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(**config.model_dump())

    def schedule(self, sampling: SamplingSettings) -> DenoisingSchedule:
        """The tables of the pipeline's scheduler."""
        return denoising_schedule(self.pipeline.scheduler, sampling)

    def step(self, schedule: Schedule, step: int, latents: Tensor, output: Tensor, noise: Tensor, eta: float) -> Tensor:
        """The scheduler's own step, so that the stock pipeline draws the very same images."""
        key = (len(schedule.timesteps), step, eta)
        if key not in self._stock_times:  # looked up once: a GPU would have to be waited for
            timestep, nothing = int(schedule.timesteps[step]), torch.zeros(1, dtype=latents.dtype)
            # Its float32 1 − ᾱ − σ² can round below 0, and the root to nan.
            works = bool(torch.isfinite(self._stock_step(nothing, timestep, nothing, nothing, eta)))
            self._stock_times[key] = timestep if works else None
        known = self._stock_times[key]
        if known is None:
            return super().step(schedule, step, latents, output, noise, eta)
        return self._stock_step(output, known, latents, noise, eta)

    def _stock_step(self, output: Tensor, timestep: int, latents: Tensor, noise: Tensor, eta: float) -> Tensor:
        scheduler = self.pipeline.scheduler
        return scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise, return_dict=False)[0]
