"""The fresh data loop: new real samples at every generation, beside samples of the previous one."""

from collections.abc import Mapping
from typing import Any

from policies.loops.laws import Laws, fresh
from policies.loops.rules import Rule, Supply


class Fresh(Rule):
    """n_real new real samples and n_synthetic new synthetic ones."""

    names = ("fresh",)
    supplied = effective = simulated = True

    def contradiction(self) -> str | None:
        """A fixed real set."""
        if self.real_supply != "fixed":
            return None
        return "rule fresh draws new real data: for the same real set each time use rule=augmentation"

    @property
    def supply(self) -> Supply:
        """Unseen samples, if nothing else is set."""
        return self.real_supply or "fresh"

    def gaussian_law(self, generations: int, dimension: int, how: Mapping[str, Any]) -> Laws:
        """Known for any sizes."""
        n_real, n_synthetic = zip(*self.later_sizes(generations), strict=True)
        return fresh(**how, n_ini=self.initial(), n_real=n_real, n_synthetic=n_synthetic)

    def fresh_supplies(self) -> tuple[Supply, ...]:
        """Its own."""
        return (self.supply,)
