"""What follows from the values of a MAD experiment: exact laws to hold them against, verdicts, effective samples."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from orchestration.experiments.mad.config import ArmSettings, MadConfig
from policies.common.intervals import paired_ratio, rank_correlation
from policies.loops import laws as exact_laws
from policies.loops.rules import Manifest
from policies.loops.verdicts import forgetting_time, judge, mad_verdict

DISTANCES = ("fid", "frechet", "w2_squared")  # what goes MAD if it grows; an arm has one of them, or none
_DIVERSITY = ("recall", "heterozygosity")
_ADMISSIBLE_NUMBERS = 40_000  # of the covariances simulated side by side in a bisection
_LIMIT_SHARE = 4  # the last quarter of the generations is averaged as a loop's limit

Values = Mapping[str, np.ndarray]  # metric → (seeds, generations)


def laws(arm: ArmSettings, generations: int) -> exact_laws.Laws:
    """The exact expectations for an arm: metric → (generations,); empty where no law is known."""
    n_ini = arm.initial()
    sizes = [arm.sizes(generation, generations) for generation in range(2, generations + 1)]
    n_real, n_synthetic = ([size[which] for size in sizes] for which in (0, 1))
    same = bool(sizes) and len(set(sizes)) == 1
    if arm.family == "categorical" and arm.rule == "fully_synthetic" and arm.sampling_bias == 1 and (same or not sizes):
        uniform = [1 / arm.categories] * arm.categories
        return exact_laws.categorical(
            generations=generations, n_ini=n_ini, n=n_synthetic[0] if sizes else n_ini, probabilities=uniform
        )
    if arm.family != "gaussian" or arm.real_weight != 1:
        return {}
    found = _gaussian_laws(arm, generations, n_real, n_synthetic)
    if arm.covariance == "known" and found:  # nothing but the mean is away from the truth
        found |= {"w2_squared": arm.dimension * found["mean_square"], "log_det": np.zeros(generations)}
    return found


def _gaussian_laws(arm: ArmSettings, generations: int, n_real: list[int], n_synthetic: list[int]) -> exact_laws.Laws:
    n_ini, sizes = arm.initial(), set(zip(n_real, n_synthetic, strict=True))
    common: dict[str, Any] = {"sampling_bias": arm.sampling_bias, "covariance": arm.covariance}
    common["generations"] = generations
    if arm.rule == "real_only" or not sizes:  # every generation is a first one
        first = exact_laws.fully_synthetic(
            **common | {"generations": 1}, n_ini=n_ini, n_synthetic=n_ini, dimension=arm.dimension
        )
        return {metric: np.repeat(values, generations) for metric, values in first.items()}
    if arm.rule == "fully_synthetic":
        return exact_laws.fully_synthetic(**common, n_ini=n_ini, n_synthetic=n_synthetic[0], dimension=arm.dimension)
    remembered: dict[str, Any] = common | {"memory": arm.memory if arm.rule == "memory" else 1}
    if arm.rule in ("fresh", "memory") and arm.supply != "fixed":
        return exact_laws.fresh(**remembered, n_ini=n_ini, n_real=n_real, n_synthetic=n_synthetic)
    real_once = len(sizes) == 1 and n_real[0] == n_ini and arm.supply == "fixed"
    before = arm.rule in ("memory", "iterative_retraining")  # a closed form has nothing to go on from
    if real_once and (before or (arm.rule == "augmentation" and arm.synthetic_from == "previous")):
        return exact_laws.augmentation(**remembered, n_real=n_ini, n_synthetic=n_synthetic[0])
    if (arm.rule == "accumulate" or arm.rule == "augmentation") and real_once:
        return exact_laws.accumulate(**common, n_ini=n_ini, n_synthetic=n_synthetic[0])
    if arm.rule == "accumulate_subsample" and real_once and n_synthetic[0] == n_ini == arm.total():
        return exact_laws.accumulate_subsample(**common, n=n_ini)
    return {}


def verdict(values: Values) -> dict[str, Any] | None:
    """Does the arm go MAD? Its distance, its quality and its diversity are judged apart. One generation has none."""
    seeds, generations = next(iter(values.values())).shape
    if generations < 2:
        return None
    distance = next((metric for metric in DISTANCES if metric in values), None)
    diversity = next((metric for metric in _DIVERSITY if metric in values), None)
    return mad_verdict(
        # With a uniform truth Σ(p − 1/k)² = 1 − 1/k − heterozygosity, and unlike the distance it is never 0.
        judge(values[distance], "lower") if distance else judge(values["heterozygosity"], "higher"),
        judge(values["precision"], "higher") if "precision" in values else None,
        judge(values[diversity], "higher") if diversity else None,
        seeds,
    )


def limit(distances: np.ndarray) -> np.ndarray:
    """The level (seeds,) that a loop has come to: the mean of the last quarter of its generations."""
    return distances[:, -max(1, distances.shape[1] // _LIMIT_SHARE) :].mean(axis=1)


def effective_samples(arm: ArmSettings, values: Values, config: MadConfig) -> dict[str, Any]:
    """n_e and n_e/n_r of a fresh Gaussian arm, and the largest admissible n_s where it is asked for."""
    from policies.loops.effective_samples import effective_sample_size, largest_admissible

    n_real, _ = arm.sizes(config.generations, config.generations)
    reached = limit(values["w2_squared"])
    result: dict[str, Any] = {
        "limit": float(reached.mean()),
        "limit_standard_error": float(reached.std(ddof=1) / math.sqrt(len(reached))) if len(reached) > 1 else None,
    }
    try:
        found = effective_sample_size(reached, arm.dimension, covariance=arm.covariance)
    except ValueError as error:  # a limit that no number of real samples has
        return result | {"problem": str(error)}
    result |= {
        "n_e": found._asdict(),
        "n_e_over_n_r": {name: value / n_real for name, value in found._asdict().items()},
        "admissible": found.value >= n_real,
    }
    if config.derive.largest_admissible and arm.underivable(config.generations, largest=True) is None:
        universes = max(32, _ADMISSIBLE_NUMBERS // arm.dimension**2)
        found_most = largest_admissible(n_real, arm.sampling_bias, arm.dimension, universes, seed=0)
        result["largest_admissible"] = found_most._asdict()
    return result


def comparisons(
    config: MadConfig, values: Mapping[str, Values], manifests: Mapping[str, Sequence[Manifest]]
) -> dict[str, Any]:
    """What arms say together: how n_ini is forgotten, and how the final distance falls with fresh data.

    Only arms are compared that are equal in all else, the sizes of their later training sets included.
    """
    arms = config.resolved_arms
    found: dict[str, Any] = {}
    for metric in DISTANCES:
        for small, large in permutations([name for name in arms if metric in values[name]], 2):
            alike = _but_for_sizes(arms[small]) == _but_for_sizes(arms[large])
            same_later = _sizes(manifests[small][1:]) == _sizes(manifests[large][1:])
            if alike and same_later and arms[small].initial() < arms[large].initial():
                pair = values[small][metric], values[large][metric]
                told: dict[str, Any] = {"arms": [small, large], "metric": metric}
                told |= {"forgetting_time": forgetting_time(*pair)}
                told |= {"final_ratio": paired_ratio(limit(pair[0]), limit(pair[1]))._asdict()}
                found.setdefault("n_ini", []).append(told)
        series = fresh_series(config, values, metric)
        if series is not None:
            found["fresh_fraction"] = {
                "metric": metric,
                "fractions": series[0].tolist(),
                "final": series[1].tolist(),
                "rank_correlation": rank_correlation(*series)._asdict(),
            }
    return found


def fresh_series(config: MadConfig, values: Mapping[str, Values], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Fresh fractions (k,) and final distances (seeds, k) of arms of one size that differ in their fraction only."""
    groups: dict[Any, dict[float, np.ndarray]] = defaultdict(dict)
    for name, arm in config.resolved_arms.items():
        if metric not in values[name] or arm.rule not in ("fresh", "fully_synthetic") or arm.sampling_bias != 1:
            continue
        sizes = {arm.sizes(generation, config.generations) for generation in range(2, config.generations + 1)}
        if len(sizes) == 1 and sum(size := sizes.pop()) == arm.initial():
            rest = _but_for_sizes(arm) | {"rule": None, "real_supply": None}
            for supply in (arm.supply,) if arm.rule == "fresh" else ("fresh", "fresh_with_replacement"):
                groups[arm.initial(), supply, str(rest)][size[0] / sum(size)] = values[name][metric][:, -1]
    fractions = max(groups.values(), key=len, default={})
    if len(fractions) < 3:
        return None
    ordered = sorted(fractions)
    return np.array(ordered), np.stack([fractions[fraction] for fraction in ordered], axis=1)


def _but_for_sizes(arm: ArmSettings) -> dict[str, Any]:
    """An arm's settings without the sizes of its training sets."""
    return arm.model_dump(exclude={"n_ini", "n_real", "n_synthetic", "n_total", "fresh_fraction"})


def _sizes(manifests: Sequence[Manifest]) -> list[Any]:
    """Of each training set, its size and that of each of its parts."""
    return [(m.size, [(part.role, part.generation, part.size) for part in m.parts]) for m in manifests]
