"""A memory: synthetic samples of the last K generations (Alemohammad et al. 2307.01850, figure 30)."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from policies.loops.laws import Laws, augmentation, fresh
from policies.loops.rules import Rule
from policies.loops.training_sets import spread


class Memory(Rule):
    """n_synthetic new samples, spread evenly over the last ``memory`` generations."""

    names = ("memory",)
    supplied = effective = True

    memory: int = Field(3, ge=1, description="memory: new samples of the last K generations")

    def looks_back(self, generations: int) -> int:
        """K."""
        return self.memory

    def synthetic(self, generation: int, count: int) -> dict[int, int]:
        """As even as can be, later generations getting the rest."""
        remembered = range(max(1, generation - self.memory), generation)
        if 0 < count < len(remembered):
            raise ValueError(
                f"generation {generation}: {count} synthetic samples are too few for {len(remembered)} generations: "
                f"set memory to {count} at most"
            )
        return dict(zip(remembered, spread(count, len(remembered)), strict=True))

    def gaussian_law(self, generations: int, dimension: int, how: Mapping[str, Any]) -> Laws:
        """With new real samples, or with the first generation's."""
        common = {**how, "memory": self.memory}
        if self.supply != "fixed":
            n_real, n_synthetic = zip(*self.later_sizes(generations), strict=True)
            return fresh(**common, n_ini=self.initial(), n_real=n_real, n_synthetic=n_synthetic)
        once = self.once(generations)
        return {} if once is None else augmentation(**common, n_real=self.initial(), n_synthetic=once)
