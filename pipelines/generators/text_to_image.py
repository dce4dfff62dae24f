"""A text-to-image model in the self-consuming loop: any Stable Diffusion directory, fitted to captioned images.

The autoencoder and the text encoder stay as they are. The UNet learns the diffusion loss on (image, caption) pairs,
some captions replaced by the empty one, so that a sampling bias is guidance (2207.12598): MAD's λ is a guidance scale
of 1/λ.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.captioned import Captioned, CaptionedSettings, shares
from pipelines.generators.diffusion import MOST_GUIDANCE
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.rl.health import check_drawn
from policies.rl.settings import Steps

if TYPE_CHECKING:
    from torch import Tensor

_BATCH, _PIXELS = 256, 2**20  # images, and their pixels, that are encoded or drawn at once


class TextToImageSettings(CaptionedSettings):
    """A Stable Diffusion pipeline, how it is fitted to captioned images, and who looks at what it draws."""

    from_scratch: bool = Field(True, description="a fit begins with new weights; false: with those of path")
    lora_rank: int = Field(
        0, ge=0, description="0 trains the whole UNet; else LoRA of its attention, from path's weights"
    )
    training_steps: int = Field(1000, ge=1, description="optimiser updates of one fit, annealed to rate 0")
    batch_size: int = Field(64, ge=1, description="images of an update")
    learning_rate: float = Field(3e-3, gt=0, description="peak of the one-cycle schedule")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of captions hidden in training, for guidance")
    sampling_steps: Steps | tuple[Steps, Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = Field(
        20,
        description="steps of the sampler, DPM-Solver++(2M); [20, 2, 0]: with DeepCache, of which only every second "
        "computes the UNet whole, the others from its up-resnet 0 from the end",
    )

    @property
    def steps(self) -> int:
        """Of the sampler."""
        return self.sampling_steps[0] if isinstance(self.sampling_steps, tuple) else self.sampling_steps

    @property
    def cache(self) -> tuple[int, int] | None:
        """DeepCache's interval and branch."""
        return self.sampling_steps[1:] if isinstance(self.sampling_steps, tuple) else None


class TextToImageGenerator(Captioned):
    """A fitted pipeline. Images have three channels."""

    names = ("text_to_image",)
    schema = TextToImageSettings
    has_density = shares_training = True
    updates = "training_steps"

    def __init__(self, settings: TextToImageSettings, captions: Mapping[str, float], device: str = "cpu") -> None:
        """``captions``: what it is asked for, and how often (shares)."""
        import torch

        from pipelines.denoisers import load_family
        from pipelines.rl.weights import prepare
        from pipelines.settings import ModelSettings

        self.settings, self.captions, self.device = settings, dict(captions), torch.device(device)
        self.model = ModelSettings(path=settings.path, lora_rank=settings.lora_rank)
        self.family = load_family(settings.path, torch.float32)
        self.family.pipeline.to(self.device)
        with torch.random.fork_rng(devices=[]):  # LoRA begins at random
            torch.manual_seed(0)
            self.parameters = prepare(self.family.network, self.model)
        self.family.network.eval()

    @classmethod
    def fit(
        cls, settings: TextToImageSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from new weights, from those of ``settings.path``, or on from ``start``'s."""
        (seed,), weights = seeds, np.ones(data.values.shape[1]) if data.weights is None else data.weights
        assert data.captions is not None  # as of all images that this family may be trained on
        read = data.captions[0].tolist()
        generator = cls(settings, shares(read, weights), device)
        if start is not None:
            generator.hold(start.fitted())
        elif settings.from_scratch:
            generator._begin_anew(seed)
        generator._train(data.values[0], read, weights, seed)
        return generator

    def fitted(self) -> "dict[str, Tensor]":
        """What is trained, by name: the whole UNet, or LoRA."""
        from pipelines.rl.weights import copied

        return copied(self.parameters, "cpu")

    def holding(self, weights: "Mapping[str, Tensor]") -> Self:
        """The same pipeline with other weights for what is trained."""
        other = type(self)(self.settings, self.captions, str(self.device))
        other.hold(weights)
        return other

    def hold(self, weights: "Mapping[str, Tensor]") -> None:
        """Take over what :meth:`fitted` gave, of this or of another."""
        from pipelines.rl.weights import fill

        fill(self.parameters, weights)

    def _begin_anew(self, seed: int) -> None:
        """New weights, as the network's class makes them."""
        import torch

        network = self.family.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hold(dict(type(network).from_config(network.config).named_parameters()))

    def _train(self, images: np.ndarray, captions: Sequence[str], weights: np.ndarray, seed: int) -> None:
        import torch

        from pipelines.training import train

        settings, network, device = self.settings, self.family.network, self.device
        random, noises = torch.Generator().manual_seed(seed), self.family.pipeline.scheduler
        mean, deviation = self._posterior(images)
        known = {caption: number for number, caption in enumerate(sorted(set(captions)))}
        states = self._states([*known, None])
        owner, chances = torch.tensor([known[caption] for caption in captions]), torch.from_numpy(weights)
        kind = noises.config.prediction_type

        def draw() -> "tuple[Tensor, ...]":
            chosen = torch.multinomial(chances, settings.batch_size, replacement=True, generator=random)
            times = torch.randint(noises.config.num_train_timesteps, chosen.shape, generator=random)
            hidden = torch.rand(chosen.shape, generator=random) < settings.caption_dropout
            shape = (len(chosen), *mean.shape[1:])
            spread, noise = torch.randn(2, *shape, generator=random)
            clean, shown = mean[chosen] + deviation[chosen] * spread, owner[chosen].masked_fill(hidden, len(known))
            noisy = noises.add_noise(clean, noise, times)
            target = {"epsilon": noise, "sample": clean}.get(kind, noises.get_velocity(clean, noise, times))
            return noisy, times, shown, target

        def loss(unet: Any, noisy: "Tensor", times: "Tensor", shown: "Tensor", target: "Tensor") -> "Tensor":
            given = {name: each[shown].to(device) for name, each in states.items()}
            output = unet(noisy.to(device), times.to(device), **given, return_dict=False)[0]
            return torch.nn.functional.mse_loss(output, target.to(device))

        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        network.train()
        train(network, draw, loss, settings.training_steps, settings.learning_rate, clip=1.0, fused=True)
        network.eval()

    def _posterior(self, images: np.ndarray) -> "tuple[Tensor, Tensor]":
        """Mean and deviation of each image's latents, as the network sees them: (n, channels, height, width) each."""
        import torch

        from pipelines.measures.evaluator import to_network_input

        vae = self.family.pipeline.vae
        with torch.inference_mode():
            parts = [
                vae.encode(batch.to(self.device)).latent_dist
                for batch in to_network_input(images).split(_together(images.shape[1:3]))
            ]
            found = [torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("mean", "std")]
        mean, deviation = (each.clone() * vae.config.scaling_factor for each in found)
        return mean, deviation

    def _states(self, captions: Sequence[str | None]) -> "dict[str, Tensor]":
        """What the network gets of each caption; of None: of the empty one."""
        import torch

        with torch.no_grad():
            each = [self.family.encode(caption, self.device) for caption in captions]
        return {name: torch.stack([one[name] for one in each]).cpu() for name in each[0]}

    def drawn(self, prompts: Sequence[str], seed: int, bias: float) -> np.ndarray:
        """A ``bias`` of 1 costs one network call a step, any other two, and needs caption dropout in training."""
        return self.draw(prompts, seed, 1 / bias)

    def draw(self, prompts: Sequence[str], seed: int, guidance_scale: float = 1.0) -> np.ndarray:
        """An image for each prompt, (n, height, width, 3) uint8, by the stock pipeline."""
        import torch
        from diffusers import DPMSolverMultistepScheduler

        from pipelines.denoisers.deep_cache import caching

        pipeline, random = self.family.pipeline, torch.Generator().manual_seed(seed)
        kept = pipeline.scheduler
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(kept.config)
        how: dict[str, Any] = {"num_inference_steps": self.settings.steps, "output_type": "pt"}
        how["guidance_scale"] = guidance_scale
        size = _together(self.family.files.image_size)
        parts = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        cached = caching(pipeline.unet, *self.settings.cache) if self.settings.cache else nullcontext()
        try:
            with torch.inference_mode(), cached:
                drawn = [pipeline(part, generator=random, **how).images.cpu() for part in parts]
        finally:
            pipeline.scheduler = kept
        images = torch.cat(drawn)
        check_drawn(bool(images.isfinite().all()))
        return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def save(self, directory: Path) -> None:
        """What was trained and the captions; the rest is at ``settings.path``. Equal generators write equal bytes."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.fitted(), directory / "trained.safetensors")
        config = {"settings": self.settings.model_dump(), "captions": self.captions}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""
        from safetensors.torch import load_file

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        generator = cls(TextToImageSettings(**config["settings"]), config["captions"], device)
        generator.hold(load_file(directory / "trained.safetensors"))
        return generator

    @classmethod
    def check(cls, settings: TextToImageSettings, loop: Rule) -> None:
        """A sampling bias is guidance; LoRA has a base."""
        bias = loop.sampling_bias
        if bias < 1 and not settings.caption_dropout:
            raise ValueError("a sampling_bias below 1 is guidance, which needs text_to_image.caption_dropout above 0")
        if bias * MOST_GUIDANCE < 1:
            raise ValueError(f"sampling_bias {bias:g} is guidance of scale {1 / bias:.3g}: at most {MOST_GUIDANCE}")
        if settings.lora_rank and settings.from_scratch:
            raise ValueError("text_to_image: LoRA adds to weights that are there: set from_scratch=false")
        from pipelines.denoisers import check_cache

        check_cache(cls.files(settings), settings.cache, "text_to_image.sampling_steps")


def _together(sides: Sequence[int]) -> int:
    """How many images of ``sides`` (height, width) are computed on at once."""
    return max(1, min(_BATCH, _PIXELS // (sides[0] * sides[1])))
