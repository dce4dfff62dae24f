"""Accumulation: every generation is trained on all that came before (Gerstgrasser et al., 2404.01413).

It is the one rule that reads a batch again, which is its definition.
"""

from policies.loops.laws import Covariance, Laws, accumulate
from policies.loops.rules import Rule, first_of


class Accumulate(Rule):
    """The real set and a batch of n_synthetic samples of every earlier generation."""

    names = ("accumulate",)

    def is_sized_by(self, given: object) -> bool:
        """Never: the sets grow."""
        return False

    def contradiction(self) -> str | None:
        """A fresh fraction."""
        if self.fresh_fraction is None:
            return None
        return f"rule {self.name()} uses the same real set every time: give n_real, not fresh_fraction"

    def missing(self) -> str | None:
        """The real set."""
        sized = self.n_ini is not None or self.n_real is not None
        return None if sized else "n_ini (real samples) and n_synthetic (a batch; null: n_ini)"

    @property
    def accumulates(self) -> bool:
        """By its name."""
        return True

    def first_size(self) -> int:
        """The real set."""
        return first_of(self.n_real, 0)

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """Of the real set and of one batch."""
        return first_of(self.n_real, self.initial()), first_of(self.n_synthetic, self.initial())

    def gaussian_law(self, generations: int, dimension: int, covariance: Covariance) -> Laws:
        """If generation 1 has the same real set."""
        if (n_synthetic := self.once(generations)) is None:
            return {}
        return accumulate(
            generations=generations,
            n_ini=self.initial(),
            n_synthetic=n_synthetic,
            sampling_bias=self.sampling_bias,
            covariance=covariance,
        )
