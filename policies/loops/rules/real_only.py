"""The control: every generation is trained on the first one's real set."""

from policies.loops.laws import How, Laws, real_only
from policies.loops.rules import Rule
from policies.loops.training_sets import Ledger, Part


class RealOnly(Rule):
    """The same real samples every time."""

    names = ("real_only",)
    needs_one = ("n_ini",)
    sized_by = 3

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """n_ini, and nothing else."""
        return self.initial(), 0

    def parts(self, generation: int, generations: int, ledger: Ledger) -> list[Part]:
        """The one real set."""
        return [ledger.fixed(self.initial())]

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """That of a first generation, at every one."""
        return real_only(**how, n_ini=self.initial(), dimension=dimension)
