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
from typing import Literal, TypedDict, Unpack

import numpy as np

from policies.loops.training_sets import spread

Laws = dict[str, np.ndarray]
Covariance = Literal["unbiased", "mle", "known"]
"""The covariance of a fit to N points is their scatter divided by N − 1 (unbiased) or by N (maximum likelihood), or the
real distribution's own (known): then the mean alone is fitted, and V = 1 in every law."""


Sizes = int | Sequence[int]


class How(TypedDict):
    """What every Gaussian law is given."""

    generations: int
    sampling_bias: float
    covariance: Covariance


def real_only(*, n_ini: int, dimension: int, **how: Unpack[How]) -> Laws:
    """Every model is fitted to the same ``n_ini`` real samples, so that each generation is a first one."""
    once: How = {**how, "generations": 1}
    first = fully_synthetic(**once, n_ini=n_ini, n_synthetic=n_ini, dimension=dimension)
    return {metric: np.repeat(values, how["generations"]) for metric, values in first.items()}


def fully_synthetic(*, n_ini: int, n_synthetic: int, dimension: int, **how: Unpack[How]) -> Laws:
    """Model 1 is fitted to ``n_ini`` real samples, every later one to ``n_synthetic`` samples of its predecessor.

    By Bartlett's decomposition det Σ_t/det(λΣ_{t−1}) is a product of independent χ²_{n−i}/(n − 1), i = 1 … d (for the
    MLE, over n), so E log det Σ_t is a sum of digammas ψ((n − i)/2) + log 2; it exists while every n > d. In one
    dimension E σ_t is a product of √λ c₄(n), c₄(n) = √(2/(n − 1)) Γ(n/2)/Γ((n − 1)/2).
    """
    from scipy.special import digamma, gammaln

    generations, covariance = how["generations"], how["covariance"]
    n = _sizes(generations, n_ini, n_synthetic)
    bias = np.append(1.0, np.full(generations - 1, how["sampling_bias"]))
    shrinkage = _shrinkage(n, covariance)
    variance = np.ones(generations) if covariance == "known" else np.cumprod(bias * shrinkage)
    source = np.concatenate([[1.0], how["sampling_bias"] * variance[:-1]])
    laws = {"variance": variance, "mean_square": np.cumsum(source / n)}
    if covariance == "known":
        return laws
    if n.min() > dimension:
        chi = digamma((n[:, None] - np.arange(1, dimension + 1)) / 2).sum(axis=1)
        laws["log_det"] = np.cumsum(chi + dimension * np.log(2 * bias * shrinkage / (n - 1)))
    if dimension == 1:
        c4 = np.sqrt(2 / (n - 1)) * np.exp(gammaln(n / 2) - gammaln((n - 1) / 2))
        deviation = np.cumprod(c4 * np.sqrt(bias * shrinkage))
        laws["w2_squared"] = laws["mean_square"] + variance + 1 - 2 * deviation
    return laws


def fresh(*, n_ini: int, n_real: Sizes, n_synthetic: Sizes, memory: int = 1, **how: Unpack[How]) -> Laws:
    """Generation t ≥ 2 trains on n_r new real samples and on n_s new ones, spread over the last K = ``memory`` models;
    N = n_r + n_s, p = n_r/N, w_j = n_j/N of model j. Sizes are one for all t ≥ 2, or a sequence for t = 2 … T.

    With V = E tr(Σ)/d and the covariances Γ_ij = E⟨μ_i, μ_j⟩/d of the last K means, which the recursion carries along:
    V_t = p + λ Σ w_j V_j + N/(N−1) (Σ w_j Γ_jj − wᵀΓw);  Γ_tt = (p + λ Σ w_j V_j)/N + wᵀΓw;  Γ_tj = (Γw)_j;
    V_1 = 1, Γ_11 = 1/n_ini. The MLE's V is (1 − 1/N) times as large. The dimension does not enter. For K = 1 this is
    V_t = p + λqV_{t−1} + pq N/(N−1) C_{t−1};  C_t = (p + λqV_{t−1})/N + q²C_{t−1}, C_t = Γ_tt, q = n_s/N.
    """
    generations = how["generations"]
    real, synthetic = _sizes(generations, n_ini, n_real), _sizes(generations, 0, n_synthetic)
    return _mixed(real, synthetic, memory, False, **how)


def fresh_steady_state(*, n_real: int, n_synthetic: int, sampling_bias: float) -> tuple[float, float]:
    """(V, C) to which :func:`fresh` tends from any n_ini, unbiased covariance, κ = q/((N − 1)(1 + q)):

    V = p(1 + κ)/(1 − λq(1 + κ));  C = (p + λqV)/(N(1 − q²)).
    """
    total = n_real + n_synthetic
    p, q = n_real / total, n_synthetic / total
    inflation = 1 + q / ((total - 1) * (1 + q))
    v = p * inflation / (1 - sampling_bias * q * inflation)
    return v, (p + sampling_bias * q * v) / (total * (1 - q**2))


def corrected(*, n_ini: int, n_real: Sizes, n_synthetic: Sizes, kept: float, **how: Unpack[How]) -> Laws:
    """As :func:`fresh`, but of the synthetic samples only the share c = ``kept`` is the model's, each with that
    probability; the others are new real ones (Gillman et al., 2407.02087, with the ideal corrector).

    Given the model, a synthetic sample has the mean cμ and, a coordinate, the variance
    v = cλV + (1 − c) + c(1 − c)C: C' = (n_r + n_s v)/N² + (n_s c/N)² C;
    V' = [(n_r + n_s(v + c²C))/N − C'] N/(N − 1).
    """
    generations, covariance = how["generations"], how["covariance"]
    real, synthetic = _sizes(generations, n_ini, n_real), _sizes(generations, 0, n_synthetic)
    total = real + synthetic
    shrinkage = _shrinkage(total, covariance)
    v, c = shrinkage.copy(), 1 / total
    for t in range(1, generations):
        n, share = total[t], synthetic[t] / total[t]
        single = kept * how["sampling_bias"] * v[t - 1] + (1 - kept) + kept * (1 - kept) * c[t - 1]
        c[t] = (real[t] + synthetic[t] * single) / n**2 + (share * kept) ** 2 * c[t - 1]
        if covariance != "known":
            square = (real[t] + synthetic[t] * (single + kept**2 * c[t - 1])) / n
            v[t] = shrinkage[t] * (square - c[t]) * n / (n - 1)
    return {"variance": v, "mean_square": c}


def augmentation(*, n_real: int, n_synthetic: int, memory: int = 1, **how: Unpack[How]) -> Laws:
    """As :func:`fresh`, but with the same ``n_real`` real samples at every generation, the first one's too. The
    expectation is over the real set as well.

    The real set's mean a is one more of those that Γ speaks of, Γ_aa = Γ_a1 = Γ_11 = 1/n_r, its weight is p, and it
    brings no new noise: V_t = (n_r − 1)/(N − 1) + λ Σ w_j V_j + N/(N−1) (Σ w_j Γ_jj − wᵀΓw), the sums in Γ over a too;
    Γ_tt = λ Σ w_j V_j/N + wᵀΓw.
    """
    generations = how["generations"]
    real, synthetic = _sizes(generations, n_real, n_real), _sizes(generations, 0, n_synthetic)
    return _mixed(real, synthetic, memory, True, **how)


def _mixed(real: np.ndarray, synthetic: np.ndarray, memory: int, fixed: bool, **how: Unpack[How]) -> Laws:
    """The recursion of :func:`fresh` and :func:`augmentation`; sizes (generations,)."""
    total, covariance = real + synthetic, how["covariance"]
    shrinkage = _shrinkage(total, covariance)
    v, c = shrinkage.copy(), 1 / total
    means = np.full((2, 2), c[0])  # Γ of the real set's mean and of the last models', the latest at the end
    for t in range(1, len(total)):
        n = total[t]
        remembered = spread(int(synthetic[t]), min(memory, t))
        weights = np.array([real[t] if fixed else 0, *remembered]) / n
        drawn = how["sampling_bias"] * weights[1:] @ v[t - len(remembered) : t]
        pulled = weights @ means
        c[t] = (drawn if fixed else real[t] / n + drawn) / n + pulled @ weights
        within = ((real[t] - 1) / (n - 1) if fixed else real[t] / n) + drawn
        if covariance != "known":
            v[t] = shrinkage[t] * (within + n / (n - 1) * (weights @ means.diagonal() - pulled @ weights))
        means = np.block([[means, pulled[:, None]], [pulled, c[t]]])
        if t >= memory:
            means = np.delete(np.delete(means, 1, axis=0), 1, axis=1)
    return {"variance": v, "mean_square": c}


def accumulate(*, n_ini: int, n_synthetic: int, **how: Unpack[How]) -> Laws:
    """Every generation trains on the real set and on the ``n_synthetic`` samples of each earlier model (Gerstgrasser
    et al., 2404.01413).

    A pool of N points with scatter/N = S, joined by n of variance λΣ about its mean, has
    S' = [NS + λΣ n(1 − 1/(N + n))]/(N + n). For the MLE (Σ = S), λ = 1 and n_ini = n this is
    E tr(Σ_t)/d = Π_{k≤t} (1 − 1/(k²n)), which falls to sin(π/√n)/(π/√n) and no further.
    """
    generations, covariance = how["generations"], how["covariance"]
    pool = n_ini + n_synthetic * np.arange(generations)
    fitted = _shrinkage(pool, covariance) * pool / (pool - 1)
    s, m = np.empty(generations), np.empty(generations)
    s[0], m[0] = 1 - 1 / n_ini, 1 / n_ini
    for t in range(1, generations):
        drawn = how["sampling_bias"] * (1 if covariance == "known" else fitted[t - 1] * s[t - 1])
        s[t] = (pool[t - 1] * s[t - 1] + drawn * n_synthetic * (1 - 1 / pool[t])) / pool[t]
        m[t] = m[t - 1] + n_synthetic * drawn / pool[t] ** 2
    return {"variance": np.ones(generations) if covariance == "known" else fitted * s, "mean_square": m}


def accumulate_subsample(*, n: int, **how: Unpack[How]) -> Laws:
    """As :func:`accumulate` with n_ini = n_synthetic = n, but model t is fitted to n points drawn from the pool of nt
    without replacement (Kazdan et al., 2410.16713).

    The pool has scatter/(nt) = S_t and U_t = nt/(nt − 1) S_t; a fit has V_t = gU_t, g = 1 (MLE: 1 − 1/n). The model's
    mean strays from the pool's by (1 − 1/t)U_t/n, the batch's by D_t = [(1 − 1/t)U_t + λV_t]/n, so
    S_{t+1} = [tS_t + λ(1 − 1/n)V_t]/(t + 1) + t/(t + 1)² D_t.
    """
    generations, covariance = how["generations"], how["covariance"]
    g = float(_shrinkage(np.array([n]), covariance)[0])
    s, m = 1 - 1 / n, 1 / n
    variance, mean_square = np.empty(generations), np.empty(generations)
    for t in range(1, generations + 1):
        u = n * t / (n * t - 1) * s
        variance[t - 1], mean_square[t - 1] = 1 if covariance == "known" else g * u, m + (1 - 1 / t) * u / n
        drawn = how["sampling_bias"] * variance[t - 1]
        strays = ((1 - 1 / t) * u + drawn) / n
        s = (t * s + drawn * (1 - 1 / n)) / (t + 1) + t / (t + 1) ** 2 * strays
        m += strays / (t + 1) ** 2
    return {"variance": variance, "mean_square": mean_square}


def categorical(*, generations: int, n_ini: int, n: int, probabilities: Sequence[float]) -> Laws:
    """Fully synthetic, frequencies as the fit: a fit to n samples keeps 1 − 1/n of the heterozygosity it samples from
    (genetic drift, the Wright–Fisher model). ``probabilities`` (k,) is the real distribution."""
    p = np.asarray(probabilities, dtype=np.float64)
    return {"heterozygosity": (1 - np.sum(p**2)) * np.cumprod(1 - 1 / _sizes(generations, n_ini, n))}


def corrected_categorical(
    *, generations: int, n_ini: int, n_real: Sizes, n_synthetic: Sizes, kept: float, probabilities: Sequence[float]
) -> Laws:
    """As :func:`corrected`, frequencies as the fit. With S = E Σp², u the real distribution and q = cp + (1 − c)u that
    of a synthetic sample, a fit to n_r + n_s = N samples has, as E p = u at every generation,
    S' = [n_r(1 − Σu²) + n_s(1 − Σq²)]/N² + Σ(n_r u + n_s q)²/N², Σq² = c²S + (1 − c²)Σu², Σuq = Σu².
    """
    uneven = float(np.sum(np.asarray(probabilities, dtype=np.float64) ** 2))
    real, synthetic = _sizes(generations, n_ini, n_real), _sizes(generations, 0, n_synthetic)
    s = np.empty(generations)
    for t, (r, m) in enumerate(zip(real, synthetic, strict=True)):
        q = kept**2 * s[t - 1] + (1 - kept**2) * uneven if t else uneven
        s[t] = (r * (1 - uneven) + m * (1 - q) + (r**2 + 2 * r * m) * uneven + m**2 * q) / (r + m) ** 2
    return {"heterozygosity": 1 - s}


def _sizes(generations: int, first: int, later: Sizes) -> np.ndarray:
    """float64 (generations,): ``first``, then ``later``."""
    rest = [later] * (generations - 1) if isinstance(later, int) else later
    return np.array([first, *rest], dtype=np.float64)


def _shrinkage(n: np.ndarray, covariance: Covariance) -> np.ndarray:
    """E of a fitted variance over the variance of what was fitted, for fits to ``n`` ≥ 2 points, (generations,)."""
    return 1 - 1 / n if covariance == "mle" else np.ones(len(n))
