"""Iterative retraining: a generation goes on from the last one's weights (Bertrand et al., 2310.00429)."""

from policies.loops.rules import Rule


class IterativeRetraining(Rule):
    """The same real set every time, beside samples of the previous generation, from whose weights training starts (a
    closed form has none, so that its law is augmentation's)."""

    names = ("iterative_retraining",)
    fine_tunes = real_first = mixed = True
