"""The effective sample size: its distance, its curve, the loop's limit, and the largest admissible share."""

from math import gamma, sqrt

import numpy as np
import pytest
from scipy.linalg import sqrtm

from policies.common.intervals import interval
from policies.loops.effective_samples import (
    effective_sample_size,
    expected_distance,
    largest_admissible,
    limits,
    wasserstein_squared,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def fit(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (universes, d) and unbiased covariance (universes, d, d) of points (universes, n, d)."""
    mean = points.mean(axis=1)
    centred = points - mean[:, None]
    return mean, centred.mT @ centred / (points.shape[1] - 1)


def assert_equal_means(a: np.ndarray, b: np.ndarray) -> None:
    """Within 3 standard errors of the difference, which are at most 1 %."""
    error = sqrt(a.var() / len(a) + b.var() / len(b))
    assert error < 0.01 * b.mean()
    assert abs(a.mean() - b.mean()) < 3 * error


def one_dimensional(n: float) -> float:
    """E W2² of a fit to n samples: E μ² = 1/n, E σ² = 1, E σ = c₄(n)."""
    return 1 / n + 2 - 2 * sqrt(2 / (n - 1)) * gamma(n / 2) / gamma((n - 1) / 2)


def test_distance_is_the_trace_formula(rng: np.random.Generator) -> None:
    mean, covariance = fit(rng.standard_normal((2, 3, 6, 4)).reshape(6, 6, 4))
    expected = [m @ m + 4 + np.trace(c) - 2 * np.trace(sqrtm(c)).real for m, c in zip(mean, covariance, strict=True)]
    distance = wasserstein_squared(mean.reshape(2, 3, 4), covariance.reshape(2, 3, 4, 4))
    np.testing.assert_allclose(distance, np.reshape(expected, (2, 3)), rtol=1e-9)


def test_distance_takes_a_singular_covariance() -> None:
    """Rounding makes an eigenvalue of 0 negative; each lost dimension is 1 away."""
    ones = np.ones((3, 3)) - 1e-15 * np.eye(3)
    assert wasserstein_squared(np.zeros(3), ones) == pytest.approx((sqrt(3) - 1) ** 2 + 2, rel=1e-6)


@pytest.mark.parametrize(("samples", "dimension"), [(10, 3), (4, 3), (3, 5), (2, 4)])
def test_expected_distance_is_that_of_fits_to_samples(samples: int, dimension: int, rng: np.random.Generator) -> None:
    simulated = wasserstein_squared(*fit(rng.standard_normal((40_000, samples, dimension))))
    mean, error = expected_distance(samples, dimension, universes=40_000, seed=1)
    total = sqrt(error**2 + simulated.var() / len(simulated))
    assert total < 0.01 * mean
    assert abs(mean - simulated.mean()) < 3 * total


def test_expected_distance_knows_its_own_error() -> None:
    estimates = np.array([expected_distance(20, 1, universes=400, seed=seed) for seed in range(400)])
    assert (estimates[:, 0].std() / estimates[:, 1].mean()) == pytest.approx(1, abs=0.15)
    assert estimates[:, 0].mean() == pytest.approx(one_dimensional(20), rel=0.01)


@pytest.mark.parametrize("samples", [2, 3, 37, 150])
def test_effective_sample_size_inverts_the_expected_distance(samples: int) -> None:
    exact = one_dimensional(samples)
    distances = exact * np.tile([0.97, 1.01, 1.0, 1.02, 1.0], 8)
    estimate = effective_sample_size(distances, dimension=1)
    assert estimate.value == pytest.approx(samples, rel=0.01)
    _, low, high = interval(distances)
    assert estimate.low == 2 or one_dimensional(estimate.low) == pytest.approx(high, rel=0.01)
    assert samples < 10 or one_dimensional(estimate.high) == pytest.approx(low, rel=0.01)


def test_effective_sample_size_of_other_fits() -> None:
    """Mean only: E W2² = d/n. Maximum likelihood: E σ² = 1 − 1/n, E σ = √(1 − 1/n) c₄(n)."""
    known = effective_sample_size(np.tile([0.09, 0.11, 0.1], 10), dimension=4, covariance="known")
    assert known.value == pytest.approx(40)
    assert known.low < 40 < known.high
    n = 12
    mle = 1 / n + 2 - 1 / n - 2 * sqrt(1 - 1 / n) * sqrt(2 / (n - 1)) * gamma(n / 2) / gamma((n - 1) / 2)
    assert effective_sample_size(np.array([mle]), 1, covariance="mle").value == pytest.approx(n, rel=0.01)


def test_effective_sample_size_without_an_answer() -> None:
    estimate = effective_sample_size(np.array([one_dimensional(30)]), dimension=1)
    assert estimate.value == pytest.approx(30, rel=0.01)
    assert np.isnan([estimate.low, estimate.high]).all()
    for impossible in (0.0, 5.0):
        with pytest.raises(ValueError, match=r"no fit to 2 to \d+ samples in 1 dimensions"):
            effective_sample_size(np.full(3, impossible), dimension=1)


@pytest.mark.parametrize(
    ("n_real", "n_synthetic", "sampling_bias", "dimension"), [(6, 10, 0.8, 2), (10, 15, 1.0, 1), (2, 3, 0.9, 6)]
)
def test_limit_is_that_of_the_loop_itself(
    n_real: int, n_synthetic: int, sampling_bias: float, dimension: int, rng: np.random.Generator
) -> None:
    universes = 15_000
    mean, covariance = np.zeros((universes, dimension)), np.tile(np.eye(dimension), (universes, 1, 1))
    distances = []
    for _ in range(20):
        real = rng.standard_normal((universes, n_real, dimension))
        values, vectors = np.linalg.eigh(sampling_bias * covariance)
        root = vectors * np.sqrt(values.clip(min=0))[:, None]
        drawn = mean[:, None] + rng.standard_normal((universes, n_synthetic, dimension)) @ root.mT
        mean, covariance = fit(np.concatenate([real, drawn], axis=1))
        distances.append(wasserstein_squared(mean, covariance))
    limit = limits(n_real, n_synthetic, sampling_bias, (universes, dimension), seed=2)[0]
    assert limit.shape == (universes,)
    assert_equal_means(limit, np.mean(distances[12:], axis=0))


@pytest.mark.parametrize(("n_real", "n_synthetic", "dimension"), [(1000, 500, 1), (1000, 1000, 2)])
def test_unbiased_synthetic_data_are_worth_their_share(n_real: int, n_synthetic: int, dimension: int) -> None:
    """n_e/n_r → 1 + q for n_r ≫ d; here to 2 %."""
    limit = limits(n_real, n_synthetic, 1.0, (10_000, dimension), seed=0)[0]
    expected = 1 + n_synthetic / (n_real + n_synthetic)
    assert effective_sample_size(limit, dimension).value / n_real == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("sampling_bias", "dimension", "universes"), [(0.6, 2, 20_000), (0.75, 1, 60_000)])
def test_largest_admissible_saturates(sampling_bias: float, dimension: int, universes: int) -> None:
    """n_s* = [4(2−λ) + (d+1)(½ + 1.5λ − λ²)]/(1−λ)² for n_r ≫ n_s; at 50 times to 10 %."""
    curvature = (dimension + 1) * (0.5 + 1.5 * sampling_bias - sampling_bias**2)
    limit = (4 * (2 - sampling_bias) + curvature) / (1 - sampling_bias) ** 2
    result = largest_admissible(round(50 * limit), sampling_bias, dimension, universes, seed=0)
    assert result.n_synthetic == pytest.approx(limit, rel=0.1)
    assert result.low is not None
    assert result.high is not None
    assert 0.8 * limit < result.low < result.n_synthetic < result.high < 1.2 * limit


@pytest.mark.parametrize(("n_real", "bias", "dimension", "universes"), [(5, 0.5, 3, 3000), (60, 0.6, 1, 10_000)])
def test_largest_admissible_is_where_the_effective_share_is_one(
    n_real: int, bias: float, dimension: int, universes: int
) -> None:
    """To first order n_e/n_r is the distance of n_r real samples over that of the loop."""
    most = largest_admissible(n_real, bias, dimension, universes, seed=0, most=200).n_synthetic
    assert most is not None
    worth, error = expected_distance(n_real, dimension, 100 * universes, seed=2)
    assert error < 0.003 * worth
    shares = [
        worth / limits(n_real, n, bias, (2 * universes, dimension), seed=1)[0].mean()
        for n in (most // 2, most, 2 * most)
    ]
    assert shares[0] > 1.01
    assert shares[1] == pytest.approx(1, abs=0.02)
    assert shares[2] < 0.99


def test_admissible_without_a_largest_is_none() -> None:
    assert largest_admissible(50, 1.0, 1, universes=2, seed=0) == (None, None, None)
    assert largest_admissible(5000, 0.9, 1, universes=2000, seed=0, most=40).n_synthetic is None
