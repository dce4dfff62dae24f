"""What UNets have in common: they are sampled by DDIM."""

from typing import Any

import torch
from torch import Tensor

from pipelines.denoisers.family import Family
from policies.denoising import DenoisingSchedule
from policies.schedule import Schedule
from policies.settings import SamplingSettings


def denoising_schedule(scheduler: Any, sampling: SamplingSettings) -> DenoisingSchedule:
    """The tables of a diffusers ``DDIMScheduler`` for ``sampling.steps`` steps, by the scheduler's own arithmetic."""
    scheduler.set_timesteps(sampling.steps)
    timesteps = scheduler.timesteps.to("cpu", torch.int64)
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    previous = timesteps - scheduler.config.num_train_timesteps // sampling.steps
    final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
    return DenoisingSchedule(
        timesteps=timesteps,
        alpha=alphas[timesteps],
        alpha_previous=torch.where(previous >= 0, alphas[previous.clamp(min=0)], final),
        eta=sampling.eta,
        prediction_type=scheduler.config.prediction_type,
    )


class DdimFamily(Family):
    """UNets that predict ε, v or x_0."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        # (steps, step, η) → the timestep of the scheduler's own step; None where that step gives nan.
        self._stock_times: dict[tuple[int, int, float], int | None] = {}

    @staticmethod
    def scheduler(config: Any) -> Any:
        """DDIM. Clipping and thresholding would change the mean of the step, and its log-probability would be wrong."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)

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
