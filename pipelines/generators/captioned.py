"""What the generators have in common that learn from captions: they are asked in words for what they were shown.

Prompts are the captions of the training set, in its shares. Weights of samples count in the shares as they do in a fit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipelines.generators import Generator, Seeds
from pipelines.generators.diffusion import allotted
from pipelines.storage.locations import portable, resolve_model
from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from policies.rl.settings import Settings

_PATHS = ("path", "captioner", "evaluator")


class CaptionedSettings(Settings):
    """A Stable Diffusion pipeline, or a part of it, and who looks at what is drawn."""

    path: str = Field("models/digits/pipeline", description="directory of a Stable Diffusion 1.x or 2.x pipeline")
    captioner: str | None = Field(
        "models/digits/captioner", description="of BLIP or BLIP-2: for captions, and rewards that read them; null: none"
    )
    evaluator: str | None = Field(
        "models/digits/evaluator", description="the judge of prompt_accuracy, which nothing is trained on; null: none"
    )


class Captioned(Generator):
    """One universe: ``values`` are uint8 (1, n, height, width, channels), and there is one seed."""

    captioned = extrapolates = True
    metrics = (*Generator.metrics, "prompt_accuracy", "caption_agreement", "reward")

    captions: Mapping[str, float]  # what it is asked for, and how often: shares

    def drawn(self, prompts: Sequence[str], seed: int, bias: float) -> np.ndarray:
        """An image for each prompt, (n, height, width, channels) uint8."""
        raise NotImplementedError

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images and the captions they were asked to show."""
        return self.candidates(count, 1, seeds, bias)

    def candidates(self, count: int, each: int, seeds: Seeds, bias: float) -> Samples:
        """``each`` images for every one of ``count`` prompts."""
        (seed,) = seeds
        prompts = self.prompts(count, seed) * each
        images = self.drawn(prompts, derive_seed(seed, "noise"), bias)
        return Samples(images[None], captions=np.array(prompts)[None])

    def prompts(self, count: int, seed: int) -> list[str]:
        """So many of its captions, of which every first n have each one's share of n to within about one."""
        import torch

        known, random = list(self.captions), torch.Generator().manual_seed(seed)
        shares = torch.tensor(list(self.captions.values()), dtype=torch.float64)
        return [known[number] for number in allotted(shares, count, random).tolist()]

    @classmethod
    def settled(cls, settings: Any, classes: int) -> Any:
        """With paths that every node understands."""
        paths = {name: getattr(settings, name) for name in _PATHS}
        return settings.model_copy(update={name: portable(path) for name, path in paths.items() if path})

    @classmethod
    def files(cls, settings: Any) -> Any:
        """What is in ``settings.path``. Raises ValueError unless it is a Stable Diffusion pipeline."""
        from pipelines.denoisers import inspect

        found = inspect(Path(resolve_model(settings.path)))
        if found.kind.place != "stable_diffusion:StableDiffusion":
            raise ValueError(f"{cls.name()}.path: {settings.path!r} is no StableDiffusionPipeline")
        return found


def shares(captions: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """By caption its part of the ``weights`` (n,), in alphabetical order."""
    found: dict[str, float] = dict.fromkeys(sorted(set(captions)), 0.0)
    for caption, weight in zip(captions, weights / weights.sum(), strict=True):
        found[caption] += float(weight)
    return found
