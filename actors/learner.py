"""The learner turns scored trajectories into new weights."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import ObjectRef

from actors.placement import Seats
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker
from pipelines.atomic import Files
from pipelines.families.registry import packed
from pipelines.settings import ModelSettings
from pipelines.trajectory import Trajectory
from policies.settings import SamplingSettings, TrainingSettings


@dataclass(frozen=True)
class Update:
    """What a step of learning did. The weights travel beside it, as an object of their own."""

    version: int
    checksum: str
    changed_tensors: int
    statistics: dict[str, Any]


class LearnerActor(Worker):
    """The actor: a UNet in training and its optimiser."""

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        device: str,
        threads: int,
    ) -> None:
        super().__init__(threads)
        from pipelines.learning import DiffusionLearner

        self.learner = DiffusionLearner(model, sampling, training, seed, device)

    def micro_batch(self) -> int:
        """Transitions a network call, as found or given: part of the run's manifest."""
        return self.learner.micro_batch

    def learn(self, advantage: np.ndarray, seed: int, *parts: Trajectory) -> tuple[Update, dict[str, np.ndarray]]:
        """One step's updates from the chunks' trajectories, in order, and ``advantage`` (images,)."""
        statistics, changed = self.learner.learn(Trajectory.concatenate(parts), advantage, seed)
        return self._update(self.learner.weights(), changed, dataclasses.asdict(statistics))

    def current(self) -> tuple[Update, dict[str, np.ndarray]]:
        """The weights to draw with, as they are."""
        return self._update(self.learner.weights(), 0, {})

    def averaged(self) -> tuple[Update, dict[str, np.ndarray]]:
        """The weights to evaluate and to save: their average over steps, if there is one."""
        return self._update(self.learner.averaged_weights(), 0, {})

    def state(self) -> Any:
        """A :class:`pipelines.learning.LearnerState`."""
        return self.learner.state()

    def restore(self, state: Any) -> None:
        """Go on from a state."""
        self.learner.restore(state)

    def pipeline(self) -> Files:
        """The files of a diffusers directory of the current weights, LoRA merged."""
        return packed(self.learner.save)

    def _update(
        self, weights: dict[str, np.ndarray], changed: int, statistics: dict[str, Any]
    ) -> tuple[Update, dict[str, np.ndarray]]:
        from pipelines.trainable import checksum

        return Update(self.learner.weights_version, checksum(weights), changed, statistics), weights


class Learner(Pool):
    """The learner's handle: one member today, whatever grows behind it tomorrow.

    Its work follows from all that it did before: a run that loses it goes back to the last commit.
    """

    RESTARTS = 0

    def __init__(
        self,
        seats: Seats,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
    ) -> None:
        super().__init__(seats, LearnerActor, model, sampling, training, seed, seats.role.device, seats.role.threads)

    def learn(self, chunks: Sequence[Chunk], advantage: np.ndarray, seed: int) -> tuple[ObjectRef, ObjectRef]:
        """References of the :class:`Update` and of the new weights."""
        return tuple(self.submit("learn", advantage, seed, *(chunk.trajectory for chunk in chunks), returns=2))

    def current(self) -> tuple[ObjectRef, ObjectRef]:
        """References of an :class:`Update` that changed nothing and of the present weights."""
        return tuple(self.submit("current", returns=2))

    def averaged(self) -> tuple[ObjectRef, ObjectRef]:
        """The same of what is evaluated and saved."""
        return tuple(self.submit("averaged", returns=2))
