"""The learner turns scored trajectories into new weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray import ObjectRef

from actors.placement import Placed
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker
from pipelines.rl.trajectory import Trajectory
from pipelines.settings import ModelSettings
from pipelines.storage.atomic import Files, packed
from pipelines.storage.checkpoint import LearnerState, WeightsKind
from policies.rl.settings import SamplingSettings, TrainingSettings


@dataclass(frozen=True)
class Update:
    """What a step of learning did. The weights travel beside it, as an object of their own."""

    version: int
    checksum: str
    changed_tensors: int
    statistics: dict[str, Any]


class LearnerActor(Worker):
    """The actor: a network in training and its optimiser, or one of several that make each update together."""

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        device: str,
        threads: int,
        meeting: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(threads)
        from pipelines.rl.learning import DiffusionLearner
        from policies.rl.group import Group

        self.group = Group.join(*meeting) if meeting else Group()
        self.learner = DiffusionLearner(model, sampling, training, seed, device, self.group)

    def micro_batch(self) -> int:
        """Transitions a network call, as found or given: part of the run's manifest."""
        return self.learner.micro_batch

    def learn(self, advantage: np.ndarray, seed: int, *parts: Trajectory) -> tuple[Update, dict[str, np.ndarray]]:
        """One step's updates from the chunks' trajectories, in order, and ``advantage`` (images,)."""
        statistics, changed = self.learner.learn(Trajectory.concatenate(parts), advantage, seed)
        weights, version = self.learner.weights(), self.learner.weights_version
        return self._update(weights, changed, asdict(statistics), version)

    def weights(self, kind: WeightsKind) -> tuple[Update, dict[str, np.ndarray]]:
        """Some of the weights, as they are."""
        return self._update(self.learner.weights(kind), 0, {}, self.learner.weights_version - (kind == "previous"))

    def state(self) -> LearnerState:
        """What another learner goes on from."""
        return self.learner.state()

    def restore(self, state: LearnerState) -> None:
        """Go on from a state."""
        self.learner.restore(state)

    def pipeline(self) -> Files:
        """The files of a diffusers directory of the current weights, LoRA merged; of the first learner, others none."""
        return packed(self.learner.save)

    def _insides(self) -> list[tuple[Any, str, str]]:
        import torch

        from pipelines.rl import learning
        from pipelines.rl import weights as trainable

        return [
            (Trajectory, "concatenate", "gathering"),
            (self.learner, "_rollouts", "gathering"),
            (self.learner, "_replay", "replay"),
            (self.learner.policy, "predict", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "clipping"),
            (self.learner.learner.optimizer, "step", "optimiser"),
            (torch, "equal", "checks"),
            (self.learner, "weights", "weights out"),
            (trainable, "checksum", "checks"),
            (learning, "copied", "copies"),
        ]

    def _update(
        self, weights: dict[str, np.ndarray], changed: int, statistics: dict[str, Any], version: int
    ) -> tuple[Update, dict[str, np.ndarray]]:
        from pipelines.rl.weights import checksum

        digest = checksum(weights)
        self.group.check_same(digest)
        return Update(version, digest, changed, statistics), {} if self.group.rank else weights  # the first's travel


class Learner(Pool):
    """The learner's handle: members that are all told the same and answer the same, and of whom the first is heard.

    Their work follows from all that they did before: a run that loses one of them goes back to the last commit.
    """

    RESTARTS = 0

    def __init__(
        self,
        placed: Placed,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        timeout: float,
    ) -> None:
        role, meetings = placed.role, []
        if role.count > 1:
            from policies.rl.group import meeting_place

            self._store = store = meeting_place(ray.util.get_node_ip_address())  # for as long as they may look for it
            members = range(role.count)
            meetings = [(store.host, store.port, number, role.count, role.device, timeout) for number in members]
        super().__init__(placed, LearnerActor, model, sampling, training, seed, own=meetings)

    def learn(self, chunks: Sequence[Chunk], advantage: np.ndarray, seed: int) -> tuple[list[ObjectRef], ObjectRef]:
        """References of every member's :class:`Update`, and of the new weights."""
        return self._together("learn", advantage, seed, *(chunk.trajectory for chunk in chunks))

    def weights(self, kind: WeightsKind) -> tuple[list[ObjectRef], ObjectRef]:
        """References of every member's :class:`Update` that changed nothing, and of some of the weights."""
        return self._together("weights", kind)

    def _together(self, method: str, *arguments: Any) -> tuple[list[ObjectRef], ObjectRef]:
        updates, weights = zip(*self.everyone(method, *arguments, returns=2), strict=True)
        return list(updates), weights[0]
