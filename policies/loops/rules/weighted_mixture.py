"""Any mixture of old and new real data with the previous generation and those before it."""

from collections import Counter
from dataclasses import replace
from typing import Literal

from pydantic import Field

from policies.loops.rules import Rule, Share
from policies.loops.training_sets import Ledger, Part, largest_remainder, spread

Source = Literal["real_fixed", "real_fresh", "previous", "earlier"]


class WeightedMixture(Rule):
    """``shares`` of N from the fixed real set, new real data, the previous generation, and those before it."""

    names = ("weighted_mixture",)
    needs_one = ("n_total", "n_ini")
    sized_by = 3

    shares: dict[Source, Share] | None = Field(None, description="weighted_mixture: each source's share of n_total")

    def contradiction(self) -> str | None:
        """Shares that do not sum to 1."""
        if self.shares and abs(sum(self.shares.values()) - 1) <= 1e-9:
            return None
        return "rule weighted_mixture needs shares that sum to 1, such as {real_fixed: 0.3, previous: 0.7}"

    def looks_back(self, generations: int) -> int:
        """All of them."""
        return generations

    def parts(self, generation: int, generations: int, ledger: Ledger) -> list[Part]:
        """Whole numbers of samples of every source."""
        shares = {str(source): share for source, share in (self.shares or {}).items()}
        counts = Counter(largest_remainder(self.total(), shares))
        if nothing := [source for source, share in shares.items() if share and not counts[source]]:
            raise ValueError(f"shares.{nothing[0]} of {self.total()} samples rounds to none: raise it, or leave it out")
        real = ledger.fixed(counts["real_fixed"]), ledger.fresh(counts["real_fresh"])
        if generation == 2:  # nothing earlier yet
            drawn = {1: counts["previous"] + counts["earlier"]}
        else:
            drawn = dict(enumerate(spread(counts["earlier"], generation - 2), start=1))
            drawn[generation - 1] = counts["previous"]
        return [*(replace(part, weight=self.real_weight) for part in real), *ledger.anew(drawn)]
