"""What the loops ask of a family of diffusion models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from policies.schedule import Schedule
from policies.settings import SamplingSettings

Conditions = dict[str, Tensor]  # what the network is told of each prompt: name → (prompts, …)


class Family(ABC):
    """A stock diffusers pipeline, and how its parts are used. Subclasses are one family each."""

    pipeline_class: ClassVar[str]
    network_name: ClassVar[str] = "unet"
    options: ClassVar[Mapping[str, Any]] = {}  # for from_pretrained

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @classmethod
    def load(cls, path: str, dtype: torch.dtype) -> Self:
        """From a directory or hub name: safetensors only, every part frozen, the family's scheduler."""
        import diffusers

        stock = getattr(diffusers, cls.pipeline_class)
        absent = {name: None for name, part in stock.load_config(path).items() if part == [None, None]}
        pipeline = stock.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **{**absent, **cls.options})
        pipeline.scheduler = cls.scheduler(pipeline.scheduler.config)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline)

    @staticmethod
    @abstractmethod
    def scheduler(config: Any) -> Any:
        """The diffusers scheduler to sample by."""

    @property
    def network(self) -> Any:
        """What is trained."""
        return getattr(self.pipeline, self.network_name)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """What :meth:`encode` computes with."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part is not None]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    @abstractmethod
    def schedule(self, sampling: SamplingSettings) -> Schedule:
        """The denoising steps, by the scheduler's own arithmetic."""

    @abstractmethod
    def encode(self, prompt: str, device: torch.device) -> Conditions:
        """The conditions of one prompt, without a batch dimension; of "": what guidance leads away from."""

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (batch, channels, height, width)."""

    def step(self, schedule: Schedule, step: int, latents: Tensor, output: Tensor, noise: Tensor, eta: float) -> Tensor:
        """x_{t−1} = μ + σ · ``noise``."""
        index = torch.full((len(latents),), step, device=latents.device)
        mean = schedule.mean(latents, output, index)
        return (mean + schedule.sigma[step] * noise).to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [−1, 1], (batch, 3, height, width): through the autoencoder, scaled back by its configuration."""
        vae = self.pipeline.vae.to(latents.device)  # the first time: a learner never decodes
        config, latents = vae.config, latents.to(vae.dtype)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            known = config.latents_mean, config.latents_std
            mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in known)
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        if getattr(config, "shift_factor", None):
            latents = latents + config.shift_factor
        return vae.decode(latents, return_dict=False)[0]
