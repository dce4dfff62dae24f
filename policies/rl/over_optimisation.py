"""Is a run being fooled by its reward? What it is trained on goes up, and what it is not trained on comes down.

Gao et al. 2022 (2210.10760) call this over-optimisation. Two points at a run are compared image by image, prompt and
seed being the same, which tells far smaller differences than their means do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ERRORS = 2.0  # standard errors of the paired difference that count as lower


@dataclass(frozen=True)
class EvaluationPoint:
    """A run after ``step``: the held-out measure of each of some images (images,), and their mean reward."""

    step: int
    held_out: np.ndarray
    reward: float

    @property
    def mean(self) -> float:
        return float(self.held_out.mean())


def best_point(points: Sequence[EvaluationPoint]) -> EvaluationPoint | None:
    """The evaluation with the highest held-out measure, the earliest of equals; None of none."""
    return max(points, key=lambda point: (point.mean, -point.step), default=None)


def is_lower(point: EvaluationPoint, best: EvaluationPoint) -> bool:
    """Whether ``point`` is worse than ``best`` by more than chance."""
    size = min(len(point.held_out), len(best.held_out))
    drop = best.held_out[:size] - point.held_out[:size]
    return bool(drop.mean() > max(_ERRORS * drop.std() / np.sqrt(size), 1e-12))


def point_to_keep(points: Sequence[EvaluationPoint]) -> EvaluationPoint | None:
    """The last evaluation, unless the best one is better by more than chance; None of none."""
    best = best_point(points)
    return best if best is None or is_lower(points[-1], best) else points[-1]


def over_optimised(points: Sequence[EvaluationPoint], patience: int) -> str | None:
    """Why to stop, in words, if the last ``patience`` points were each lower than the best one; else None.

    It is over-optimisation if the reward kept more of its gain than the held-out measure did, else a collapse.
    """
    best = best_point(points)
    if not patience or best is None:
        return None
    since = [point for point in points if point.step > best.step][-patience:]
    if len(since) < patience or not all(is_lower(point, best) for point in since):
        return None
    now, first = since[-1], points[0]
    kept, kept_reward = _kept(first.mean, best.mean, now.mean), _kept(first.reward, best.reward, now.reward)
    name, but = ("over-optimisation", "while") if kept_reward > kept else ("collapse", "and")
    return (
        f"{name}: the held-out measure fell from {best.mean:.3f} after step {best.step} to {now.mean:.3f}, "
        f"{but} the reward went from {best.reward:.3f} to {now.reward:.3f}"
    )


def _kept(first: float, best: float, now: float) -> float:
    """Share of a gain that is still there; of no gain, whether nothing was lost."""
    return (now - first) / (best - first) if best > first else float(now >= best)
