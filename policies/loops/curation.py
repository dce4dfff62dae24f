"""What curation by a reward does to a distribution, exactly: one generation of the curated loop.

Of K samples of p the one kept is x with probability p(x) H(x), H(x) = E K e^{r(x)}/(e^{r(x)} + Σ e^{r(x_i)}) over K − 1
rivals x_i from p (Ferbach et al., 2407.09499). As K grows that is p e^r / E e^r, so that after t generations without
fresh data p_t ∝ p_0 e^{tr}: what reinforcement learning with a KL weight of 1/t to p_0 tends to.
"""

from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np


def curated_categorical(probabilities: np.ndarray, rewards: np.ndarray, candidates: int) -> np.ndarray:
    """p H (k,) of a categorical distribution ``probabilities`` (k,), each category with its own of ``rewards`` (k,).
    Counts of n curated samples are Multinomial(n, p H), at any n."""
    p, worth = np.asarray(probabilities, np.float64), np.exp(np.asarray(rewards, np.float64) - np.max(rewards))
    share = np.zeros_like(p)
    for rivals in combinations_with_replacement(np.flatnonzero(p), candidates - 1):
        chosen, counts = np.unique(np.array(rivals, np.int64), return_counts=True)
        ways = factorial(candidates - 1) / prod(map(factorial, counts.tolist()))
        likely = ways * float(np.prod(p[chosen] ** counts))
        share += likely * candidates * worth / (worth + float(worth[chosen] @ counts))
    return p * share


def tilted_categorical(probabilities: np.ndarray, rewards: np.ndarray, generations: int = 1) -> np.ndarray:
    """p e^{tr} / Σ p e^{tr} (k,), t = ``generations``: the limit of many candidates."""
    logs = generations * np.asarray(rewards, np.float64)
    tilted = probabilities * np.exp(logs - logs.max())
    return tilted / tilted.sum()


def curated_gaussian(variance: float, slope: float, candidates: int | None) -> tuple[float, float]:
    """By how much curation by r = βx moves the mean of N(μ, s²), and the variance it leaves; β = ``slope``.

    For K = 2 the mean moves by m = ½ E D tanh(βD/2), D ~ N(0, 2s²), and the variance is s² − m²; for K → ∞ (None) by
    βs², and the variance stays. Raises ValueError for other ``candidates``, of which no closed form is known.
    """
    if candidates is None:
        return slope * variance, variance
    if candidates != 2:
        raise ValueError(f"candidates is {candidates}: the law is known of 2, and of None for infinitely many")
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)  # of the standard normal density, times √(2π)
    d = nodes * np.sqrt(2 * variance)
    moved = float(weights @ (d * np.tanh(slope * d / 2)) / np.sqrt(2 * np.pi) / 2)
    return moved, variance - moved**2


def tilted_variance(variance: float, width: float) -> float:
    """The variance (1/s² + 1/τ²)⁻¹ that infinitely many candidates leave with r = −(x − c)²/2τ², τ = ``width``."""
    return 1 / (1 / variance + 1 / width**2)
