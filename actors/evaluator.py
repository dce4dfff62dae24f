"""The evaluator judges held-out images. It takes no part in the reward and never sees training."""

from collections.abc import Sequence

import numpy as np

from actors.placement import Seats
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker


class EvaluatorActor(Worker):
    """The actor: an independent classifier of what the prompts ask for."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.evaluator import load_evaluator
        from pipelines.locations import resolve_model

        self.evaluator = load_evaluator(resolve_model(path))

    def judge(self, images: np.ndarray, prompts: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Which slots of its prompt each image fulfils (bool arrays), and what was seen in each slot (words)."""
        return self.evaluator.judge(images, prompts), self.evaluator.slots(images)


class Evaluators(Pool):
    """The evaluator's pool."""

    def __init__(self, seats: Seats, path: str) -> None:
        super().__init__(seats, EvaluatorActor, path, seats.role.threads)

    def judge(self, chunks: Sequence[Chunk]) -> None:
        """Judge every chunk as soon as it is drawn."""
        for chunk in chunks:
            chunk.verdicts = self.submit("judge", chunk.images, chunk.prompts)
