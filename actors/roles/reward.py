"""Rewards: how good an image is for its prompt. Every reward function has actors of its own."""

import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from actors.allocation import reward_roles
from actors.placement import Placed
from actors.pool import Pool
from actors.worker import Worker, device_is_lost, is_short_of_memory
from pipelines.precision import in_half
from pipelines.rewards import Reward, load_reward
from pipelines.settings import RewardSettings

_PAUSES = 0.5, 2.0  # seconds before a function that failed is asked again; what it asks may be away for a moment


class RewardActor(Worker):
    """The actor: a reward function and whatever model it holds."""

    def __init__(self, name: str, options: Reward, half: bool, frames: int, device: str, threads: int) -> None:
        super().__init__(threads, uses_torch=options.needs_captions or options.on_gpu)  # another may do without
        self.function = load_reward(name, options, device, frames)
        self.precision = partial(in_half, device, half and options.in_half)

    def score(self, images: np.ndarray, prompts: list[str], captions: list[str] | None) -> np.ndarray:
        """Scores (batch,) float64. Nothing is scored as zero: a function that fails is asked again, a few times.

        Raises RewardError with its last reason, or DegenerateBatch.
        """
        from pipelines.rewards import RewardError, score

        for pause in _PAUSES:
            try:
                with self.precision():
                    return score(self.function, images, prompts, captions)
            except RewardError as failed:
                if is_short_of_memory(failed) or device_is_lost(failed):
                    raise  # more of the same would not help
                time.sleep(pause)
        with self.precision():
            return score(self.function, images, prompts, captions)


def reward_pools(
    placed: Mapping[str, Placed], settings: RewardSettings, half: bool, frames: int = 1
) -> dict[str, Pool]:
    """The actors of every reward function, trained on or held out, with models by names that all nodes understand;
    ``half``: whether these compute in half precision on a card; ``frames``: of a video, if videos are scored."""
    pools = {}
    for (name, options), role in zip(settings.functions.items(), reward_roles(settings), strict=True):
        pools[name] = Pool(placed[role], RewardActor, *options.everywhere(name), half, frames)
    return pools
