"""The fully synthetic loop: real data at generation 1 only, then samples of the previous generation."""

from collections.abc import Sequence

from policies.loops.laws import How, Laws, categorical, fully_synthetic
from policies.loops.rules import Rule, Supply, first_of


class FullySynthetic(Rule):
    """n_synthetic samples of the previous generation, and no real ones."""

    names = ("fully_synthetic",)
    needs_one = ("n_synthetic", "n_ini", "n_total")
    sized_by = 1

    def contradiction(self) -> str | None:
        """Real data."""
        without = "rule fully_synthetic uses no real data after generation 1: leave n_real and fresh_fraction out"
        return without if self.n_real or self.fresh_fraction else None

    def first_size(self) -> int:
        """That of the later sets."""
        return first_of(self.n_synthetic, self.n_total, 0)

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """No real ones."""
        if self.fresh_fraction is not None:
            return super().sizes(generation, generations)
        return 0, first_of(self.n_synthetic, self.total())

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """Bartlett's decomposition gives log det as well."""
        _, later = self.sizes(2, generations)
        return fully_synthetic(**how, n_ini=self.initial(), n_synthetic=later, dimension=dimension)

    def categorical_law(self, generations: int, probabilities: Sequence[float]) -> Laws:
        """Genetic drift, without a bias."""
        sizes = {n_synthetic for _, n_synthetic in self.later_sizes(generations)} or {self.initial()}
        if self.sampling_bias != 1 or len(sizes) > 1:
            return {}
        return categorical(generations=generations, n_ini=self.initial(), n=sizes.pop(), probabilities=probabilities)

    def fresh_supplies(self) -> tuple[Supply, ...]:
        """A fresh fraction of 0, whatever the supply is."""
        return ("fresh", "fresh_with_replacement")
