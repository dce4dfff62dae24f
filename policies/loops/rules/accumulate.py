"""Accumulation: every generation is trained on all that came before (Gerstgrasser et al., 2404.01413).

It is the one rule that reads a batch again, which is its definition.
"""

from collections.abc import Mapping
from typing import Any

from policies.loops.laws import Laws, accumulate
from policies.loops.rules import Rule, first_of


class Accumulate(Rule):
    """The real set and a batch of n_synthetic samples of every earlier generation."""

    names = ("accumulate",)
    sized_by = 3

    def contradiction(self) -> str | None:
        """A fresh fraction."""
        problem = f"rule {self.name()} uses the same real set every time: give n_real, not fresh_fraction"
        return None if self.fresh_fraction is None else problem

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

    def gaussian_law(self, generations: int, dimension: int, how: Mapping[str, Any]) -> Laws:
        """If generation 1 has the same real set."""
        once = self.once(generations)
        return {} if once is None else accumulate(**how, n_ini=self.initial(), n_synthetic=once)
