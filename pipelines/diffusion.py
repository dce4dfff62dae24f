"""Stable Diffusion as a policy: images drawn with their trajectories, and the log-probability of stored transitions.

An image is a function of (weights, prompt, seed): each has its own CPU generator, read in the order in which a stock
``StableDiffusionPipeline(generator=[…], eta=…)`` reads it, so the stock pipeline draws the very same images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.locations import resolve_model
from pipelines.settings import ModelSettings
from pipelines.trajectory import Trajectory
from policies.denoising import DenoisingSchedule
from policies.settings import SamplingSettings


def load_pipeline(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The ``StableDiffusionPipeline`` of a directory or hub name, with a DDIM scheduler, without a safety checker.

    A safety checker would blacken images and so poison the reward. ``clip_sample`` and thresholding are switched off:
    they change the mean of the step and its log-probability would be wrong.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_model(path),
        torch_dtype=dtype,
        use_safetensors=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


class DiffusionPolicy:
    """A Stable Diffusion pipeline on one device, bound to its sampling settings."""

    def __init__(self, model: ModelSettings, sampling: SamplingSettings, device: str = "cpu") -> None:
        self.device = torch.device(device)
        # Kept here because diffusers' own property walks every module at every call.
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.pipeline = load_pipeline(model.path, self.dtype).to(self.device)
        self.sampling = sampling
        self.schedule = denoising_schedule(self.pipeline.scheduler, sampling).to(self.device)
        self._embeddings: dict[str, Tensor] = {}

    @property
    def unet(self) -> Any:
        """The trained network."""
        return self.pipeline.unet

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (prompts, tokens, width). Each is computed once, alone, so it never depends on a batch."""
        for prompt in prompts:
            if prompt not in self._embeddings:
                with torch.no_grad():
                    embedding, _ = self.pipeline.encode_prompt(prompt, self.device, 1, False)
                self._embeddings[prompt] = embedding[0].clone()
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The network's output (batch, channels, height, width), guided if ``guidance_scale`` > 1.

        The unconditional half (the empty prompt) rides in the same call, in sampling and in training alike.
        """
        inputs = latents.to(self.dtype)
        if self.sampling.guidance_scale == 1:
            return self.unet(inputs, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]
        empty = self.embed([""]).expand_as(embeddings)
        doubled, text = (inputs.repeat(2, 1, 1, 1), timesteps.repeat(2)), torch.cat([empty, embeddings])
        unconditional, conditional = self.unet(*doubled, encoder_hidden_states=text, return_dict=False)[0].chunk(2)
        return unconditional + self.sampling.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], weights_version: int = 0
    ) -> tuple[np.ndarray, Trajectory]:
        """One image for each (prompt, seed): images (batch, height, width, 3) uint8 and their trajectory."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        unet, scheduler = self.pipeline.unet, self.pipeline.scheduler
        scheduler.set_timesteps(self.sampling.steps)
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

        def noise() -> Tensor:
            drawn = torch.stack([torch.randn(shape, generator=generator, dtype=self.dtype) for generator in generators])
            return drawn.to(self.device)

        embeddings = self.embed(prompts)
        latents = noise() * scheduler.init_noise_sigma
        stochastic = set(self.schedule.stochastic_steps.tolist())
        path, log_probs = [latents], []
        for step, timestep in enumerate(self.schedule.timesteps.tolist()):
            times = torch.full((len(prompts),), timestep, device=self.device)
            output = self.predict(latents, times, embeddings)
            index, drawn = torch.full((len(prompts),), step, device=self.device), noise()
            following = scheduler.step(
                output, timestep, latents, eta=self.sampling.eta, variance_noise=drawn, return_dict=False
            )[0]
            if not torch.isfinite(following).all():  # its float32 1 − ᾱ − σ² can round below 0, and the root to nan
                mean = self.schedule.mean(latents, output, index)
                following = (mean + self.schedule.sigma[step] * drawn).to(self.dtype)
            if step in stochastic:
                log_probs.append(self.schedule.log_prob(latents, following, output, index))
            else:
                log_probs.append(torch.full((len(prompts),), torch.nan, dtype=torch.float64, device=self.device))
            latents = following
            path.append(latents)
        taken, densities = torch.stack(path, dim=1).float().cpu().numpy(), torch.stack(log_probs, dim=1).cpu().numpy()
        return self.decode(latents), Trajectory(list(prompts), list(seeds), taken, densities, weights_version)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (batch, channels, height, width) to images (batch, height, width, 3) uint8."""
        vae = self.pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        images = self.pipeline.image_processor.postprocess(pixels, output_type="np")
        return (images * 255).round().astype(np.uint8)
