"""Intervals over seeds: on the scale of their metric, and none where none would hold what it says."""

from math import exp, log, sqrt

import numpy as np
import pytest
from scipy import stats

from policies.common.intervals import interval, paired, paired_ratio, rank_correlation, scale_of


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_plain_interval_is_students(rng: np.random.Generator) -> None:
    values = rng.normal(size=(5, 2, 3))
    mean, low, high = interval(values)
    expected = stats.t.interval(0.95, 4, loc=values.mean(axis=0), scale=stats.sem(values, axis=0))
    np.testing.assert_allclose([low, high], expected)
    np.testing.assert_allclose(mean, values.mean(axis=0))


def test_distances_have_their_geometric_mean_and_shares_stay_shares() -> None:
    assert interval(np.array([1.0, 10.0, 100.0]), "logarithm").mean == pytest.approx(10)
    mean, low, high = interval(np.array([[1.0, 0.0], [0.98, 0.0], [0.99, 0.01]]), "share")
    assert mean == pytest.approx([0.993, 0.001], abs=1e-3)
    assert low == pytest.approx([0.94, 0], abs=0.05)
    assert high == pytest.approx([1, 0.05], abs=0.05)


@pytest.mark.parametrize(
    ("metric", "scale"),
    [
        ("fid", "logarithm"),
        ("recall", "share"),
        ("evaluator/full", "share"),
        ("w2_squared", "expectation"),
        ("log_det", "plain"),
        ("evaluation/reward", "plain"),
    ],
)
def test_each_metric_has_its_scale(metric: str, scale: str) -> None:
    assert scale_of(metric) == scale


@pytest.mark.parametrize("scale", ["plain", "logarithm", "share", "expectation"])
def test_one_seed_is_itself_and_has_no_interval(scale: str) -> None:
    mean, low, high = interval(np.array([[0.1, 0.7]]), scale)  # type: ignore[arg-type]
    assert mean.tolist() == [0.1, 0.7]
    assert np.isnan([low, high]).all()


def test_nothing_is_ignored() -> None:
    assert np.isnan(interval(np.array([1.0, np.nan, 2.0]))).all()
    assert np.isnan(interval(np.array([1.0, 0.0, 2.0]), "logarithm")[1:]).all()


def test_an_expectation_waits_for_seeds_and_for_more_of_them_where_they_spread(rng: np.random.Generator) -> None:
    tame, wild = rng.lognormal(0, 0.1, 4000), rng.lognormal(0, 1, 4000)
    assert interval(wild, "expectation").mean == wild.mean()
    shown = {(name, seeds): np.isfinite(interval(values[:seeds], "expectation").low)
             for name, values in (("tame", tame), ("wild", wild)) for seeds in (10, 29, 30, 300, 4000)}  # fmt: skip
    assert [seeds for (name, seeds), is_shown in shown.items() if is_shown and name == "tame"] == [30, 300, 4000]
    assert [seeds for (name, seeds), is_shown in shown.items() if is_shown and name == "wild"] in ([], [4000])


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("metric", "sigma"), [("fid", 0.2), ("fid", 1.0), ("evaluation/reward", 0.1)])
def test_intervals_of_skewed_seeds_hold_the_truth(
    metric: str, sigma: float, seeds: int, rng: np.random.Generator
) -> None:
    low, high = interval(rng.lognormal(0, sigma, (seeds, 20_000)), scale_of(metric))[1:]
    truth = 1 if metric == "fid" else exp(sigma**2 / 2)
    assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.97


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_shares_near_their_end_hold_the_truth(seeds: int, rng: np.random.Generator) -> None:
    truth = interval(rng.beta(18, 2, 400_000), "share").mean
    low, high = interval(rng.beta(18, 2, (seeds, 20_000)), "share")[1:]
    assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.97


def test_a_paired_ratio_is_geometric_and_paired() -> None:
    b = np.array([1.0, 10.0, 100.0])
    ratio, low, high = paired_ratio(b * np.array([1, 2, 4]), b)
    assert ratio == pytest.approx(2)
    half = stats.t.ppf(0.975, 2) * log(2) / sqrt(3)
    assert (low, high) == pytest.approx((2 * exp(-half), 2 * exp(half)))
    assert paired_ratio(b, b) == pytest.approx((1, 1, 1))


def test_distances_change_by_a_ratio_and_others_by_a_difference() -> None:
    found, is_ratio = paired(np.array([2.0, 4.0]), np.array([1.0, 2.0]), "fid")
    assert (found.mean, is_ratio) == (pytest.approx(log(2)), True)
    found, is_ratio = paired(np.array([2.0, 4.0]), np.array([1.0, 2.0]), "evaluation/reward")
    assert (found.mean, is_ratio) == (pytest.approx(1.5), False)


def test_a_rank_correlation_of_few_seeds_has_no_interval(rng: np.random.Generator) -> None:
    levels = np.array([0.0, 0.05, 0.1, 0.4])
    found = rank_correlation(levels, -np.exp(levels) * np.ones((3, 1)))
    assert (found.rho, found.each) == (pytest.approx(-1), pytest.approx([-1, -1, -1]))
    values = levels + 0.15 * rng.normal(size=(60, 4))
    for seeds in (3, 5, 10, 49):
        assert np.isnan(rank_correlation(levels, values[:seeds])[1:3]).all()
    rho, low, high, each = rank_correlation(levels, values)
    assert low < rho < high
    assert each[7] == pytest.approx(stats.spearmanr(levels, values[7]).statistic)


def test_equal_shares_are_no_certainty() -> None:
    found = interval(np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 0.6], [1.0, 0.0, 0.7]]), "share")
    assert found.mean == pytest.approx([1, 0, 0.6], abs=1e-2)
    assert np.isnan(found.low).tolist() == np.isnan(found.high).tolist() == [True, True, False]
