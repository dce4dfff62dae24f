"""What a MAD experiment may claim: comparisons paired by seed, with intervals over seeds, and the doubts they leave.

Arrays are (seeds, generations). Seeds are the only replicates, and intervals are over them. Quality (precision)
and diversity (recall) are judged apart, since a biased loop can gain the one by losing the other (Alemohammad et al.,
2307.01850).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite, log1p
from typing import Any, Literal

import numpy as np

from policies.common.intervals import half_width, interval

Outcome = Literal["improves", "holds", "degrades", "undecided"]
FEWEST_SEEDS = 3
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Verdict:
    """The last generation against the first. ``first`` and ``last`` are means over seeds.

    ``change``, ``low`` and ``high`` are the paired change with its 95 % interval: log(last/first) where lower is
    better (distances), last − first where higher is (shares). ``seeds_needed``: how many seeds of this spread and this
    change would decide (at most MOST_SEEDS; FEWEST_SEEDS where one seed shows no spread), None if it is decided or no
    number would.
    """

    first: float
    last: float
    change: float
    low: float
    high: float
    verdict: Outcome
    seeds_needed: int | None


def judge(values: np.ndarray, better: Literal["lower", "higher"], margin: float = 0.2) -> Verdict:
    """Does the last generation hold the level of the first?

    *holds*: the whole interval lies within the margin, a factor 1 + ``margin`` either way for distances, ``margin``
    times the first mean for shares. *improves*, *degrades*: the interval excludes no change, and its centre lies beyond
    the margin. Else *undecided*, as is what has no finite change.
    """
    ends = np.asarray(values, dtype=np.float64)[:, [0, -1]]
    first, last = ends.mean(axis=0)
    if better == "lower":
        with np.errstate(divide="ignore", invalid="ignore"):
            changes, limit, worse = np.log(ends[:, 1] / ends[:, 0]), log1p(margin), 1
    else:
        changes, limit, worse = ends[:, 1] - ends[:, 0], margin * first, -1
    change, low, high = (float(value) for value in interval(changes))
    verdict: Outcome = "undecided"
    if max(-low, high) <= limit:
        verdict = "holds"
    elif abs(change) > limit and low * high > 0:
        verdict = "degrades" if change * worse > 0 else "improves"
    needed = _seeds_needed(changes, limit) if verdict == "undecided" and np.isfinite(changes).all() else None
    return Verdict(float(first), float(last), change, low, high, verdict, needed)


def mad_verdict(distance: Verdict, quality: Verdict | None, diversity: Verdict | None, seeds: int) -> dict[str, Any]:
    """The experiment's answer, ready for JSON: a loop goes MAD when its distance from the real data grows.

    ``warnings`` are sentences about what the number of ``seeds`` does not support.
    """
    parts = {"distance": distance, "quality": quality, "diversity": diversity}
    many = f"{seeds} seed{'s' * (seeds > 1)}"
    warnings = [f"{many} cannot carry a claim: run at least {FEWEST_SEEDS}."] if seeds < FEWEST_SEEDS else []
    for name, part in parts.items():
        if part and part.verdict == "undecided":
            needed = part.seeds_needed
            takes = f"with this spread it takes about {needed}" if needed else "it is 0 or unknown"
            warnings.append(f"{name.capitalize()} is undecided after {many}: {takes}.")
    answer = {"degrades": "yes", "improves": "no", "holds": "no", "undecided": "undecided"}[distance.verdict]
    content = {name: plain(part and asdict(part)) for name, part in parts.items()}
    return {"goes_mad": answer, **content, "warnings": warnings}


def forgetting_time(small: np.ndarray, large: np.ndarray, share: float = 0.1) -> int | None:
    """The generation, counted from 1, from which on two arms that differ in n_ini only are within ``share`` of their
    difference at generation 1 (means over paired seeds of (seeds, generations)); None if they never are."""
    difference = np.abs(np.mean(np.asarray(small) - np.asarray(large), axis=0))
    apart = np.flatnonzero(difference >= share * difference[0])
    following = int(apart[-1]) + 1 if apart.size else 0
    return following + 1 if following < len(difference) else None


def _seeds_needed(changes: np.ndarray, limit: float) -> int:
    if len(changes) == 1:
        return FEWEST_SEEDS
    seeds = np.arange(len(changes) + 1, MOST_SEEDS)
    change = abs(changes.mean())
    room = change if change > limit else limit - change
    deciding = seeds[half_width(seeds) * changes.std(ddof=1) <= room]
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
