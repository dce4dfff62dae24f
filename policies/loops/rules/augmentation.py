"""Synthetic augmentation: the same real set every time, beside samples of the previous generation, or of all."""

from typing import Literal

from pydantic import Field

from policies.loops.laws import Covariance, Laws, accumulate, augmentation
from policies.loops.rules import Rule, first_of


class Augmentation(Rule):
    """n_real fixed real samples and n_synthetic new ones. Of ``all`` generations it is accumulation (MAD, on faces)."""

    names = ("augmentation",)

    synthetic_from: Literal["previous", "all"] = Field("previous", description="augmentation: which generations")

    def contradiction(self) -> str | None:
        """A fresh fraction."""
        if self.fresh_fraction is None:
            return None
        return "rule augmentation uses the same real set every time: give n_real, not fresh_fraction"

    @property
    def accumulates(self) -> bool:
        """If synthetic samples are of all generations."""
        return self.synthetic_from == "all"

    def first_size(self) -> int:
        """The real set."""
        return first_of(self.n_real, 0) if self.fresh_fraction is None else super().first_size()

    def gaussian_law(self, generations: int, dimension: int, covariance: Covariance) -> Laws:
        """If generation 1 has the same real set."""
        if (n_synthetic := self.once(generations)) is None:
            return {}
        how = {"generations": generations, "n_synthetic": n_synthetic}
        bias = self.sampling_bias
        if self.accumulates:
            return accumulate(n_ini=self.initial(), sampling_bias=bias, covariance=covariance, **how)
        return augmentation(n_real=self.initial(), sampling_bias=bias, covariance=covariance, **how)
