"""Synthetic augmentation: the same real set every time, beside samples of the previous generation, or of all."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from policies.loops.laws import Laws, accumulate, augmentation
from policies.loops.rules import Rule, first_of


class Augmentation(Rule):
    """n_real fixed real samples and n_synthetic new ones. Of ``all`` generations it is accumulation (MAD, on faces)."""

    names = ("augmentation",)

    synthetic_from: Literal["previous", "all"] = Field("previous", description="augmentation: which generations")

    def contradiction(self) -> str | None:
        """A fresh fraction."""
        problem = "rule augmentation uses the same real set every time: give n_real, not fresh_fraction"
        return None if self.fresh_fraction is None else problem

    @property
    def accumulates(self) -> bool:
        """If synthetic samples are of all generations."""
        return self.synthetic_from == "all"

    def first_size(self) -> int:
        """The real set."""
        return first_of(self.n_real, 0) if self.fresh_fraction is None else super().first_size()

    def gaussian_law(self, generations: int, dimension: int, how: Mapping[str, Any]) -> Laws:
        """If generation 1 has the same real set."""
        if (n_synthetic := self.once(generations)) is None:
            return {}
        if self.accumulates:
            return accumulate(**how, n_ini=self.initial(), n_synthetic=n_synthetic)
        return augmentation(**how, n_real=self.initial(), n_synthetic=n_synthetic)
