"""The control: every generation is trained on the first one's real set."""

from policies.loops.laws import Covariance, Laws, real_only
from policies.loops.rules import Rule
from policies.loops.training_sets import Ledger, Part


class RealOnly(Rule):
    """The same real samples every time."""

    names = ("real_only",)

    def is_sized_by(self, given: object) -> bool:
        """Never: the size is n_ini."""
        return False

    def missing(self) -> str | None:
        """n_ini."""
        return None if self.n_ini is not None else "n_ini"

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """n_ini, and nothing else."""
        return self.initial(), 0

    def parts(self, generation: int, generations: int, ledger: Ledger) -> tuple[list[Part], Ledger]:
        """The one real set."""
        part, ledger = ledger.fixed(self.initial())
        return [part], ledger

    def gaussian_law(self, generations: int, dimension: int, covariance: Covariance) -> Laws:
        """That of a first generation, at every one."""
        return real_only(
            generations=generations,
            n_ini=self.initial(),
            dimension=dimension,
            covariance=covariance,
            sampling_bias=self.sampling_bias,
        )
