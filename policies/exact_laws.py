"""What a self-consuming loop does on average, exactly: the laws of the Gaussian and the categorical family.

The real distribution is N(0, I) in d dimensions. Model t is N(μ_t, Σ_t), fitted to its training set, and its samples
follow N(μ_t, λΣ_t), where λ in (0, 1] is the sampling bias. Every law returns the expected value of each metric it
knows at generations 1, 2, …, T, arrays (generations,):

- ``variance``: E tr(Σ_t)/d, ``mean_square``: E‖μ_t‖²/d, ``log_det``: E log det Σ_t,
- ``w2_squared``: E W2²(N(μ_t, Σ_t), N(0, I)), the squared 2-Wasserstein distance,
- ``heterozygosity``: E[1 − Σ_k p_k²] of a categorical distribution p.

A metric without an exact law is left out. All Gaussian laws rest on two facts about N points that fall into groups:
their scatter is the groups' own scatters plus that of the groups' means, and E scatter/(N − 1) of equal points is their
variance. Loops and notation: Alemohammad et al., "Self-Consuming Generative Models Go MAD", 2307.01850.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Laws = dict[str, np.ndarray]
Covariance = Literal["unbiased", "mle"]
"""The covariance of a fit to N points is their scatter divided by N − 1 (unbiased) or by N (maximum likelihood)."""


def fully_synthetic(
    *, generations: int, n_ini: int, n_synthetic: int, dimension: int, sampling_bias: float, covariance: Covariance
) -> Laws:
    """Model 1 is fitted to ``n_ini`` real samples, every later one to ``n_synthetic`` samples of its predecessor.

    By Bartlett's decomposition det Σ_t/det(λΣ_{t−1}) is a product of independent χ²_{n−i}/(n − 1), i = 1 … d (for the
    MLE, over n), so E log det Σ_t is a sum of digammas ψ((n − i)/2) + log 2; it exists while every n > d. In one
    dimension E σ_t is a product of √λ c₄(n), c₄(n) = √(2/(n − 1)) Γ(n/2)/Γ((n − 1)/2).
    """
    from scipy.special import digamma, gammaln

    n = _sizes(generations, n_ini, n_synthetic)
    bias = np.append(1.0, np.full(generations - 1, sampling_bias))
    shrinkage = _shrinkage(n, covariance)
    variance = np.cumprod(bias * shrinkage)
    source = np.concatenate([[1.0], sampling_bias * variance[:-1]])
    laws = {"variance": variance, "mean_square": np.cumsum(source / n)}
    if n.min() > dimension:
        chi = digamma((n[:, None] - np.arange(1, dimension + 1)) / 2).sum(axis=1)
        laws["log_det"] = np.cumsum(chi + dimension * np.log(2 * bias * shrinkage / (n - 1)))
    if dimension == 1:
        c4 = np.sqrt(2 / (n - 1)) * np.exp(gammaln(n / 2) - gammaln((n - 1) / 2))
        deviation = np.cumprod(c4 * np.sqrt(bias * shrinkage))
        laws["w2_squared"] = laws["mean_square"] + variance + 1 - 2 * deviation
    return laws


def fresh(
    *,
    generations: int,
    n_ini: int,
    n_real: int | Sequence[int],
    n_synthetic: int | Sequence[int],
    sampling_bias: float,
    covariance: Covariance,
) -> Laws:
    """Generation t ≥ 2 trains on n_r new real samples and n_s samples of its predecessor; N = n_r + n_s, p = n_r/N,
    q = n_s/N. Sizes are one for all t ≥ 2, or a sequence for t = 2 … T.

    With V = E tr(Σ)/d, C = E‖μ‖²/d:  V_t = p + λqV_{t−1} + pq N/(N−1) C_{t−1};  C_t = (p + λqV_{t−1})/N + q²C_{t−1};
    V_1 = 1, C_1 = 1/n_ini. The MLE's V is (1 − 1/N) times as large. The dimension does not enter.
    """
    real, synthetic = _sizes(generations, n_ini, n_real), _sizes(generations, 0, n_synthetic)
    total = real + synthetic
    p, q, shrinkage = real / total, synthetic / total, _shrinkage(total, covariance)
    v, c = np.empty(generations), np.empty(generations)
    v[0], c[0] = shrinkage[0], 1 / n_ini
    for t in range(1, generations):
        within = p[t] + sampling_bias * q[t] * v[t - 1]
        v[t] = shrinkage[t] * (within + p[t] * q[t] * total[t] / (total[t] - 1) * c[t - 1])
        c[t] = within / total[t] + q[t] ** 2 * c[t - 1]
    return {"variance": v, "mean_square": c}


def fresh_steady_state(*, n_real: int, n_synthetic: int, sampling_bias: float) -> tuple[float, float]:
    """(V, C) to which :func:`fresh` tends from any n_ini, unbiased covariance, κ = q/((N − 1)(1 + q)):

    V = p(1 + κ)/(1 − λq(1 + κ));  C = (p + λqV)/(N(1 − q²)).
    """
    total = n_real + n_synthetic
    p, q = n_real / total, n_synthetic / total
    inflation = 1 + q / ((total - 1) * (1 + q))
    v = p * inflation / (1 - sampling_bias * q * inflation)
    return v, (p + sampling_bias * q * v) / (total * (1 - q**2))


def augmentation(
    *, generations: int, n_real: int, n_synthetic: int, sampling_bias: float, covariance: Covariance
) -> Laws:
    """Every generation trains on the same ``n_real`` real samples and, from the second on, on ``n_synthetic`` samples
    of its predecessor. The expectation is over the real set too.

    The model's mean stays unbiased for the real set's mean a, so C = E‖μ − a‖²/d obeys a recursion of its own, and
    E‖μ_t‖²/d = 1/n_r + C_t:  V_t = (n_r − 1)/(N − 1) + λqV_{t−1} + pq N/(N−1) C_{t−1};  C_t = λqV_{t−1}/N + q²C_{t−1};
    V_1 = 1, C_1 = 0. The MLE's V is (1 − 1/N) times as large.
    """
    total = n_real + n_synthetic
    p, q = n_real / total, n_synthetic / total
    shrinkage = _shrinkage(_sizes(generations, n_real, total), covariance)
    v, c = np.empty(generations), np.empty(generations)
    v[0], c[0] = shrinkage[0], 0.0
    for t in range(1, generations):
        synthetic = sampling_bias * q * v[t - 1]
        v[t] = shrinkage[t] * ((n_real - 1) / (total - 1) + synthetic + p * q * total / (total - 1) * c[t - 1])
        c[t] = synthetic / total + q**2 * c[t - 1]
    return {"variance": v, "mean_square": 1 / n_real + c}


def accumulate(*, generations: int, n_ini: int, n_synthetic: int, sampling_bias: float, covariance: Covariance) -> Laws:
    """Every generation trains on the real set and on the ``n_synthetic`` samples of each earlier model (Gerstgrasser
    et al., 2404.01413).

    A pool of N points with scatter/N = S, joined by n of variance λΣ about its mean, has
    S' = [NS + λΣ n(1 − 1/(N + n))]/(N + n). For the MLE (Σ = S), λ = 1 and n_ini = n this is
    E tr(Σ_t)/d = Π_{k≤t} (1 − 1/(k²n)), which falls to sin(π/√n)/(π/√n) and no further.
    """
    pool = n_ini + n_synthetic * np.arange(generations)
    fitted = _shrinkage(pool, covariance) * pool / (pool - 1)
    s, m = np.empty(generations), np.empty(generations)
    s[0], m[0] = 1 - 1 / n_ini, 1 / n_ini
    for t in range(1, generations):
        drawn = sampling_bias * fitted[t - 1] * s[t - 1]
        s[t] = (pool[t - 1] * s[t - 1] + drawn * n_synthetic * (1 - 1 / pool[t])) / pool[t]
        m[t] = m[t - 1] + (n_synthetic / pool[t]) ** 2 * drawn / n_synthetic
    return {"variance": fitted * s, "mean_square": m}


def accumulate_subsample(*, generations: int, n: int, sampling_bias: float, covariance: Covariance) -> Laws:
    """As :func:`accumulate` with n_ini = n_synthetic = n, but model t is fitted to n points drawn from the pool of nt
    without replacement (Kazdan et al., 2410.16713).

    The pool has scatter/(nt) = S_t and U_t = nt/(nt − 1) S_t; a fit has E Σ_t = gU_t, g = 1 (MLE: 1 − 1/n). The model's
    mean strays from the pool's by (1 − 1/t)U_t/n, the batch's by D_t = (1 − 1/t + λg)U_t/n, so
    S_{t+1} = [tS_t + λg(1 − 1/n)U_t]/(t + 1) + t/(t + 1)² D_t.
    """
    g = float(_shrinkage(np.array([n]), covariance)[0])
    drawn = sampling_bias * g
    s, m = 1 - 1 / n, 1 / n
    variance, mean_square = np.empty(generations), np.empty(generations)
    for t in range(1, generations + 1):
        u = n * t / (n * t - 1) * s
        variance[t - 1], mean_square[t - 1] = g * u, m + (1 - 1 / t) * u / n
        strays = (1 - 1 / t + drawn) * u / n
        s = (t * s + drawn * (1 - 1 / n) * u) / (t + 1) + t / (t + 1) ** 2 * strays
        m += strays / (t + 1) ** 2
    return {"variance": variance, "mean_square": mean_square}


def categorical(*, generations: int, n_ini: int, n: int, probabilities: Sequence[float]) -> Laws:
    """Fully synthetic, frequencies as the fit: a fit to n samples keeps 1 − 1/n of the heterozygosity it samples from
    (genetic drift, the Wright–Fisher model). ``probabilities`` (k,) is the real distribution."""
    p = np.asarray(probabilities, dtype=np.float64)
    return {"heterozygosity": (1 - np.sum(p**2)) * np.cumprod(1 - 1 / _sizes(generations, n_ini, n))}


def _sizes(generations: int, first: int, later: int | Sequence[int]) -> np.ndarray:
    """float64 (generations,): ``first``, then ``later``."""
    rest = [later] * (generations - 1) if isinstance(later, int) else later
    return np.array([first, *rest], dtype=np.float64)


def _shrinkage(n: np.ndarray, covariance: Covariance) -> np.ndarray:
    """E of a fitted variance over the variance of what was fitted, for fits to ``n`` ≥ 2 points, (generations,)."""
    return 1 - 1 / n if covariance == "mle" else np.ones(len(n))
