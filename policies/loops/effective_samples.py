"""How many real samples is a fresh-data loop worth? (Alemohammad et al., 2307.01850, section 5.)

The effective sample size n_e is the number of real samples from which one Gaussian fit of the loop's kind comes as
close to N(0, I), in expected squared 2-Wasserstein distance, as the loop's limit. Its n_s synthetic samples are
*admissible* while n_e is at least n_r, the number of new real ones. Everything is simulated on sufficient statistics:
a batch's mean, and a root R of its scatter RᵀR, so that the cost does not depend on the number of samples.
"""

from collections.abc import Callable
from functools import cache
from math import ceil, isqrt, log, sqrt
from typing import NamedTuple

import numpy as np

from policies.common.intervals import interval
from policies.loops.laws import Covariance, fresh_steady_state

MOST_SAMPLES = 10_000_000
_TRANSIENT = 1e-3


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Admissible(NamedTuple):
    """The largest admissible n_s with its 95 % interval; None stands for more than were asked for."""

    n_synthetic: int | None
    low: int | None
    high: int | None


def wasserstein_squared(mean: np.ndarray, covariance: np.ndarray, eigenvalues: np.ndarray | None = None) -> np.ndarray:
    """W2²(N(μ, Σ), N(0, I)) = ‖μ‖² + d + tr Σ − 2 tr Σ^½ of ``mean`` (…, d), ``covariance`` (…, d, d), if known its
    ``eigenvalues`` (…, d): (…)."""
    deviations = np.sqrt((np.linalg.eigvalsh(covariance) if eigenvalues is None else eigenvalues).clip(min=0))
    return np.sum(mean**2, axis=-1) + np.sum((deviations - 1) ** 2, axis=-1)


def expected_distance(
    samples: int, dimension: int, universes: int, seed: int, covariance: Covariance = "unbiased"
) -> tuple[float, float]:
    """E W2² of one fit to ``samples`` ≥ 2 real samples (they may be fewer than d), and its standard error."""
    if covariance == "known":
        return dimension / samples, 0.0
    identity = np.broadcast_to(np.eye(dimension), (universes, dimension, dimension))
    root = _draw(np.zeros(dimension), identity, samples, np.random.default_rng(seed))[1]
    distance = wasserstein_squared(np.zeros(dimension), root.mT @ root / (samples - (covariance == "unbiased")))
    # The mean's part, E‖μ‖² = d/n, needs no simulation.
    return dimension / samples + float(distance.mean()), float(distance.std(ddof=1)) / sqrt(universes)


def effective_sample_size(
    distances: np.ndarray, dimension: int, seed: int = 0, covariance: Covariance = "unbiased"
) -> Estimate:
    """n_e of a loop whose limiting distance is ``distances`` (seeds,), with the interval of their mean carried over.

    Linear between whole numbers. Ends of the interval stop at 2 and MOST_SAMPLES, or are nan as those of the mean are.
    Raises ValueError if the mean lies beyond.
    """

    # A relative error of .2 %: that of one universe falls as 1/d, and its cost rises as d³.
    universes = max(400_000 // dimension**2, min(100, 1_000_000 // dimension**2))

    @cache
    def expected(samples: int) -> float:
        return expected_distance(samples, dimension, universes, seed, covariance)[0]

    def solve(distance: float) -> float:
        # Of many samples the distance is c/n: looked for around there, and everywhere if it is not there.
        near = round(MOST_SAMPLES * expected(MOST_SAMPLES) / max(distance, expected(MOST_SAMPLES)))
        low, high = max(near // 2, 2), min(2 * near, MOST_SAMPLES)
        low, high = (low, high) if expected(low) > distance >= expected(high) else (2, MOST_SAMPLES)
        below = _largest(lambda n: expected(n) > distance, low, high)
        return float(np.interp(-distance, [-expected(below), -expected(below + 1)], [below, below + 1]))

    mean, low, high = (float(value) for value in interval(distances, "expectation"))
    if not expected(2) >= mean >= expected(MOST_SAMPLES):
        raise ValueError(
            f"no fit to 2 to {MOST_SAMPLES} samples in {dimension} dimensions has the expected distance {mean:.4g} "
            f"(2 give {expected(2):.4g}): give squared 2-Wasserstein distances of a Gaussian loop"
        )
    return Estimate(solve(mean), *(end if np.isnan(end) else solve(end) for end in (high, low)))


def largest_admissible(
    n_real: int, sampling_bias: float, dimension: int, universes: int, seed: int, most: int = 10_000
) -> Admissible:
    """The largest n_s ≤ ``most`` with n_e ≥ n_r, by bisection: the loop is compared with fits to its own new real
    samples alone, and every n_s meets the same ones. Without bias every n_s is admissible."""

    @cache
    def excess(n_synthetic: int) -> tuple[np.ndarray, ...]:
        loop, alone = limits(n_real, n_synthetic, sampling_bias, (universes, dimension), seed)
        return interval(loop - alone)

    def largest(part: int) -> int | None:
        return None if excess(most)[part] <= 0 else _largest(lambda n: bool(excess(n)[part] <= 0), 0, most)

    return Admissible(None, None, None) if sampling_bias == 1 else Admissible(largest(0), largest(2), largest(1))


def _largest(accepted: Callable[[int], bool], low: int, high: int) -> int:
    """The last accepted whole number from ``low``, which is, to ``high``, which is not, by geometric bisection."""
    while high - low > 1:
        middle = max(isqrt(max(low, 1) * high), low + 1)
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


def limits(
    n_real: int, n_synthetic: int, sampling_bias: float, shape: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Averages over generations of W2² (universes,): the fresh-data loop's in its steady state, which forgets its
    n_ini, and that of fits to its new real samples alone. ``shape`` is (universes, d)."""
    total, truth = n_real + n_synthetic, (np.zeros(shape), np.broadcast_to(np.eye(shape[1]), (*shape, shape[1])))
    real_random, random = np.random.default_rng(seed).spawn(2)
    # Begun at the exact steady state's expectations, the loop has only fluctuations to forget, by λq a generation.
    v, c = fresh_steady_state(n_real=n_real, n_synthetic=n_synthetic, sampling_bias=sampling_bias)
    mean, root = sqrt(c) * random.standard_normal(shape), sqrt(v) * truth[1]
    generations = ceil(log(_TRANSIENT) / log(sampling_bias * n_synthetic / total))
    loop, alone = np.zeros((generations, shape[0])), np.zeros((generations, shape[0]))
    for generation in range(-generations, generations):
        real_mean, real_root = _draw(*truth, n_real, real_random)
        drawn_mean, drawn_root = _draw(mean, sqrt(sampling_bias) * root, n_synthetic, random)
        gap = sqrt(n_real * n_synthetic / total) * (real_mean - drawn_mean)
        mean = (n_real * real_mean + n_synthetic * drawn_mean) / total
        scatter_root = np.concatenate([real_root, drawn_root, gap[:, None]], axis=1)
        root = np.asarray(np.linalg.qr(scatter_root / sqrt(total - 1), mode="r"))
        if generation >= 0:
            loop[generation] = wasserstein_squared(mean, root.mT @ root)
            alone[generation] = wasserstein_squared(real_mean, real_root.mT @ real_root / (n_real - 1))
    return loop.mean(axis=0), alone.mean(axis=0)


def _draw(
    mean: np.ndarray, root: np.ndarray, samples: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (universes, d) and root of the scatter of ``samples`` points of N(mean, RᵀR), ``root`` R (universes, k, d).

    The scatter's is Bartlett's triangle times R, cut off below where there are fewer than k degrees of freedom.
    """
    universes, rank, _ = root.shape
    diagonal = np.arange(min(samples - 1, rank))
    triangle = np.triu(random.standard_normal((universes, len(diagonal), rank)), 1)
    triangle[:, diagonal, diagonal] = np.sqrt(random.chisquare(samples - 1 - diagonal, (universes, len(diagonal))))
    strays = (random.standard_normal((universes, 1, rank)) @ root)[:, 0] / sqrt(samples)
    return mean + strays, triangle @ root
