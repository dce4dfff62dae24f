"""Rewards: how good an image is for its prompt."""

import time
from collections.abc import Sequence

import numpy as np

from actors.placement import Seats
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker
from pipelines.settings import RewardSettings

_PAUSES = 0.5, 2.0  # seconds before a function that failed is asked again; what it asks may be away for a moment


class RewardActor(Worker):
    """The actor: a reward function and whatever model it holds."""

    def __init__(self, settings: RewardSettings, threads: int) -> None:
        super().__init__(threads, uses_torch=settings.needs_captions)  # for the encoder; another may do without
        from pipelines.rewards import load_reward

        self.function = load_reward(settings)

    def score(self, images: np.ndarray, prompts: list[str], captions: list[str] | None) -> np.ndarray:
        """Scores (batch,) float64. Nothing is scored as zero: a function that fails is asked again, a few times.

        Raises RewardError with its last reason, or SickNumbers.
        """
        from pipelines.rewards import RewardError, score

        for pause in _PAUSES:
            try:
                return score(self.function, images, prompts, captions)
            except RewardError:
                time.sleep(pause)
        return score(self.function, images, prompts, captions)


class Rewards(Pool):
    """All reward actors."""

    def __init__(self, seats: Seats, settings: RewardSettings) -> None:
        super().__init__(seats, RewardActor, settings, seats.role.threads)

    def score(self, chunks: Sequence[Chunk]) -> None:
        """Score every chunk as soon as it is drawn and captioned, while the next is still being drawn."""
        for chunk in chunks:
            chunk.scores = self.submit("score", chunk.images, chunk.prompts, chunk.captions)
