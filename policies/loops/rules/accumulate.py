"""Accumulation: every generation is trained on all that came before (Gerstgrasser et al., 2404.01413).

It is the one rule that reads a batch again, which is its definition.
"""

from policies.loops.rules import Rule, first_of


class Accumulate(Rule):
    """The real set and a batch of n_synthetic samples of every earlier generation."""

    names = ("accumulate",)
    same_real = real_first = mixed = True
    needs_one = ("n_ini", "n_real")
    sized_by = 3

    @property
    def accumulates(self) -> bool:
        """By its name."""
        return True

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """Of the real set and of one batch."""
        return first_of(self.n_real, self.initial()), first_of(self.n_synthetic, self.initial())
