"""Synthetic augmentation: the same real set every time, beside samples of the previous generation."""

from policies.loops.rules import Rule


class Augmentation(Rule):
    """n_real fixed real samples and n_synthetic new ones. With samples of all generations it is ``accumulate``."""

    names = ("augmentation",)
    same_real = real_first = mixed = True
