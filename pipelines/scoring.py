"""Rewards of docs/rewards.md where there are no actors: in a task, images are captioned and scored in one process."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.rewards import load_reward, score
from pipelines.settings import CaptionerSettings, RewardSettings
from policies.rl.advantages import weighted_sum

_BATCH = 128


class Scorer:
    """A reward, with the captioner that it needs; ``captioner`` is a loaded one, or a path."""

    def __init__(self, reward: RewardSettings, captioner: Any, device: str = "cpu") -> None:
        self.reward = reward
        self.captioner = captioner
        self.functions = {name: load_reward(name, reward.functions[name], device) for name in reward.weights}
        if isinstance(captioner, str):
            from pipelines.captioner import Captioner

            self.captioner = Captioner(CaptionerSettings(path=captioner), device)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """The reward (n,) of ``images`` (n, height, width, 3) uint8. Raises RewardError, DegenerateBatch."""
        captions = None if self.captioner is None else captioned(self.captioner, images)
        scores = {name: score(function, images, prompts, captions) for name, function in self.functions.items()}
        return weighted_sum(scores, self.reward.weights)


def captioned(captioner: Any, images: np.ndarray) -> list[str]:
    """What a loaded captioner sees in ``images`` (n, height, width, 3) uint8, batch by batch."""
    starts = range(0, len(images), _BATCH)
    return [text for start in starts for text in captioner.caption(images[start : start + _BATCH])]


def agreement(captions: Sequence[str], prompts: Sequence[str]) -> float:
    """How much captions have of their prompts' words: the mean F1 of the two bags of words, 1 where they are equal."""
    found = []
    for caption, prompt in zip(captions, prompts, strict=True):
        said, asked = caption.lower().split(), prompt.lower().split()
        common = sum(min(said.count(word), asked.count(word)) for word in set(asked))
        found.append(2 * common / max(1, len(said) + len(asked)))
    return float(np.mean(found))
