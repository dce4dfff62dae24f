"""Diffusion of small images, conditional on their classes (Ho & Salimans, "Classifier-Free Diffusion Guidance",
2207.12598) or, where they have no labels, unconditional.

A diffusers UNet predicts v on a cosine schedule. Some of its training labels are replaced by a null class, so that
sampling can be biased toward what a label says: MAD's λ is a diffusers ``guidance_scale`` of 1/λ. Without labels, the
null class is the only one.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from pipelines.generators import Generator, Seeds
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.rl.health import check_drawn
from policies.rl.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_GUIDANCE = 1000  # beyond it a sampler's float32 numbers mean nothing


class DiffusionSettings(Settings):
    """A diffusion model trained from scratch: its network, training and sampler."""

    classes: int | None = Field(None, ge=0, description="number of labels; 0: unconditional; null: the data's")
    channels: int = Field(16, ge=8, multiple_of=8, description="width of the UNet's finest level; doubles each level")
    levels: int = Field(2, ge=1, description="resolutions of the UNet; image sides must be multiples of 2^(levels-1)")
    training_steps: int = Field(400, ge=1, description="optimiser updates of one fit, annealed to rate 0")
    batch_size: int = Field(32, ge=1, description="images of an update")
    learning_rate: float = Field(8e-3, gt=0, description="peak of the one-cycle schedule")
    timesteps: int = Field(200, ge=2, description="noise levels in training")
    sampling_steps: int = Field(20, ge=1, description="steps of the sampler, DPM-Solver++(2M); timesteps at most")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training, for guidance")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.sampling_steps > self.timesteps:
            raise ValueError(f"sampling_steps ({self.sampling_steps}) must be at most timesteps ({self.timesteps})")
        return self


class DiffusionGenerator(Generator):
    """A fitted UNet. One universe: ``values`` are uint8 (1, n, height, width, channels), and there is one seed."""

    names = ("diffusion",)
    schema = DiffusionSettings
    conditional = extrapolates = has_score = shares_training = True
    updates = "training_steps"
    metrics = (*Generator.metrics, "label_accuracy")

    def __init__(
        self,
        settings: DiffusionSettings,
        unet: Any,
        shares: np.ndarray | None = None,
        other: Any = None,
        strength: float = 0.0,
    ) -> None:
        """``other``: a UNet from which samples are led away with some ``strength``."""
        from diffusers import DDPMScheduler

        self.settings, self.other, self.strength = settings, other, strength
        self.unet = unet.eval().requires_grad_(False)
        for network in (unet, other):
            if network is not None:  # else equal models would remember where they were loaded from
                network.register_to_config(_name_or_path="")
        self.classes = unet.config.num_class_embeds - 1  # the last one is the null class
        # Of each label in the training set, (classes,); (1,) without labels.
        self.shares = np.full(self.classes, 1 / self.classes) if shares is None else shares
        kind = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        self.noises = DDPMScheduler(settings.timesteps, beta_schedule="squaredcos_cap_v2", **kind)

    @classmethod
    def fit(
        cls, settings: DiffusionSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s weights, on batches drawn in proportion to ``data.weights``."""
        import torch

        from pipelines.measures.evaluator import to_network_input

        (seed,), images = seeds, to_network_input(data.values[0])
        known = None if settings.classes == 0 else data.labels
        labels = torch.zeros(len(images), dtype=torch.long) if known is None else torch.from_numpy(known[0])
        classes = settings.classes or (0 if known is None else int(labels.max()) + 1)
        weights = torch.from_numpy(np.ones(len(images)) if data.weights is None else data.weights)
        shape = settings.channels, settings.levels, images.shape[1:]
        unet = deepcopy(start.unet) if start is not None else build(*shape, classes + 1, seed)  # the last is null
        classes = unet.config.num_class_embeds - 1
        if labels.max() >= max(classes, 1):
            raise ValueError(f"label {labels.max()} is none of the {classes} classes: set classes higher")
        shares = np.bincount(labels.numpy(), weights.numpy(), minlength=classes) / weights.sum().item()
        generator = cls(settings, unet.to(device), shares)
        generator._train(images, labels, weights, torch.Generator().manual_seed(seed))
        return generator

    def _train(self, images: "Tensor", labels: "Tensor", weights: "Tensor", random: "torch.Generator") -> None:
        import torch

        from pipelines.training import train

        settings, noises, device = self.settings, self.noises, self.unet.device
        unet = self.unet.train().requires_grad_(True)

        def draw() -> "tuple[Tensor, ...]":
            chosen = torch.multinomial(weights, settings.batch_size, replacement=True, generator=random)
            times = torch.randint(settings.timesteps, chosen.shape, generator=random)
            hidden = torch.rand(chosen.shape, generator=random) < settings.label_dropout
            clean, shown = images[chosen], labels[chosen].masked_fill(hidden, self.classes)
            noise = torch.randn(clean.shape, generator=random)
            noisy, target = noises.add_noise(clean, noise, times), noises.get_velocity(clean, noise, times)
            return noisy, times, shown, target

        def loss(unet: Any, noisy: "Tensor", times: "Tensor", shown: "Tensor", target: "Tensor") -> "Tensor":
            velocity = unet(noisy.to(device), times.to(device), shown.to(device)).sample
            return torch.nn.functional.mse_loss(velocity, target.to(device))

        train(unet, draw, loss, settings.training_steps, settings.learning_rate, fused=True)
        unet.eval().requires_grad_(False)

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images and the labels, if any, they were asked to show: the training set's own, in random order.

        A ``bias`` of 1 costs one network call a step, any other two, and needs label dropout in training.
        """
        import torch

        (seed,) = seeds
        random = torch.Generator().manual_seed(seed)
        labels = allotted(torch.from_numpy(self.shares), count, random)
        with torch.inference_mode():
            batches = [self._denoise(batch, random, 1 / bias) for batch in labels.split(256)]
        return Samples(torch.cat(batches).numpy()[None], labels.numpy()[None] if self.classes else None)

    def _denoise(self, labels: "Tensor", random: "torch.Generator", guidance_scale: float) -> "Tensor":
        """Images (n, height, width, channels) uint8 of ``labels`` (n,)."""
        import torch
        from diffusers import DPMSolverMultistepScheduler

        # Ancestral sampling in so few steps shrinks the variance within a class by a third: a hidden sampling bias.
        sampler = DPMSolverMultistepScheduler.from_config(self.noises.config, thresholding=True, sample_max_value=1.0)
        sampler.set_timesteps(self.settings.sampling_steps)
        shape = (len(labels), self.unet.config.in_channels, *self.unet.config.sample_size)
        images, labels = torch.randn(shape, generator=random).to(self.unet.device), labels.to(self.unet.device)

        def velocity(unet: Any, time: "Tensor") -> "Tensor":
            shown: Tensor = unet(images, time, labels).sample
            if guidance_scale == 1:
                return shown
            free: Tensor = unet(images, time, torch.full_like(labels, self.classes)).sample
            return free + guidance_scale * (shown - free)

        for time in sampler.timesteps:
            direction = velocity(self.unet, time)
            if self.other is not None:  # linear in the score at a given image and time, as the weights sum to 1
                direction = direction + self.strength * (direction - velocity(self.other, time))
            images = sampler.step(direction, time, images).prev_sample
        check_drawn(bool(images.isfinite().all()))
        return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()

    def fitted(self) -> "dict[str, Tensor]":
        """The UNet's."""
        return {name: value.detach().cpu().clone() for name, value in self.unet.named_parameters()}

    def holding(self, weights: "Mapping[str, Tensor]") -> Self:
        """With another UNet of the same shape."""
        unet = deepcopy(self.unet)
        unet.load_state_dict(dict(weights), strict=False)
        return type(self)(self.settings, unet, self.shares)

    def led_away(self, other: Self, strength: float) -> Self:
        """Twice the network calls."""
        return type(self)(self.settings, self.unet, self.shares, other.unet, strength)

    def save(self, directory: Path) -> None:
        """The UNet as diffusers writes it, the settings and the labels' shares. Equal generators write equal bytes."""
        self.unet.save_pretrained(directory / "unet")
        config: dict[str, Any] = {"settings": self.settings.model_dump(), "shares": self.shares.tolist()}
        if self.other is not None:
            self.other.save_pretrained(directory / "other")
            config["strength"] = self.strength
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""
        from diffusers import UNet2DModel

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        unet = UNet2DModel.from_pretrained(directory / "unet").to(device)
        led = "strength" in config
        other = UNet2DModel.from_pretrained(directory / "other").to(device).eval() if led else None
        known = DiffusionSettings(**config["settings"]), unet, np.array(config["shares"])
        return cls(*known, other, config.get("strength", 0.0))

    @classmethod
    def settled(cls, settings: DiffusionSettings, classes: int) -> DiffusionSettings:
        """Of as many classes as there are, as a small training set may lack the last one."""
        return settings.model_copy(update={"classes": classes if settings.classes is None else settings.classes})

    @classmethod
    def check(cls, settings: DiffusionSettings, loop: Rule) -> None:
        """A sampling bias is guidance."""
        bias = loop.sampling_bias
        if bias < 1 and settings.classes == 0:
            raise ValueError("a sampling_bias below 1 is guidance, which needs labels: set it to 1, or family=gan")
        if bias < 1 and not settings.label_dropout:
            raise ValueError("a sampling_bias below 1 is guidance, which needs diffusion.label_dropout above 0")
        if bias * MOST_GUIDANCE < 1:
            raise ValueError(f"sampling_bias {bias:g} is guidance of scale {1 / bias:.3g}: at most {MOST_GUIDANCE}")

    @classmethod
    def check_classes(cls, settings: DiffusionSettings, classes: int) -> None:
        """Each has an embedding."""
        if settings.classes and not 0 < classes <= settings.classes:
            raise ValueError(f"diffusion.classes is {settings.classes}, the images have {classes}: set it to null")

    @classmethod
    def side_multiple(cls, settings: DiffusionSettings) -> int:
        """A resolution is half of the one above."""
        return 2 ** (settings.levels - 1)


def allotted(shares: "Tensor", count: int, random: "torch.Generator") -> "Tensor":
    """Labels (count,), of which every first n have each label's share of n to within about one.

    The j-th of a label falls due at a random moment from j to j + 1 times the inverse of its share. Independent draws
    would let the shares drift from generation to generation even if the model were perfect.
    """
    import torch

    needed = torch.where(shares > 0, (count * shares).long() + 2, 0)
    labels = torch.repeat_interleave(needed)
    number = torch.arange(len(labels)) - (needed.cumsum(0) - needed)[labels]
    due = (number + torch.rand(len(labels), generator=random, dtype=torch.float64)) / shares[labels]
    return labels[due.argsort()[:count]]


def build(channels: int, levels: int, shape: Sequence[int], embeddings: int | None, seed: int) -> Any:
    """An untrained UNet for images of ``shape`` (channels, height, width), its finest level ``channels`` wide and each
    next one twice as wide and half as high, with so many ``embeddings`` of classes."""
    import torch
    from diffusers import UNet2DModel

    inputs, *size = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: Any = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
        blocks["block_out_channels"] = tuple(channels * 2**level for level in range(levels))
        sizes = {"layers_per_block": 1, "norm_num_groups": 8, "num_class_embeds": embeddings}
        return UNet2DModel(tuple(size), inputs, inputs, add_attention=False, **blocks, **sizes)
