"""Independent random streams: a seed is a function of (run seed, stream name, position), never of a worker or a clock.

Resuming, retrying and resharding therefore need no generator state: every worker derives the same seed.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def derive_seed(run_seed: int, stream: str, *position: int) -> int:
    """A 63-bit seed for one position of one named stream, e.g. ``derive_seed(0, "sampling", step, index)``."""
    text = "/".join([str(run_seed), stream, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def streams(seeds: Sequence[int], stream: str, *position: int) -> list[np.random.Generator]:
    """One position of a stream, of each of several runs."""
    return [np.random.default_rng(derive_seed(seed, stream, *position)) for seed in seeds]


class PromptSchedule:
    """Which prompts a step draws: every prompt once in random order, then all again in a new order.

    A pure function of the step, so a resumed run needs no cursor.
    """

    def __init__(self, prompts: Sequence[str], per_step: int, run_seed: int) -> None:
        self.prompts = list(prompts)
        self.per_step = per_step
        self.run_seed = run_seed

    def batch(self, step: int) -> list[str]:
        """The ``per_step`` prompts of a step (steps count from 0)."""
        return [self._at(step * self.per_step + offset) for offset in range(self.per_step)]

    def _at(self, position: int) -> str:
        epoch, index = divmod(position, len(self.prompts))
        order = np.random.default_rng(derive_seed(self.run_seed, "prompts", epoch)).permutation(len(self.prompts))
        return self.prompts[order[index]]
