"""Rewards into advantages: normalised over all images of a step, wherever they were drawn, prompt by prompt."""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from policies.rl.health import ROUNDING, DegenerateBatch, check_rewards
from policies.rl.settings import AdvantageSettings

_EPSILON = 1e-6  # keeps a prompt whose images all scored the same at advantage 0, not at 0/0


def weighted_sum(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The reward (images,) of several functions' ``scores`` (images,) each; one alone of weight 1 stays as it is.
    Terms that cancel but for rounding are 0."""
    terms = np.array([weight * scores[name] for name, weight in weights.items()])
    total = terms.sum(axis=0)
    return np.where(np.abs(total) < ROUNDING * np.abs(terms).sum(axis=0), 0.0, total)


class PromptStatistics:
    """The last rewards of every prompt (Black et al. 2023, section 5.1 and their per-prompt tracker)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: np.ndarray) -> None:
        """Remember ``rewards`` (images,) as they are: floats are never rounded to the type of an earlier reward."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.size)).append(float(reward))

    def mean_and_std(self, prompt: str) -> tuple[float, float] | None:
        """Mean and standard deviation of a prompt's rewards, or None while fewer than half of ``size`` are known."""
        rewards = self._rewards.get(prompt, ())
        if len(rewards) < self.size / 2:
            return None
        return _mean_and_std(np.array(rewards))

    def state(self) -> dict[str, list[float]]:
        """Everything a resumed run needs."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """The inverse of :meth:`state`."""
        self._rewards = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in state.items()}


def advantages(
    rewards: np.ndarray, prompts: Sequence[str], settings: AdvantageSettings, history: PromptStatistics
) -> np.ndarray:
    """Advantages (images,) float64 of one step's ``rewards`` (images,), clipped to ±``settings.clip``.

    ``history`` is updated with these rewards first, as in the reference implementation of the paper.
    A reward that equals all that it is compared with has an advantage of exactly 0: it teaches nothing.
    Raises DegenerateBatch on rewards that are not finite, too large to be squared, or all equal.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    check_rewards(rewards, prompts)
    history.update(prompts, rewards)
    everything = _mean_and_std(rewards)
    prompt_array = np.asarray(prompts)
    result = np.empty_like(rewards)
    for prompt in dict.fromkeys(prompts):
        members = prompt_array == prompt
        if settings.compares == "group":
            mean, std = _mean_and_std(rewards[members])
        elif settings.compares == "history":
            mean, std = history.mean_and_std(prompt) or everything
        else:
            mean, std = everything
        gaps = rewards[members] - mean
        gaps[np.abs(gaps) <= ROUNDING * np.abs(rewards[members]).max()] = 0
        result[members] = gaps / (std + _EPSILON)
    return np.clip(result, -settings.clip, settings.clip)


def _mean_and_std(rewards: np.ndarray) -> tuple[float, float]:
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(rewards.mean()), float(rewards.std())
    if not np.isfinite(std):
        raise DegenerateBatch("the rewards are too large for their mean and deviation: scale the reward down")
    return mean, std
