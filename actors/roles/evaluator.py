"""The evaluator judges held-out images. It takes no part in the reward and never sees training."""

import numpy as np

from actors.worker import Worker


class EvaluatorActor(Worker):
    """The actor: an independent classifier of what the prompts ask for."""

    def __init__(self, path: str, frames: int, device: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.measures.evaluator import load_evaluator
        from pipelines.storage.locations import resolve_model

        self.evaluator, self.frames = load_evaluator(resolve_model(path), device), frames

    def judge(self, images: np.ndarray, prompts: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Which slots of its prompt each image fulfils (bool arrays), a video if all of its frames do; and what was
        seen in each slot (words), nothing of videos."""
        met = self.evaluator.judge(images, prompts, self.frames)
        return met, self.evaluator.slots(images) if self.frames == 1 else {}
