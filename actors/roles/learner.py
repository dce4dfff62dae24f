"""The learner turns scored trajectories into new weights."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from actors.placement import Placed
from actors.pool import Pool
from actors.worker import Worker
from pipelines.rl.trajectory import Trajectory
from pipelines.settings import ModelSettings
from pipelines.storage.checkpoint import WeightsKind
from pipelines.storage.tensor_files import PART, Outline
from policies.rl.ratio import RatioBound
from policies.rl.settings import SamplingSettings, TrainingSettings

Weights = dict[str, np.ndarray]


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

    def find_ratio_bound(self, prompts: list[str]) -> RatioBound:
        """How exactly log-probabilities are to be those of a sampler's call: part of the run's manifest."""
        return self.learner.find_ratio_bound(prompts)

    def take_ratio_bound(self, bound: RatioBound) -> None:
        """Hold a run to what was found when it began."""
        self.learner.take_ratio_bound(bound)

    def learn(self, advantage: np.ndarray, seed: int, *parts: Trajectory) -> tuple[Update, Weights]:
        """One step's updates from the chunks' trajectories, in order, and ``advantage`` (images,)."""
        statistics, changed = self.learner.learn(parts, advantage, seed)
        return self._sent(self.learner.weights(), self.learner.weights_version, changed, asdict(statistics))

    def weights(self, kind: WeightsKind) -> tuple[Update, Weights]:
        """Some of the weights, as they are."""
        return self._sent(self.learner.weights(kind), self.learner.weights_version - (kind == "previous"), 0, {})

    def checksum(self, kind: WeightsKind) -> str:
        """That of :meth:`weights`, which stay."""
        from pipelines.rl.weights import checksum

        return checksum(self.learner.weights(kind))

    def outline(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each of :meth:`weights`."""
        with self.learner.exported("current") as tensors:
            return {name: (str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()}

    def link(self, host: str, port: int, size: int, device: str, timeout: float) -> bool:
        """Join a broadcast of the first learner to the samplers. Returns whether that is so."""
        from policies.rl.broadcast import joined

        self._broadcast = None if self.group.rank else joined(host, port, 0, size, device, timeout)
        return self._broadcast is not None

    def send(self, kind: WeightsKind) -> None:
        """Give some of the weights to the samplers, which :meth:`Sampler.receive` them, as long as none is lost."""
        from pipelines.rl.weights import portions
        from policies.rl.broadcast import BroadcastLostError

        with self.learner.exported(kind) as tensors:
            if self._broadcast is None:
                return
            try:
                for names in portions({name: each.nbytes for name, each in tensors.items()}):
                    self._broadcast.transfer(tensors[name] for name in names)
            except BroadcastLostError:
                self._broadcast = None

    def state_outline(self) -> tuple[Outline, int]:
        """What another learner goes on from: its arrays, which :meth:`state_part` gives, and the weights' version."""
        return self.learner.state_outline()

    def state_part(self, names: list[str]) -> list[np.ndarray]:
        """Some of the state."""
        return self.learner.state_part(names)

    def restore_part(self, tensors: Weights) -> None:
        """Take some of a state."""
        self.learner.restore_part(tensors)

    def restored(self, weights_version: int) -> None:
        """Go on from a state, all of which was taken."""
        self.learner.restored(weights_version)

    def pipeline(self) -> dict[str, int]:
        """Write a diffusers directory of the current weights, LoRA merged, and lay it by for :meth:`pipeline_part`: its
        files and their sizes; of the first learner, others none."""
        self._saved = TemporaryDirectory()
        self.learner.save(self._saved.name)
        files = sorted(path for path in Path(self._saved.name).rglob("*") if path.is_file())
        return {path.relative_to(self._saved.name).as_posix(): path.stat().st_size for path in files}

    def pipeline_part(self, name: str, start: int) -> bytes:
        """:data:`PART` bytes of one of the files, or what is left of it. A file is gone with its last part."""
        path = Path(self._saved.name, name)
        if self.group.rank:
            return b""
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(PART)
        if start + len(part) >= path.stat().st_size:
            path.unlink()
        return part

    def _insides(self) -> list[tuple[Any, str, str]]:
        import torch

        from pipelines.rl import weights as trainable

        names = {"_rollouts": "gathering", "_replay": "replay", "weights": "weights out"}
        return [
            *((self.learner, name, what) for name, what in names.items()),
            (self.learner.policy, "predict", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "clipping"),
            (self.learner.learner.optimizer, "step", "optimiser"),
            (torch, "equal", "checks"),
            (trainable, "checksum", "checks"),
            (trainable, "copied", "copies"),
        ]

    def _sent(self, weights: Weights, version: int, changed: int, statistics: dict[str, Any]) -> tuple[Update, Weights]:
        """All learners have the same weights, or none goes on; the first one's travel."""
        from pipelines.rl.weights import checksum

        digest = checksum(weights)
        self.group.check_same(digest)
        return Update(version, digest, changed, statistics), {} if self.group.rank else weights


class Learner(Pool):
    """The learner's handle: all ranks receive the same call and answer the same; rank 0's answer is used.

    Their work follows from all that they did before: a run that loses one of them goes back to the last commit.
    """

    RESTARTS = 0

    def __init__(self, placed: Placed, timeout: float, *arguments: Any) -> None:
        """Every member is a :class:`LearnerActor` of ``arguments``; they look for one another for ``timeout`` seconds
        at most."""
        role, meetings = placed.role, []
        if role.count > 1:
            from policies.rl.group import meeting_place

            self._store = store = meeting_place(ray.util.get_node_ip_address())  # for as long as they may look for it
            members = range(role.count)
            meetings = [(store.host, store.port, number, role.count, role.device, timeout) for number in members]
        super().__init__(placed, LearnerActor, *arguments, own=meetings)
