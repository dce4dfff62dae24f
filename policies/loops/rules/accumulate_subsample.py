"""Accumulation under a budget: a draw of fixed size from all that came before (Kazdan et al., 2410.16713)."""

from policies.loops.laws import How, Laws, accumulate_subsample
from policies.loops.rules.accumulate import Accumulate


class AccumulateSubsample(Accumulate):
    """N samples, drawn without replacement from the real set and every earlier batch."""

    names = ("accumulate_subsample",)
    real_first = False

    def contradiction(self) -> str | None:
        """Weights."""
        alike = "rule accumulate_subsample draws all samples alike: leave real_weight out"
        return alike if self.real_weight != 1 else None

    def subsample(self) -> int:
        """N."""
        return self.total()

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """If the real set, a batch and N are of one size."""
        alike = self.once(generations) == self.initial() == self.total()
        return accumulate_subsample(**how, n=self.initial()) if alike else {}
