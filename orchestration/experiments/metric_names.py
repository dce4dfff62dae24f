"""Every metric that trials can be compared by, and which end of it is better. Light to import."""

from collections.abc import Sequence
from typing import Any, Literal

from pipelines.data.digits import SLOTS
from pipelines.generators import NEIGHBOURS

EVALUATED = ("evaluator/", "evaluation/", "seen/", "unseen/", "rewards/")  # what only evaluations measure
STEPS = {
    "reward": ("mean", "std", "min", "max"),
    "advantage": ("mean", "std", "absolute_max"),
    "policy": ("loss", "gradient_norm", "micro_batch", "learners", "skipped_updates", "staleness"),
    "weights": ("version", "changed_tensors", "checksum"),
    "seconds": ("sample", "reward", "learn", "publish"),
}
RATIO = ("approximate_kl", "ratio_mean", "ratio_max", "clip_fraction")
_LOWER = {
    "w2_squared",
    "mean_square",
    "total_variation",
    "frechet",
    "fid",
    "memorisation",
    "discarded_images",
    "guard/unasked",
}
_HIGHER = {*NEIGHBOURS, "heterozygosity", "entropy", "categories_left", "modes_covered", "mode_entropy", "in_mode"}
_HIGHER |= {"class_entropy", "label_accuracy", "images_per_second", "images/diversity", "evaluation/diversity"}
_HIGHER |= {"prompt_accuracy", "caption_agreement", "reward"}
_HIGHER |= {"reward/mean", "reward/min", "reward/max", "evaluation/reward"}


def better_end(metric: str) -> Literal["max", "min"] | None:
    """Which end of a metric is better; None if that depends on what is wanted."""
    if metric in _HIGHER or metric.startswith(("evaluator/", "seen/", "unseen/", "rewards/")):
        return "max"
    return "min" if metric in _LOWER or metric.startswith("seconds/") else None


def ddpo_metrics(config: Any, prompts: Sequence[str], unseen: Sequence[str]) -> list[str]:
    """What a DDPO run of ``config``, on ``prompts`` and those never trained on, reports."""
    training, judged, functions = config.training, config.evaluation.evaluator is not None, config.reward.functions
    parts = ("seen", "unseen") if unseen else ()
    several = config.evaluation.images > len(prompts) + len(unseen)
    listed: dict[str, Any] = {  # names, and whether a run has them
        "images_per_second discarded_images object_store_bytes evaluation/reward evaluation/kl_to_base": True,
        "policy/behaviour_kl": training.depth and not training.algorithm.on_forward_process,
        "images/diversity": training.images_per_prompt > 1,
        "evaluation/diversity": several,
        "evaluator/agreement": judged and config.captioner.path,
    }
    names = [f"{part}/{name}" for part, ends in STEPS.items() for name in ends]
    names += [name for line, has in listed.items() if has for name in line.split()]
    names += [f"policy/{name}" for name in RATIO if training.algorithm.clips_ratio]
    names += [f"evaluator/{name}" for name in (*SLOTS, "full") if judged]
    names += [f"{part}/{name}" for part in parts for name in ("reward", *(["full"] if judged else []))]
    return names + [f"rewards/{name}" for name in functions if len(functions) > 1]
