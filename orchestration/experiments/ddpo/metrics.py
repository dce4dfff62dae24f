"""What one step's numbers are called. The names are MLflow's and the journal's."""

from collections.abc import Sequence

import numpy as np

from actors.roles.learner import Update
from orchestration.experiments.ddpo.evaluation import diversity

_OF_THE_UPDATE = ("loss", "gradient_norm", "micro_batch", "learners", "skipped_updates", "staleness")
_OF_THE_RATIO = ("approximate_kl", "ratio_mean", "ratio_max", "clip_fraction", "behaviour_kl")  # None without one


def step_metrics(
    scores: np.ndarray, advantage: np.ndarray, update: Update, images: np.ndarray, prompts: Sequence[str]
) -> dict[str, float]:
    """Metrics of one step from its rewards (images,), advantages (images,), update and images."""
    statistics = update.statistics
    first_update = statistics["first_update_error"]
    spread = diversity(images, prompts)
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std()),
        "reward/min": float(scores.min()),
        "reward/max": float(scores.max()),
        "advantage/mean": float(advantage.mean()),
        "advantage/std": float(advantage.std()),
        "advantage/absolute_max": float(np.abs(advantage).max()),
        **{f"policy/{name}": statistics[name] for name in _OF_THE_UPDATE},
        **{f"policy/{name}": statistics[name] for name in _OF_THE_RATIO if statistics[name] is not None},
        **({} if spread is None else {"images/diversity": spread}),
        "weights/version": float(update.version),
        "weights/changed_tensors": float(update.changed_tensors),
        "weights/checksum": float(int(update.checksum[:12], 16)),
        **{f"first_update_error/timestep_{step:02d}": error for step, error in first_update.items()},
    }
