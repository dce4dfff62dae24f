"""What the loops ask of a family of diffusion models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from pipelines.denoisers import ModelFiles
from pipelines.denoisers.schedulers import DenoisingSteps
from pipelines.storage.model_files import load_whole
from policies.diffusion.schedule import Schedule
from policies.rl.settings import SamplingSettings

Conditions = dict[str, Tensor]  # what the network gets of each prompt: name → (prompts, …)

_PIXELS = 2**20  # of images that are decoded at once: an autoencoder's activations are a hundred times an image

AnySchedule = TypeVar("AnySchedule", bound=Schedule)


def checked(schedule: AnySchedule, steps: DenoisingSteps) -> AnySchedule:
    """``schedule``, if its steps with a density are those that a plan counts. Raises ValueError."""
    if schedule.stochastic_steps.tolist() != steps.stochastic or not schedule.sigma.isfinite().all():
        raise ValueError("scheduler: its levels of noise do not fall from step to step; check its betas, or its shift")
    return schedule


def placed(part: nn.Module, device: torch.device) -> Any:
    """A part of a pipeline on ``device``. Nothing is asked of one that is there."""
    parameter = next(part.parameters(), None)
    return part if parameter is None or parameter.device.type == device.type else part.to(device)


class Family(ABC):
    """A stock diffusers pipeline, and how its parts are used. Subclasses are one family each."""

    pipeline_class: ClassVar[str]
    network_name: ClassVar[str] = "unet"
    options: ClassVar[Mapping[str, Any]] = {}  # for from_pretrained
    scales: ClassVar[tuple[str, ...]] = ()  # of the autoencoder's configuration, those that the stock pipeline reads

    def __init__(self, pipeline: Any, files: ModelFiles) -> None:
        self.pipeline, self.files = pipeline, files

    @classmethod
    def load(cls, files: ModelFiles, dtype: torch.dtype, device: str | None = None) -> Self:
        """From a directory: safetensors only, every part frozen, the family's scheduler. Raises ValueError where a part
        holds other tensors than its class, which would otherwise be left random."""
        import diffusers

        stock = getattr(diffusers, cls.pipeline_class)
        parts: dict[str, Any] = dict.fromkeys(files.absent)
        for name in files.shapes:
            library, kind = files.parts[name]
            part = load_whole(getattr(import_module(library), kind), files.directory / name, device, torch_dtype=dtype)
            parts[name] = part.requires_grad_(False)
        parts["scheduler"] = cls.scheduler(files.scheduler)
        pipeline = stock.from_pretrained(
            files.directory, torch_dtype=dtype, use_safetensors=True, **{**parts, **cls.options}
        )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, files)

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
        return self.files.latent_shape

    @abstractmethod
    def schedule(self, sampling: SamplingSettings) -> Schedule:
        """The denoising steps, by the scheduler's own arithmetic."""

    @abstractmethod
    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """The conditions of one prompt, without a batch dimension; of None: what guidance leads away from."""

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (batch, channels, height, width)."""

    def step(self, schedule: Schedule, step: int, latents: Tensor, output: Tensor, noise: Tensor, eta: float) -> Tensor:
        """x_{t−1} = μ + σ · ``noise``."""
        index = torch.full((len(latents),), step, device=latents.device)
        mean = schedule.mean(latents, output, index)
        return (mean + schedule.sigma[step] * noise).to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [−1, 1], (batch, 3, height, width): through the autoencoder, scaled as the stock pipeline does."""
        vae = placed(self.pipeline.vae, latents.device)  # the first time: a learner never decodes
        config, latents = vae.config, latents.to(vae.dtype)
        if all(name in self.scales and getattr(config, name, None) for name in ("latents_mean", "latents_std")):
            known = config.latents_mean, config.latents_std
            mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in known)
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        if "shift_factor" in self.scales and getattr(config, "shift_factor", None):
            latents = latents + config.shift_factor
        parts = latents.split(self.decoded_at_once(len(latents), latents.shape[2]))
        return torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])

    def decoded_at_once(self, images: int, rows: int | None = None) -> int:
        """How many of so many ``images`` the autoencoder decodes in a call; or of parts of images, of so many ``rows``
        of latents."""
        height, width = self.files.image_size
        part = height * (rows or self.latent_shape[1]) // self.latent_shape[1]
        return min(images, max(1, _PIXELS // (part * width)))
