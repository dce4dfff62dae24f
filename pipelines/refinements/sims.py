"""SIMS: a sampler that is led away from a model of the model's own samples (Alemohammad et al., 2408.16333)."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from pipelines.generators import Generator
from pipelines.refinements import Refinement, trained_on_own
from policies.loops.rules import Rule


class Sims(Refinement):
    """Draws with the score (1 + ω) s_r − ω s_s of the fitted model s_r and of s_s, which was trained on with own
    samples: two networks, so twice the calls."""

    names = ("sims",)

    strength: float = Field(1.0, ge=0, le=100, description="ω: how far the sampler is led away")
    samples: int = Field(1000, ge=2, description="own samples that the second model is trained on with")
    updates: int = Field(100, ge=1, description="optimiser updates on them")

    def check(self, generator: type[Generator], settings: Any, loop: Rule) -> None:
        """It needs a score."""
        if not generator.has_score:
            raise ValueError(f"refinement sims: family {generator.name()} has no score; diffusion has one")

    def refine(
        self, model: Generator, settings: Any, seeds: Sequence[int], sampling_bias: float, device: str
    ) -> Generator:
        """See :class:`Sims`."""
        size = self.samples, self.updates
        return model.led_away(trained_on_own(model, settings, *size, seeds, sampling_bias, device), self.strength)
