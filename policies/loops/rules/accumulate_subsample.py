"""Accumulation under a budget: a draw of fixed size from all that came before (Kazdan et al., 2410.16713)."""

from policies.loops.laws import Covariance, Laws, accumulate_subsample
from policies.loops.rules import Rule
from policies.loops.rules.accumulate import Accumulate


class AccumulateSubsample(Accumulate):
    """N samples, drawn without replacement from the real set and every earlier batch."""

    names = ("accumulate_subsample",)

    def contradiction(self) -> str | None:
        """Weights, besides."""
        alike = "rule accumulate_subsample draws all samples alike: leave real_weight out"
        return super().contradiction() or (alike if self.real_weight != 1 else None)

    def first_size(self) -> int:
        """N."""
        return Rule.first_size(self)

    def subsample(self) -> int:
        """N."""
        return self.total()

    def gaussian_law(self, generations: int, dimension: int, covariance: Covariance) -> Laws:
        """If the real set, a batch and N are of one size."""
        if not self.once(generations) == self.initial() == self.total():
            return {}
        return accumulate_subsample(
            generations=generations, n=self.initial(), sampling_bias=self.sampling_bias, covariance=covariance
        )
