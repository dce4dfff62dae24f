"""What one step's numbers are called. The names are MLflow's and the journal's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.roles.learner import Update
from orchestration.experiments.ddpo.evaluation import diversity
from orchestration.experiments.metric_names import RATIO, STEPS

_MOMENTS: dict[str, Any] = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}


def step_metrics(
    scores: np.ndarray, advantage: np.ndarray, update: Update, images: np.ndarray, prompts: Sequence[str]
) -> dict[str, float]:
    """Metrics of one step from its rewards (images,), advantages (images,), update and images."""
    statistics, spread = update.statistics, diversity(images, prompts)
    ratio = [name for name in (*RATIO, "behaviour_kl") if statistics[name] is not None]
    return {
        **{f"reward/{name}": float(_MOMENTS[name](scores)) for name in STEPS["reward"]},
        **{f"advantage/{name}": float(_MOMENTS[name](advantage)) for name in ("mean", "std")},
        "advantage/absolute_max": float(np.abs(advantage).max()),
        **{f"policy/{name}": statistics[name] for name in (*STEPS["policy"], *ratio)},
        **({} if spread is None else {"images/diversity": spread}),
        "weights/version": float(update.version),
        "weights/changed_tensors": float(update.changed_tensors),
        "weights/checksum": float(int(update.checksum[:12], 16)),
        **{f"first_update_error/timestep_{n:02d}": error for n, error in statistics["first_update_error"].items()},
    }
