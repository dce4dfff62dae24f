"""Synthetic augmentation: the same real set every time, beside samples of the previous generation, or of all."""

from typing import Literal

from pydantic import Field

from policies.loops.rules import Rule


class Augmentation(Rule):
    """n_real fixed real samples and n_synthetic new ones. Of ``all`` generations it is accumulation (MAD, on faces)."""

    names = ("augmentation",)
    same_real = real_first = mixed = True

    synthetic_from: Literal["previous", "all"] = Field("previous", description="augmentation: which generations")

    @property
    def accumulates(self) -> bool:
        """If synthetic samples are of all generations."""
        return self.synthetic_from == "all"
