"""Samplers draw images. An image is a function of (weights version, prompt, seed), never of the sampler."""

from collections.abc import Sequence
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
        self.version = 0

    def set_weights(self, version: int, weights: dict[str, np.ndarray]) -> WeightReceipt:
        """Take new weights. The checksum is computed here, from what arrived."""
        from pipelines.rl.weights import checksum

        changed = self.policy.load(weights)
        self.version = version
        return WeightReceipt(checksum(weights), changed)

    def rollout(self, source: PolicyVersion, prompts: list[str], seeds: list[int]) -> tuple[np.ndarray, Trajectory]:
        """Images (batch, height, width, 3) uint8 and their trajectory, drawn by exactly ``source.version``.

        A sampler that was started again fetches these weights first. Raises DamagedWeightsError if they are others.
        """
        self._take(source)
        return self.policy.rollout(prompts, seeds, source.version)

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
        self.images_per_call = images_per_call
        self.policy = PolicyVersion()

    def rollout(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Chunk]:
        """One image for each (prompt, seed), in order, as chunks still being drawn."""
        chunks = []
        for start in range(0, len(prompts), self.images_per_call):
            part = slice(start, start + self.images_per_call)
            work = list(prompts[part]), list(seeds[part])
            images, trajectory = self.submit("rollout", self.policy, *work, returns=2)
            chunks.append(Chunk(*work, images, trajectory, self.policy))
        return chunks

    def update_weights(self, published: PolicyVersion) -> list[ObjectRef]:
        """Send new weights to every sampler. Work submitted from now on asks for this version, that before it for its
        own: a sampler takes up what it was given in order."""
        self.policy = published
        return self.everyone("set_weights", published.version, published.weights)
