"""What a MAD experiment may claim: comparisons paired by seed, with intervals over seeds, and the doubts they leave.

Arrays are (seeds, generations). Seeds are the only replicates: intervals are Student's t over them. Quality (precision)
and diversity (recall) are judged apart, since a biased loop can gain the one by losing the other (Alemohammad et al.,
2307.01850).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, isfinite, log1p, nan
from typing import Any, Literal

import numpy as np

FEWEST_SEEDS = 3
MOST_SEEDS = 10_000
_BOOTSTRAPS = 999


@dataclass(frozen=True)
class Verdict:
    """The last generation against the first. ``first`` and ``last`` are means over seeds.

    ``change``, ``low`` and ``high`` are the paired change with its 95 % interval: log(last/first) where lower is
    better (distances), last − first where higher is (shares). ``seeds_needed``: how many seeds of this spread and this
    change would decide (at most MOST_SEEDS; FEWEST_SEEDS where one seed shows no spread), None if it is decided.
    """

    first: float
    last: float
    change: float
    low: float
    high: float
    verdict: Literal["improves", "holds", "degrades", "undecided"]
    seeds_needed: int | None


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds of ``values`` (seeds, …), and its 95 % Student interval, each (…); of one seed nan."""
    values = np.asarray(values, dtype=np.float64)
    mean, seeds = values.mean(axis=0), len(values)
    half = _half_width(seeds) * values.std(axis=0, ddof=1) if seeds > 1 else np.full_like(mean, nan)
    return mean, mean - half, mean + half


def judge(values: np.ndarray, better: Literal["lower", "higher"], margin: float = 0.2) -> Verdict:
    """Does the last generation hold the level of the first?

    *holds*: the whole interval lies within the margin, a factor 1 + ``margin`` either way for distances, ``margin``
    times the first mean for shares. *improves*, *degrades*: the interval excludes no change, and its centre lies beyond
    the margin. Else *undecided*, as is what has no finite change.
    """
    ends = np.asarray(values, dtype=np.float64)[:, [0, -1]]
    first, last = ends.mean(axis=0)
    if better == "lower":
        changes, limit, worse = np.log(ends[:, 1] / ends[:, 0]), log1p(margin), 1
    else:
        changes, limit, worse = ends[:, 1] - ends[:, 0], margin * first, -1
    change, low, high = (float(value) for value in interval(changes))
    verdict: Literal["improves", "holds", "degrades", "undecided"] = "undecided"
    if max(-low, high) <= limit:
        verdict = "holds"
    elif abs(change) > limit and low * high > 0:
        verdict = "degrades" if change * worse > 0 else "improves"
    needed = _seeds_needed(changes, limit) if verdict == "undecided" else None
    return Verdict(float(first), float(last), change, low, high, verdict, needed)


def mad_verdict(distance: Verdict, quality: Verdict | None, diversity: Verdict | None, seeds: int) -> dict[str, Any]:
    """The experiment's answer, ready for JSON: a loop goes MAD when its distance from the real data grows.

    ``warnings`` are sentences about what the number of ``seeds`` does not support.
    """
    parts = {"distance": distance, "quality": quality, "diversity": diversity}
    warnings = []
    if seeds < FEWEST_SEEDS:
        warnings.append(f"{seeds} seed{'s' * (seeds > 1)} cannot carry a claim: run at least {FEWEST_SEEDS}.")
    for name, part in parts.items():
        if part and part.verdict == "undecided":
            warnings.append(
                f"{name.capitalize()} is undecided after {seeds} seed{'s' * (seeds > 1)}: "
                f"with this spread it takes about {part.seeds_needed}."
            )
    answer = {"degrades": "yes", "improves": "no", "holds": "no", "undecided": "undecided"}[distance.verdict]
    return {
        "goes_mad": answer,
        **{name: plain(part and asdict(part)) for name, part in parts.items()},
        "warnings": warnings,
    }


def forgetting_time(small: np.ndarray, large: np.ndarray, share: float = 0.1) -> int | None:
    """The generation, counted from 1, from which on two arms that differ in n_ini only are within ``share`` of their
    difference at generation 1 (means over paired seeds of (seeds, generations)); None if they never are."""
    difference = np.abs(np.mean(np.asarray(small) - np.asarray(large), axis=0))
    apart = np.flatnonzero(difference >= share * difference[0])
    following = int(apart[-1]) + 1 if apart.size else 0
    return following + 1 if following < len(difference) else None


def paired_ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of a/b over paired seeds, both (seeds,) and positive, with its 95 % interval."""
    mean, low, high = (exp(value) for value in interval(np.log(np.asarray(a) / np.asarray(b))))
    return mean, low, high


def rank_correlation(levels: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Spearman's ρ between ``levels`` (k,) and ``values`` (seeds, k), all seeds pooled, with its 95 % percentile
    bootstrap interval over whole seeds (nan for one seed)."""
    from scipy.stats import bootstrap, spearmanr

    values = np.asarray(values, dtype=np.float64)

    def correlation(seeds: np.ndarray) -> float:
        return float(spearmanr(np.tile(levels, len(seeds)), values[seeds].ravel()).statistic)

    seeds, rng = np.arange(len(values)), np.random.default_rng(0)
    if len(seeds) == 1:
        return correlation(seeds), nan, nan
    draws = bootstrap((seeds,), correlation, n_resamples=_BOOTSTRAPS, vectorized=False, method="percentile", rng=rng)
    return correlation(seeds), float(draws.confidence_interval.low), float(draws.confidence_interval.high)


def _half_width(seeds: int | np.ndarray) -> np.ndarray:
    """Half of a 95 % interval's width over the standard deviation of what ``seeds`` values it is for."""
    from scipy.stats import t

    return np.asarray(t.ppf(0.975, np.asarray(seeds) - 1) / np.sqrt(seeds))


def _seeds_needed(changes: np.ndarray, limit: float) -> int:
    if len(changes) == 1:
        return FEWEST_SEEDS
    seeds = np.arange(len(changes) + 1, MOST_SEEDS)
    change = abs(changes.mean())
    room = change if change > limit else limit - change
    deciding = seeds[_half_width(seeds) * changes.std(ddof=1) <= room]
    return int(deciding[0]) if deciding.size else MOST_SEEDS


def plain(content: Any) -> Any:
    """``content`` for JSON, which has no arrays and no nan: lists, and null for what is unknown."""
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content
