"""Samplers draw images. An image is a function of (weights version, prompt, seed), never of the sampler."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray import ObjectRef

from actors.placement import Placed
from actors.pool import Pool
from actors.worker import Worker
from pipelines.rl.trajectory import Trajectory
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings

_COMPARED = 16  # images whose denoising is compared with the base model's


class DamagedWeightsError(RuntimeError):
    """A sampler was sent other weights than the learner made."""


@dataclass(frozen=True)
class WeightReceipt:
    """A sampler's receipt for new weights."""

    checksum: str
    changed_tensors: int


@dataclass(frozen=True)
class PolicyVersion:
    """The weights that samplers are to draw with. Version 0 is what the model's files hold, and is not sent; −v is the
    average of the versions up to v."""

    version: int = 0
    checksum: str = ""
    weights: Any = None  # an ObjectRef


@dataclass
class Chunk:
    """Some images of a step on their way through the actors: object references, never the data. Each stage adds the
    reference of what it will have made."""

    prompts: list[str]
    seeds: list[int]
    images: ObjectRef
    trajectory: ObjectRef
    drawn_with: Any = None  # the PolicyVersion: kept, as a sampler that was started again asks for its weights
    captions: ObjectRef | None = None
    scores: dict[str, ObjectRef] = field(default_factory=dict)  # by the reward's name
    verdicts: ObjectRef | None = None


class Sampler(Worker):
    """The actor: a diffusion pipeline and the version of its weights."""

    def __init__(self, model: ModelSettings, sampling: SamplingSettings, device: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.rl.policy import DiffusionPolicy

        self.policy = DiffusionPolicy(model, sampling, device)
        self.version: int | None = 0  # None: parts of two
        self._broadcast: Any = None

    def link(self, outline: dict[str, Any], rank: int, host: str, port: int, *how: Any) -> bool:
        """Join a broadcast of the learner's weights, which are as in ``outline``. Returns whether that worked."""
        from policies.rl.broadcast import joined

        self._broadcast, self._outline = joined(host, port, rank, *how), outline
        return self._broadcast is not None

    def receive(self, source: PolicyVersion, meeting: tuple[str, int]) -> WeightReceipt | None:
        """Take new weights as the learner sends them. None: a process of the broadcast that met at ``meeting`` is gone,
        this one's own may be that. Raises DamagedWeightsError if others arrived than left."""
        import torch

        from pipelines.rl.weights import portions
        from policies.rl.broadcast import BroadcastLostError, leave

        if self._broadcast is None:
            leave(*meeting)
            return None
        self.version, changed = None, 0
        outline = self._outline.items()
        empty = {name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, (kind, shape) in outline}
        try:
            for names in portions({name: each.nbytes for name, each in empty.items()}):
                tensors = {name: torch.empty_like(empty[name], device=self.policy.device) for name in names}
                if not self._broadcast.transfer(tensors.values()):
                    raise DamagedWeightsError(f"weights version {source.version} arrived otherwise than they left")
                changed += self.policy.load(tensors)
        except BroadcastLostError:
            self._broadcast = None
            return None
        self.version = source.version
        return WeightReceipt(source.checksum, changed)

    def set_weights(self, version: int, weights: dict[str, np.ndarray]) -> WeightReceipt:
        """Take new weights. The checksum is computed here, from what arrived."""
        from pipelines.rl.weights import checksum

        changed = self.policy.load(weights)
        self.version = version
        return WeightReceipt(checksum(weights), changed)

    def rollout(
        self, source: PolicyVersion, prompts: list[str], seeds: list[int], sampling: SamplingSettings
    ) -> tuple[np.ndarray, Trajectory]:
        """Images (batch, height, width, 3) uint8 and their trajectory, drawn by exactly ``source.version``.

        A sampler that was started again fetches these weights first. Raises DamagedWeightsError if they are others.
        """
        self._take(source)
        return self.policy.by(sampling).rollout(prompts, seeds, source.version)

    def divergence(self, source: PolicyVersion, trajectory: Trajectory) -> np.ndarray:
        """How far ``source``, which drew the trajectory, is from the base model: KL of the first images (≤ 16,) in
        nats an image. Raises DamagedWeightsError as :meth:`rollout` does."""
        self._take(source)
        return self.policy.divergence(trajectory.first(_COMPARED))

    def _take(self, source: PolicyVersion) -> None:
        """Hold exactly ``source``: a sampler that was started again holds the model's files, whatever it was sent."""
        if source.version != self.version:
            receipt = self.set_weights(source.version, ray.get(source.weights))
            if receipt.checksum != source.checksum:
                raise DamagedWeightsError(f"weights version {source.version} came with another checksum than it left")

    def _insides(self) -> list[tuple[Any, str, str]]:
        import torch

        policy = self.policy
        return [
            (policy, "embed", "prompts"),
            (policy, "predict", "network"),
            (torch, "randn", "noise"),
            (policy.family, "step", "scheduler"),
            (type(policy.schedule), "log_prob", "log-probability"),
            (policy, "decode", "decoding"),
            (torch.Tensor, "cpu", "transfer"),
        ]


class Samplers(Pool):
    """All samplers. Work is cut into chunks of a fixed size, so who draws what changes no bit."""

    def __init__(self, placed: Placed, model: ModelSettings, sampling: SamplingSettings, images_per_call: int) -> None:
        super().__init__(placed, Sampler, model, sampling)
        self.sampling, self.images_per_call = sampling, images_per_call
        self.policy = PolicyVersion()

    def rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingSettings | None = None
    ) -> list[Chunk]:
        """One image for each (prompt, seed), in order, as chunks still being drawn: to learn from, or by other settings
        of ``sampling``."""
        chunks, sampling = [], sampling or self.sampling.at(self.policy.version)
        for start in range(0, len(prompts), self.images_per_call):
            part = slice(start, start + self.images_per_call)
            work = list(prompts[part]), list(seeds[part])
            images, trajectory = self.submit("rollout", self.policy, *work, sampling, returns=2)
            chunks.append(Chunk(*work, images, trajectory, self.policy))
        return chunks

    def link(self, outline: dict[str, Any], host: str, port: int, *how: Any) -> list[ObjectRef]:
        """Have all join a broadcast of the learner's."""
        self._meeting, members = (host, port), range(len(self.members))
        return [self._call(each, "link", (outline, each + 1, host, port, *how), 1) for each in members]

    def update_weights(
        self, published: PolicyVersion, linked: bool = False, to: Iterable[int] | None = None
    ) -> list[ObjectRef]:
        """Send new weights to every sampler, or some, by the object store, or have them taken from the learner. Work
        submitted from now on asks for this version, that before it for its own: a sampler takes up what it was given in
        order."""
        self.policy = published
        if linked:
            return self.everyone("receive", published, self._meeting)
        members = range(len(self.members)) if to is None else to
        return [self._call(each, "set_weights", (published.version, published.weights), 1) for each in members]
