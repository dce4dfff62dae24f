"""What UNets have in common: they are sampled by DDIM."""

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.denoisers import ModelFiles
from pipelines.denoisers.family import Family, checked
from pipelines.denoisers.schedulers import CLASSES, DdimConfig
from policies.diffusion.ddim import (
    DenoisingSchedule,
    consistency_deviation,
    ddim_deviation,
    tcd_deviation,
)
from policies.diffusion.schedule import Schedule
from policies.rl.settings import SamplingSettings


def denoising_schedule(scheduler: Any, sampling: SamplingSettings, stepper: Any = None) -> DenoisingSchedule:
    """The tables of a diffusers scheduler for a method's ``sampling.steps``, by the scheduler's own arithmetic.
    Those of DDIM are set in the ``stepper``, by default the same. Raises ValueError where there are none."""
    config = DdimConfig.of(scheduler)
    method = sampling.method or config.own
    steps = config.steps(sampling)
    timesteps, previous = torch.tensor(steps.timesteps), torch.tensor(steps.previous)
    if method == "ddim":
        scheduler = stepper or scheduler
        scheduler.set_timesteps(sampling.grid)
        scheduler.timesteps = timesteps
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    least = 0 if config.rescale_betas_zero_snr else 1e-30
    if len(alphas) != config.num_train_timesteps or not (
        alphas[0] < 1 and alphas[-1] >= least and (alphas.diff() < 0).all()
    ):
        raise ValueError(
            "scheduler: its betas do not lead from less to more noise in as many steps as num_train_timesteps: check "
            "beta_start, beta_end, beta_schedule and trained_betas"
        )
    final = torch.ones_like(alphas[0])
    if method == "ddim":
        final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
    alpha, alpha_previous = alphas[timesteps], torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    if method == "ddim":
        deviation = ddim_deviation(alpha, alpha_previous, sampling.noise)
    elif method == "consistency":
        deviation = consistency_deviation(alpha_previous)
    else:
        deviation = tcd_deviation(alpha_previous, alphas[torch.floor((1 - sampling.noise) * previous).long()])
    within = torch.tensor([step in sampling.noisy for step in range(len(timesteps))])
    deviation = deviation.where(within, 0.0)
    clip = config.clip_sample_range if config.clip_sample and method != "tcd" else math.inf
    tables = timesteps, alpha, alpha_previous, deviation
    stock = method == "ddim" and isinstance(sampling.steps, int)  # all as long as the scheduler thinks
    schedule = DenoisingSchedule(*tables, config.prediction_type, clip, stock)
    return checked(schedule, steps)


class DdimFamily(Family):
    """UNets that predict ε, v or x_0."""

    def __init__(self, pipeline: Any, files: ModelFiles) -> None:
        super().__init__(pipeline, files)
        self._ddim: Any = None
        # (steps, step, η) → the timestep of the scheduler's own step; None where that step gives nan.
        self._stock_times: dict[tuple[int, int, float], int | None] = {}

    @staticmethod
    def scheduler(config: Any) -> Any:
        """DDIM, or what a model was distilled for."""
        import diffusers

        return getattr(diffusers, CLASSES[config.own])(**config.arguments(config.own))

    @property
    def stepper(self) -> Any:
        """What makes DDIM's steps: the pipeline's scheduler, or one of the same fields."""
        if type(self.pipeline.scheduler).__name__ == CLASSES["ddim"]:
            return self.pipeline.scheduler
        if self._ddim is None:
            from diffusers import DDIMScheduler

            self._ddim = DDIMScheduler(**DdimConfig.of(self.pipeline.scheduler).arguments("ddim"))
        return self._ddim

    def schedule(self, sampling: SamplingSettings) -> DenoisingSchedule:
        """The tables of the pipeline's scheduler."""
        return denoising_schedule(self.pipeline.scheduler, sampling, self.stepper)

    def step(self, schedule: Schedule, step: int, latents: Tensor, output: Tensor, noise: Tensor, eta: float) -> Tensor:
        """Of DDIM the scheduler's own step, so that the stock pipeline draws the very same images."""
        if not (isinstance(schedule, DenoisingSchedule) and schedule.stock):
            return super().step(schedule, step, latents, output, noise, eta)
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
        return self.stepper.step(output, timestep, latents, eta=eta, variance_noise=noise, return_dict=False)[0]
