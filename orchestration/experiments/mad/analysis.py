"""What follows from the values of a MAD experiment: exact laws to hold them against, verdicts, effective samples."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from orchestration.experiments.mad.config import ArmSettings, MadConfig
from policies.common.intervals import interval, paired_ratio, rank_correlation, scale_of
from policies.loops.laws import Laws
from policies.loops.training_sets import Manifest
from policies.loops.verdicts import forgetting_time, judge, mad_verdict, plain

DISTANCES = ("fid", "frechet", "w2_squared")  # what goes MAD if it grows; an arm has one of them, or none
_DIVERSITY = ("recall", "heterozygosity")
_ADMISSIBLE_NUMBERS = 40_000  # of the covariances simulated side by side in a bisection
_LEARNT_LITTLE = 5.0  # times the real-versus-real floor, of the first generation's distance
_LIMIT_SHARE = 4  # the last quarter of the generations is averaged as a loop's limit

Values = Mapping[str, np.ndarray]  # metric → (seeds, generations)


def laws(arm: ArmSettings, generations: int) -> Laws:
    """The exact expectations for an arm: metric → (generations,); empty where no law is known."""
    known: Any = arm.generator_settings, arm.loop, generations
    found: Laws = arm.refined.laws(arm.generator, *known) if arm.refined else arm.generator.laws(*known)
    return found


def verdict(values: Values, floor: Mapping[str, float] | None = None) -> dict[str, Any] | None:
    """Does the arm go MAD? Its distance, its quality and its diversity are judged apart. One generation has none, nor
    has a generator of one's own whose metrics hold neither a distance nor the heterozygosity.

    A model that begins many times farther from real samples than these are from one another, by the ``floor``, has
    learnt too little for a verdict on its quality: there is a warning.
    """
    seeds, generations = next(iter(values.values())).shape
    distance, diversity = (next((each for each in kind if each in values), None) for kind in (DISTANCES, _DIVERSITY))
    if generations < 2 or not (distance or "heterozygosity" in values):
        return None
    # With a uniform truth Σ(p − 1/k)² = 1 − 1/k − heterozygosity, and unlike the distance it is never 0.
    grows = judge(values[distance], "lower") if distance else judge(values["heterozygosity"], "higher")
    kinds = ("precision", diversity or "")
    quality, spread = (judge(values[each], "higher") if each in values else None for each in kinds)
    found = mad_verdict(grows, quality, spread, seeds)
    if distance and (least := (floor or {}).get(distance, 0.0)) > 0:
        begins = float(interval(values[distance][:, 0], scale_of(distance)).mean) / least
        if begins > _LEARNT_LITTLE:
            found["warnings"].append(
                f"The first generation is {begins:.0f} times as far from real samples as these are from one another: "
                "it has learnt little. Train longer before its precision or a verdict on its quality means anything."
            )
    if distance:
        found["growth"] = plain({"metric": distance, **paired_ratio(*values[distance].T[[-1, 0]])._asdict()})
    return found


def limit(distances: np.ndarray) -> np.ndarray:
    """The level (seeds,) that a loop has come to: the mean of the last quarter of its generations."""
    return distances[:, -max(1, distances.shape[1] // _LIMIT_SHARE) :].mean(axis=1)


def effective_samples(arm: ArmSettings, values: Values, config: MadConfig) -> dict[str, Any]:
    """n_e and n_e/n_r of a fresh Gaussian arm, and the largest admissible n_s where it is asked for."""
    from policies.loops.effective_samples import effective_sample_size, largest_admissible

    settings = arm.generator_settings
    n_real, _ = arm.loop.sizes(config.generations, config.generations)
    reached = limit(values["w2_squared"])
    error = float(reached.std(ddof=1) / math.sqrt(len(reached))) if len(reached) > 1 else None
    result: dict[str, Any] = {"limit": float(reached.mean()), "limit_standard_error": error}
    try:
        found = effective_sample_size(reached, settings.dimension, covariance=settings.covariance)
    except ValueError as problem:  # a limit that no number of real samples has
        return result | {"problem": str(problem)}
    shares = {name: value / n_real for name, value in found._asdict().items()}
    result |= {"n_e": found._asdict(), "n_e_over_n_r": shares, "admissible": found.value >= n_real}
    if "largest_admissible" in config.derive and arm.underivable(config.generations, largest=True) is None:
        universes = max(32, _ADMISSIBLE_NUMBERS // settings.dimension**2)
        found_most = largest_admissible(n_real, arm.loop.sampling_bias, settings.dimension, universes, seed=0)
        result["largest_admissible"] = found_most._asdict()
    return result


def comparisons(
    config: MadConfig, values: Mapping[str, Values], manifests: Mapping[str, Sequence[Manifest]]
) -> dict[str, Any]:
    """What arms say together: how n_ini is forgotten, how the final distance falls with fresh data, and how much
    farther than the control each arm ends: than the one of its family with the most real data in later training sets.

    But for the control, only arms are compared that are equal in all else, the sizes of these sets included.
    """
    arms = config.resolved_arms
    found: dict[str, Any] = {}
    share = {name: 1 - np.mean([m.synthetic / m.size for m in manifests[name][1:] or manifests[name]]) for name in arms}
    for metric in DISTANCES:
        for name in (measured := [name for name in arms if metric in values[name]]):
            control = max((each for each in measured if arms[each].family == arms[name].family), key=share.__getitem__)
            if share[name] < share[control]:
                ratio = paired_ratio(*(values[each][metric][:, -1] for each in (name, control)))._asdict()
                pair = {"arms": [name, control], "metric": metric, "final_ratio": ratio}
                found.setdefault("control", []).append(pair)
        for small, large in permutations([name for name in arms if metric in values[name]], 2):
            alike = _but_for_sizes(arms[small]) == _but_for_sizes(arms[large])
            same_later = _sizes(manifests[small][1:]) == _sizes(manifests[large][1:])
            if alike and same_later and arms[small].loop.initial() < arms[large].loop.initial():
                both = values[small][metric], values[large][metric]
                ratio = paired_ratio(*map(limit, both))._asdict()
                pair = {"arms": [small, large], "metric": metric, "final_ratio": ratio}
                found.setdefault("n_ini", []).append(pair | {"forgetting_time": forgetting_time(*both)})
        if (series := fresh_series(config, values, metric)) is not None:
            about = dict(zip(("fractions", "final"), (each.tolist() for each in series), strict=True))
            correlation = rank_correlation(*series)._asdict()
            found["fresh_fraction"] = {"metric": metric, **about, "rank_correlation": correlation}
    return found


def fresh_series(config: MadConfig, values: Mapping[str, Values], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Fresh fractions (k,) and final distances (seeds, k) of arms of one size that differ in their fraction only."""
    groups: dict[Any, dict[float, np.ndarray]] = defaultdict(dict)
    for name, arm in config.resolved_arms.items():
        loop = arm.loop
        if metric not in values[name] or not loop.fresh_supplies() or loop.sampling_bias != 1:
            continue
        sizes = set(loop.later_sizes(config.generations))
        if len(sizes) == 1 and sum(size := sizes.pop()) == loop.initial():
            rest = _but_for_sizes(arm) | {"rule": None, "real_supply": None}
            for supply in loop.fresh_supplies():
                groups[loop.initial(), supply, str(rest)][size[0] / sum(size)] = values[name][metric][:, -1]
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
