"""The evaluator judges held-out images. It takes no part in the reward and never sees training."""

import numpy as np

from actors.worker import Worker


class EvaluatorActor(Worker):
    """The actor: an independent classifier of what the prompts ask for."""

    def __init__(self, path: str, device: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.measures.evaluator import load_evaluator
        from pipelines.storage.locations import resolve_model

        self.evaluator = load_evaluator(resolve_model(path), device)

    def judge(self, images: np.ndarray, prompts: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Which slots of its prompt each image fulfils (bool arrays), and what was seen in each slot (words)."""
        return self.evaluator.judge(images, prompts), self.evaluator.slots(images)
