"""Neon: a model is led away from what training on its own samples would make of it (Alemohammad et al., 2510.03597)."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from pipelines.generators import Generator
from pipelines.refinements import Refinement, extrapolated, trained_on_own
from policies.loops.extrapolation import neon_fully_synthetic
from policies.loops.laws import Laws
from policies.loops.rules import Rule


class Neon(Refinement):
    """θ = (1 + w) θ_r − w θ_s of the fitted weights θ_r and of θ_s, which were briefly trained on with own samples.

    It gains where the sampler seeks modes (a sampling bias below 1). w = −1 is θ_s itself.
    """

    names = ("neon",)

    weight: float = Field(1.0, ge=-1, le=100, description="w: how far the weights are led away")
    samples: int = Field(1000, ge=2, description="own samples that the model is trained on with")
    updates: int = Field(100, ge=1, description="optimiser updates on them; closed forms are fitted to them")

    def check(self, generator: type[Generator], settings: Any, loop: Rule) -> None:
        """It needs weights of which differences mean something."""
        if not generator.extrapolates:
            raise ValueError(f"refinement neon: family {generator.name()} has no weights to extrapolate")
        if getattr(settings, "lora_rank", 0):
            raise ValueError("refinement neon: LoRA's factors cannot be extrapolated: set lora_rank to 0")

    def refine(
        self, model: Generator, settings: Any, seeds: Sequence[int], sampling_bias: float, device: str
    ) -> Generator:
        """See :class:`Neon`. Raises ValueError where extrapolation leads to no model, as to a negative variance."""
        size = self.samples, self.updates
        worse = trained_on_own(model, settings, *size, seeds, sampling_bias, device)
        return model.holding(extrapolated(model.fitted(), worse.fitted(), self.weight))

    def laws(self, generator: type[Generator], settings: Any, loop: Rule, generations: int) -> Laws:
        """Of the fully synthetic Gaussian loop."""
        if generator.name() != "gaussian" or loop.name() != "fully_synthetic" or settings.covariance != "unbiased":
            return {}
        if loop.real_weight != 1 or len(sizes := {size for _, size in loop.later_sizes(generations)}) > 1:
            return {}
        return neon_fully_synthetic(
            generations=generations,
            sampling_bias=loop.sampling_bias,
            n_ini=loop.initial(),
            n=(sizes or {loop.initial()}).pop(),
            weight=self.weight,
            own=self.samples,
        )
