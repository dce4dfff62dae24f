"""The bare network: what the arithmetic of a step costs with nothing around it, in calls of the best size."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import prepare
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings


@dataclass(frozen=True)
class Seconds:
    """CPU and wall time of some work."""

    cpu: float
    wall: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.cpu + other.cpu, self.wall + other.wall)


def timed(work: Callable[[], object]) -> Seconds:
    """Time one call in this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


class Floor:
    """Forward passes for ``images`` × ``steps``, and forward + backward passes for as many transitions, of which
    ``transitions`` belong to one update. LoRA is counted as W + BA."""

    def __init__(self, model: ModelSettings, sampling: SamplingSettings, images: int, transitions: int) -> None:
        self._drawing, self._learning = DiffusionPolicy(model, sampling), DiffusionPolicy(model, sampling)
        prepare(self._learning.network, model)
        self._twice = 2 if sampling.guidance_scale > 1 else 1
        self._work = images * sampling.calls
        # No call can be larger than what there is to do at once.
        self.sampling_call = self._best([images // 4, images // 2, images], self._sample)
        self.learning_call = self._best([transitions // 4, transitions // 2, transitions], self._learn)

    def sampling(self) -> Seconds:
        """Forward passes alone."""
        return timed(lambda: self._sample(self.sampling_call, self._work))

    def learning(self) -> Seconds:
        """Forward and backward passes."""
        return timed(lambda: self._learn(self.learning_call, self._work))

    def _best(self, sizes: list[int], work: Callable[[int, int], None]) -> int:
        count = 2 * max(sizes)
        work(sizes[-1], count)
        return min(sizes, key=lambda size: min(timed(lambda: work(size, count)).cpu for _ in range(3)))

    @torch.no_grad()
    def _sample(self, size: int, count: int) -> None:
        for inputs in self._inputs(self._drawing, size, count):
            self._drawing.network(*inputs, return_dict=False)

    def _learn(self, size: int, count: int) -> None:
        for inputs in self._inputs(self._learning, size, count):
            self._learning.network(*inputs, return_dict=False)[0].sum().backward()
        self._learning.network.zero_grad(set_to_none=True)

    def _inputs(self, policy: DiffusionPolicy, size: int, count: int) -> list[tuple[torch.Tensor, ...]]:
        rows = size * self._twice
        told = policy.embed(["a red seven on a black background"] * rows)["encoder_hidden_states"]
        latents, times = torch.randn(rows, *policy.family.latent_shape), torch.randint(1000, (rows,))
        return [(latents, times, told)] * (count // size)
