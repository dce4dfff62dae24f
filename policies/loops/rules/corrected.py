"""A corrected loop: synthetic samples are moved towards the real distribution (Gillman et al. 2024, 2407.02087)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from policies.loops.laws import How, Laws, corrected, corrected_categorical
from policies.loops.rules import Drawing, Rule
from policies.loops.samples import Samples


class Corrected(Rule):
    """Real samples by the supply, beside samples of the previous generation p under the ideal corrector, which makes
    them samples of (p + γp*)/(1 + γ), p* the truth.

    To draw from that mixture is to replace each sample by a real one with probability γ/(1 + γ). So what correction
    gains is at most what so much fresh data gains.
    """

    names = ("corrected",)
    supplied = needs_truth = True

    correction: float = Field(1.0, ge=0, le=1e6, description="corrected: γ; 0 corrects nothing")

    @property
    def kept(self) -> float:
        """The share 1/(1 + γ) of samples that stay as the model drew them."""
        return 1 / (1 + self.correction)

    def selection(self) -> dict[str, Any]:
        """The share that is kept."""
        return {"rule": "corrected", "kept": self.kept}

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """In place of each sample, with the probability that is left, one of the truth."""
        assert drawing.truth is not None  # as of all families that the rule can be applied to
        drawn, real = drawing.draw(drawing.size).values, drawing.truth(drawing.size).values
        kept = np.stack([stream.random(drawing.size) < selection["kept"] for stream in drawing.streams])
        return Samples(np.where(kept.reshape(*kept.shape, *[1] * (drawn.ndim - 2)), drawn, real))

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """Of new real samples at every generation, or none."""
        sizes = self._law_sizes(generations)
        return corrected(**how, n_ini=self.initial(), kept=self.kept, **sizes) if sizes else {}

    def categorical_law(self, generations: int, probabilities: Sequence[float]) -> Laws:
        """The same, without a bias."""
        sizes = self._law_sizes(generations)
        if not sizes or self.sampling_bias != 1:
            return {}
        how: dict[str, Any] = {"generations": generations, "probabilities": probabilities}
        return corrected_categorical(**how, n_ini=self.initial(), kept=self.kept, **sizes)

    def _law_sizes(self, generations: int) -> dict[str, Any]:
        n_real, n_synthetic = zip(*self.later_sizes(generations), strict=True)
        return {} if self.supply == "fixed" and any(n_real) else {"n_real": n_real, "n_synthetic": n_synthetic}
