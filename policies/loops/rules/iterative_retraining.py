"""Iterative retraining: a generation goes on from the last one's weights (Bertrand et al., 2310.00429)."""

from policies.loops.laws import Covariance, Laws, augmentation
from policies.loops.rules import Rule, first_of


class IterativeRetraining(Rule):
    """The same real set every time, beside samples of the previous generation, from whose weights training starts."""

    names = ("iterative_retraining",)
    fine_tunes = True

    def first_size(self) -> int:
        """The real set."""
        return first_of(self.n_real, 0) if self.fresh_fraction is None else super().first_size()

    def gaussian_law(self, generations: int, dimension: int, covariance: Covariance) -> Laws:
        """Augmentation's: a closed form has nothing to go on from."""
        if (n_synthetic := self.once(generations)) is None:
            return {}
        return augmentation(
            generations=generations,
            n_real=self.initial(),
            n_synthetic=n_synthetic,
            sampling_bias=self.sampling_bias,
            covariance=covariance,
        )
