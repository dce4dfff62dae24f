"""What a sampler hands to the learner: everything that was scored, stored exactly as it was scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trajectory:
    """The denoising of some images.

    ``latents`` (batch, steps + 1, channels, height, width), from pure noise to the final latents, in the type of the
    network, as :func:`pipelines.rl.weights.to_numpy` has it; ``log_probs`` (batch, steps) float64 in nats, NaN where a
    step is deterministic; ``weights_version``: of the weights that drew them.
    """

    prompts: list[str]
    seeds: list[int]
    latents: np.ndarray
    log_probs: np.ndarray
    weights_version: int

    def first(self, images: int) -> "Trajectory":
        """That of the first so many images."""
        cut = slice(images)
        return Trajectory(
            self.prompts[cut], self.seeds[cut], self.latents[cut], self.log_probs[cut], self.weights_version
        )

    @staticmethod
    def concatenate(parts: Sequence["Trajectory"]) -> "Trajectory":
        """One trajectory of all images, in order. Raises ValueError if they were drawn by different weights."""
        version = version_of(parts)
        return Trajectory(
            [prompt for part in parts for prompt in part.prompts],
            [seed for part in parts for seed in part.seeds],
            np.concatenate([part.latents for part in parts]),
            np.concatenate([part.log_probs for part in parts]),
            version,
        )


def version_of(parts: Sequence[Trajectory]) -> int:
    """Of the weights that drew them all. Raises ValueError if there were several."""
    versions = {part.weights_version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"trajectories of different weights were mixed: versions {sorted(versions)}")
    return versions.pop()
