"""Every interval that is printed, over seeds, 95 %: what it is an interval of, and where there is none.

Student's t covers what it says for normal values, so each metric is taken to a scale on which seeds are nearly normal,
and the mean is that scale's: of the *logarithm* for distances (the geometric mean), of arcsin √p for a *share* and of
arcsin √((1+ρ)/2) for a *correlation*, whose few values take 50 seeds. What a law speaks of is an *expectation*, which
no scale may bend: its interval waits for 30 seeds, and for more the wider they spread.
``python -m benchmarks.coverage`` prints how often each holds what it is an interval of.
"""

from collections.abc import Callable
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Scale = Literal["plain", "logarithm", "share", "correlation", "expectation"]

FEWEST: dict[Scale, int] = {"correlation": 50, "expectation": 30}  # seeds that an interval takes; else 2
_MOST_SKEWNESS = 0.01  # its square over the number of seeds: beyond, Student's t covers less than 93 %
_LOGARITHM = ("fid", "frechet")
_SHARE = (
    *("precision", "recall", "coverage", "label_accuracy", "memorisation", "in_mode", "evaluator", "seen", "unseen"),
    *("prompt_accuracy", "caption_agreement"),
)
_EXPECTATION = ("w2_squared", "variance", "mean_square", "heterozygosity", "entropy", "total_variation")
RATIOS = (*_LOGARITHM, "w2_squared", "total_variation")  # compared by their ratio, not by their difference


class Interval(NamedTuple):
    """The mean over seeds on a scale, and the ends of its 95 % interval, nan where there is none."""

    mean: Any
    low: Any
    high: Any


class Correlation(NamedTuple):
    """Spearman's ρ: the mean over seeds on its scale with its interval, and each seed's own."""

    rho: float
    low: float
    high: float
    each: list[float]


def scale_of(metric: str) -> Scale:
    """The scale of a metric's seeds; of ``evaluator/full`` that of all evaluators."""
    name = metric.split("/")[0]
    kinds: dict[Scale, tuple[str, ...]] = {"logarithm": _LOGARITHM, "share": _SHARE, "expectation": _EXPECTATION}
    return next((scale for scale, names in kinds.items() if name in names), "plain")


def interval(values: np.ndarray, scale: Scale = "plain") -> Interval:
    """Mean over seeds of ``values`` (seeds, …) on their scale, and its 95 % interval, each (…); of one seed nan."""
    values = np.asarray(values, dtype=np.float64)
    seeds, (there, back) = len(values), _SCALES[scale]
    if seeds == 1:
        return Interval(values[0], *(np.full_like(values[0], nan),) * 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        on_scale = there(values)
        mean, half = on_scale.mean(axis=0), half_width(seeds) * on_scale.std(axis=0, ddof=1)
        if seeds < FEWEST.get(scale, 2) or scale == "expectation":
            half = np.where((seeds >= FEWEST[scale]) & (scale != "expectation" or _is_tame(values)), half, nan)
        if scale == "share":  # seeds that all show 0 or 1 are not certain of it
            half = np.where(half > 0, half, nan)
        return Interval(back(mean), back(mean - half), back(mean + half))


def summary_of(metric: str, values: np.ndarray, scale: Scale | None = None) -> dict[str, Any]:
    """A metric's ``values`` (seeds, …), their mean and the ends of its 95 % interval, on ``scale`` or its own."""
    return {"values": values} | interval(values, scale or scale_of(metric))._asdict()


def paired(a: ArrayLike, b: ArrayLike, metric: str) -> tuple[Interval, bool]:
    """How a metric changes from ``b`` to ``a``, both (seeds,): log a/b of a distance, else a − b; and whether log."""
    a, b, ratio = np.asarray(a, float), np.asarray(b, float), metric in RATIOS
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(np.log(a / b) if ratio else a - b), ratio


def paired_ratio(a: np.ndarray, b: np.ndarray) -> Interval:
    """Geometric mean of a/b over paired seeds, both (seeds,) and positive, with its 95 % interval; of zeros nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return Interval(*map(float, interval(np.asarray(a) / np.asarray(b), "logarithm")))


def share_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much of ``b`` is left in ``a`` at each of paired seeds, both (seeds, …): at most all; nan of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b > 0, np.minimum(a / b, 1), nan)


def rank_correlation(levels: np.ndarray, values: np.ndarray) -> Correlation:
    """Spearman's ρ between ``levels`` (k,) and each seed's ``values`` (seeds, k). Few seeds have no interval:
    of some ranks nearly all values are ±1."""
    from scipy.stats import spearmanr

    each = np.array([spearmanr(levels, row).statistic for row in np.asarray(values, dtype=np.float64)])
    rho, low, high = (float(value) for value in interval(each, "correlation"))
    return Correlation(rho, low, high, each.tolist())


def half_width(seeds: int | np.ndarray) -> np.ndarray:
    """Half of a 95 % interval's width over the standard deviation of what ``seeds`` values it is for."""
    from scipy.stats import t

    return np.asarray(t.ppf(0.975, np.asarray(seeds) - 1) / np.sqrt(seeds))


def _is_tame(values: np.ndarray) -> Any:
    """Whether positive values (seeds, …) are enough for a log-normal's skewness at their spread.

    It is never taken from the values themselves: samples that miss a tail look as if there were none.
    """
    spread = np.exp(np.log(values).var(axis=0, ddof=1))
    return (spread + 2) ** 2 * (spread - 1) <= _MOST_SKEWNESS * len(values)


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _angle(share: np.ndarray) -> np.ndarray:
    return np.asarray(np.arcsin(np.sqrt(share)))


def _share(angle: np.ndarray) -> np.ndarray:
    return np.asarray(np.sin(np.clip(angle, 0, np.pi / 2)) ** 2)


_SCALES: dict[Scale, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plain": (_same, _same),
    "expectation": (_same, _same),
    "logarithm": (np.log, np.exp),
    "share": (_angle, _share),
    "correlation": (lambda rho: _angle((1 + rho) / 2), lambda angle: 2 * _share(angle) - 1),
}
