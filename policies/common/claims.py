"""Claims of an experiment as data, each judged over its seeds: kept, missed or undecided.

A claim is kept if the whole 95 % interval of what it speaks of is on the right side of its bound, the bound included,
missed if the whole of it is beyond, and undecided otherwise: also without an interval, as of one seed, or with a value
that is no number. Each claim is judged by itself: of twenty that hold exactly at their bound, one may well fall.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.common.intervals import Scale, interval, paired_ratio, scale_of, share_of

Outcome = Literal["kept", "missed", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "missed", "undecided")
Kind = Literal["absolute", "difference", "ratio"]
Values = Mapping[str, Mapping[str, Sequence[float]]]  # arm → metric → a value a seed, in the same order in every arm


@dataclass(frozen=True)
class Claim:
    """That a metric of ``arm`` is at most, or at least, ``bound``: itself, or against ``control`` seed by seed."""

    sentence: str
    metric: str
    arm: str
    direction: Literal["at most", "at least"]
    bound: float
    control: str | None = None
    kind: Kind = "absolute"  # of arm; arm − control; arm / control
    scale: Scale | None = None  # of the metric; a ratio's `share`: what is left of the control's; None: by the name

    def __post_init__(self) -> None:
        if (self.control is None) != (self.kind == "absolute"):
            raise ValueError(f"claim {self.sentence!r}: a difference or a ratio has a control, an absolute value none")
        if self.direction not in ("at most", "at least"):
            raise ValueError(f"claim {self.sentence!r}: {self.direction!r} is neither 'at most' nor 'at least'")
        if not np.isfinite(self.bound):
            raise ValueError(f"claim {self.sentence!r}: its bound is {self.bound}")


@dataclass(frozen=True)
class Judgement:
    """What became of a claim: the mean over ``seeds``, its 95 % interval (nan: there is none), and why if undecided."""

    outcome: Outcome
    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    seeds: int = 0
    reason: str = ""


def judge(claim: Claim, values: Values) -> Judgement:
    """Hold ``claim`` against the ``values`` of the arms that were run."""
    needed = [claim.arm] if claim.control is None else [claim.arm, claim.control]
    if lacking := next((arm for arm in needed if claim.metric not in values.get(arm, {})), None):
        return Judgement("undecided", reason=f"there is no {claim.metric} of arm {lacking}")
    found = [np.asarray(values[arm][claim.metric], dtype=np.float64) for arm in needed]
    seeds = len(found[0])
    if found[0].shape != found[-1].shape or not seeds:
        return Judgement("undecided", reason="its arms have not the same seeds")
    if not np.isfinite(found).all():
        return Judgement("undecided", seeds=seeds, reason=f"{claim.metric} is no number at a seed")
    value, low, high = _within(claim, found)
    if not (np.isfinite(low) and np.isfinite(high)):
        many = "1 seed" if seeds == 1 else f"{seeds} seeds"
        return Judgement("undecided", value, seeds=seeds, reason=f"no interval of {many} such as these")
    sign = 1 if claim.direction == "at most" else -1
    near, far = sorted((sign * low, sign * high))  # the ends, as of a claim that something is at most its bound
    if far <= sign * claim.bound:
        return Judgement("kept", value, low, high, seeds)
    if near > sign * claim.bound:
        return Judgement("missed", value, low, high, seeds)
    return Judgement("undecided", value, low, high, seeds, f"the interval holds the bound, {claim.bound:g}")


def _within(claim: Claim, found: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds, paired with the control's."""
    scale = claim.scale or scale_of(claim.metric)
    if claim.kind == "absolute":
        mean, low, high = interval(found[0], scale)
    elif claim.kind == "ratio":
        if claim.scale == "share":  # nothing may be left of the control's, which has no logarithm
            mean, low, high = interval(share_of(*found), "share")
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                mean, low, high = paired_ratio(*found)
    else:
        mean, low, high = interval(found[0] - found[1])
        if scale == "share" and low == high:  # as of seeds that all show 0 or 1: no certainty
            low, high = np.nan, np.nan
    return float(mean), float(low), float(high)
