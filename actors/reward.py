"""Rewards: how good an image is for its prompt."""

from collections.abc import Sequence

import numpy as np

from actors.placement import Seats
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker
from pipelines.settings import RewardSettings


class RewardActor(Worker):
    """The actor: a reward function and whatever model it holds."""

    def __init__(self, settings: RewardSettings, threads: int) -> None:
        super().__init__(threads)
        from pipelines.rewards import load_reward

        self.function = load_reward(settings)

    def score(self, images: np.ndarray, prompts: list[str], captions: list[str] | None) -> np.ndarray:
        """Scores (batch,) float64. Raises RewardError; nothing is scored as zero."""
        from pipelines.rewards import score

        return score(self.function, images, prompts, captions)


class Rewards(Pool):
    """All reward actors."""

    def __init__(self, seats: Seats, settings: RewardSettings) -> None:
        super().__init__(seats, RewardActor, settings, seats.role.threads)

    def score(self, chunks: Sequence[Chunk]) -> None:
        """Score every chunk as soon as it is drawn and captioned, while the next is still being drawn."""
        for chunk in chunks:
            chunk.scores = self.submit("score", chunk.images, chunk.prompts, chunk.captions)
