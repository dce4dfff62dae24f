"""Iterative retraining: a generation goes on from the last one's weights (Bertrand et al., 2310.00429)."""

from collections.abc import Mapping
from typing import Any

from policies.loops.laws import Laws, augmentation
from policies.loops.rules import Rule, first_of


class IterativeRetraining(Rule):
    """The same real set every time, beside samples of the previous generation, from whose weights training starts."""

    names = ("iterative_retraining",)
    fine_tunes = True

    def first_size(self) -> int:
        """The real set."""
        return first_of(self.n_real, 0) if self.fresh_fraction is None else super().first_size()

    def gaussian_law(self, generations: int, dimension: int, how: Mapping[str, Any]) -> Laws:
        """Augmentation's: a closed form has nothing to go on from."""
        once = self.once(generations)
        return {} if once is None else augmentation(**how, n_real=self.initial(), n_synthetic=once)
