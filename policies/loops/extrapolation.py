"""What leading a model away from its own samples does, exactly: Neon on the Gaussian family, SIMS on one Gaussian.

Notation: truth N(0, 1) in each coordinate, the model draws with λ times its covariance, the sampling bias λ.
"""

import numpy as np

from policies.loops.laws import Laws


def neon_risk(weight: float, sampling_bias: float, n_real: int, own: int) -> float:
    """E(λθ_N − 1)², the error of the variance that is drawn: θ_N = (1 + w)θ_r − wθ_s of the variances of ``n_real``
    real samples and of ``own`` ones that θ_r draws.

    θ_s = λθ_r χ²/(m − 1), so with a = 1 − λ, u = 1 + 2/(n − 1) and v = 2/(m − 1) it is the parabola
    λ²u[(1 + wa)² + w²λ²v] − 2λ(1 + wa) + 1 in w.
    """
    u, v, slope = 1 + 2 / (n_real - 1), 2 / (own - 1), 1 - sampling_bias
    spread = (1 + weight * slope) ** 2 + weight**2 * sampling_bias**2 * v
    return sampling_bias**2 * u * spread - 2 * sampling_bias * (1 + weight * slope) + 1


def neon_best_weight(sampling_bias: float, n_real: int, own: int) -> float:
    """The w of least :func:`neon_risk`, a(1 − λu)/(λu(a² + λ²v)); 1/λ as both sizes grow, and about 0 at λ = 1."""
    u, v, slope = 1 + 2 / (n_real - 1), 2 / (own - 1), 1 - sampling_bias
    return slope * (1 - sampling_bias * u) / (sampling_bias * u * (slope**2 + sampling_bias**2 * v))


def neon_fully_synthetic(
    *, generations: int, sampling_bias: float, n_ini: int, n: int, weight: float, own: int
) -> Laws:
    """As :func:`policies.loops.laws.fully_synthetic`, unbiased covariance, of models that are led away by ``weight``
    before they draw: a fit of variance V and mean square C becomes V' = (1 + w(1 − λ))V, C' = C + w²λV/m; then
    V = λV', C = C' + λV'/n. The variance keeps its level at w = 1/λ alone.
    """
    v, c = 1.0, 1 / n_ini
    variance, mean_square = np.empty(generations), np.empty(generations)
    for t in range(generations):
        if t:
            v, c = sampling_bias * v, c + sampling_bias * v / n
        v, c = (1 + weight * (1 - sampling_bias)) * v, c + weight**2 * sampling_bias * v / own
        variance[t], mean_square[t] = v, c
    return {"variance": variance, "mean_square": mean_square}


def sims_deviation(real: float, own: float, strength: float) -> float:
    """The standard deviation σ_r(σ_r/σ_s)^ω that the probability-flow ODE draws with the score (1 + ω)s_r − ωs_s of two
    Gaussians around 0, of deviations ``real`` and ``own``. In coordinates of the noise level s it is
    d log x/d log s = (1 + ω)s²/(s² + σ_r²) − ωs²/(s² + σ_s²), from large s to 0."""
    return real * (real / own) ** strength


def power_deviation(real: float, own: float, strength: float) -> float:
    """What is not drawn: the deviation of the density ∝ p_r^{1+ω} p_s^{−ω}, whose score is the same at s = 0 alone.
    Raises ValueError where it cannot be normalised."""
    precision = (1 + strength) / real**2 - strength / own**2
    if precision <= 0:
        raise ValueError(f"with strength {strength:g} the density has no finite mass")
    return float(precision**-0.5)
