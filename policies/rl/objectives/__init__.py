"""Objectives: what a step of learning minimises, a class each; the learner knows none of them by name.

Importable without torch, which is imported where it is needed.
"""

from typing import TYPE_CHECKING, ClassVar

from policies.common.user_code import Named, Registry

if TYPE_CHECKING:
    from policies.rl.rollouts import Objective, Rollouts
    from policies.rl.settings import TrainingSettings


class Algorithm(Named):
    """What learner and settings have to know of an objective, and the objective itself."""

    on_forward_process: ClassVar[bool] = False  # images are noised anew, instead of going back the way they came
    on_policy: ClassVar[bool] = False  # only the weights that drew the images may learn from them
    clips_ratio: ClassVar[bool] = False  # the statistics of its ratio are metrics
    average_draws: ClassVar[bool] = False  # samplers draw with the average over steps, where there is one

    @classmethod
    def objective(cls, rollouts: "Rollouts", settings: "TrainingSettings") -> "Objective":
        """The loss of a step's transitions."""
        raise NotImplementedError


# Settings are checked by what an objective is, and another person's run must not import: so none is named by its path.
ALGORITHMS = Registry(Algorithm, __name__, "ouroboros.objectives", "training.objective", by_path=False)
