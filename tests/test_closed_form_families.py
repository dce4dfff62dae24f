"""The families with a closed form: their moments, their bias, and universes that do not know of each other."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.generators.categorical import CategoricalGenerator, CategoricalSettings
from pipelines.generators.gaussian import GaussianGenerator, GaussianSettings
from pipelines.generators.mixture import MixtureGenerator, MixtureSettings, measure_points, mode_centres
from policies.loops.samples import Samples

FAMILIES = {
    "gaussian": (GaussianGenerator, GaussianSettings(dimension=3)),
    "categorical": (CategoricalGenerator, CategoricalSettings(categories=5)),
    "mixture": (MixtureGenerator, MixtureSettings(modes=4)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_a_universe_is_the_same_alone_and_among_others(family: str, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    generator: Any = kind
    together = generator.fit(settings, generator.truth(settings, [3, 8], 0, 40), [1, 2])
    alone = generator.fit(settings, generator.truth(settings, [8], 0, 40), [2])
    drawn = together.sample(30, [5, 6], 0.5).values
    np.testing.assert_array_equal(drawn[1], alone.sample(30, [6], 0.5).values[0])
    assert not np.array_equal(drawn[0], drawn[1])
    together.save(tmp_path)
    np.testing.assert_array_equal(generator.load(tmp_path).sample(30, [5, 6], 0.5).values, drawn)


@each_family
def test_real_samples_have_a_fixed_order(family: str) -> None:
    kind, settings = FAMILIES[family]
    generator: Any = kind
    first = generator.truth(settings, [3], 0, 40).values
    np.testing.assert_array_equal(generator.truth(settings, [3], 0, 10).values, first[:, :10])
    assert not np.array_equal(generator.truth(settings, [3], 40, 40).values, first)


@each_family
def test_a_sample_of_weight_two_counts_as_two(family: str) -> None:
    kind, settings = FAMILIES[family]
    if family == "mixture":  # resampled by weight, so only a weight of nothing is exact
        values = np.concatenate([np.random.default_rng(0).normal(size=(1, 60, 2)), np.full((1, 60, 2), 50.0)], axis=1)
        fitted = MixtureGenerator.fit(MixtureSettings(modes=4), Samples(values, None, np.repeat([1.0, 0.0], 60)), [0])
        assert np.abs(fitted.means).max() < 10
        return
    generator: Any = kind
    settings = GaussianSettings(dimension=3, covariance="mle") if family == "gaussian" else settings
    data = generator.truth(settings, [0, 1], 0, 30)
    weighted = Samples(data.values, None, np.r_[np.full(10, 2.0), np.ones(20)])
    doubled = Samples(np.concatenate([data.values, data.values[:, :10]], axis=1))
    one, other = (vars(generator.fit(settings, each, [0, 0])) for each in (weighted, doubled))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-12)


def test_gaussian_moments_are_numpys() -> None:
    data = Samples(np.random.default_rng(0).normal(size=(2, 25, 3)))
    known = GaussianGenerator.fit(GaussianSettings(dimension=3, covariance="known"), data, [0, 0])
    np.testing.assert_allclose(known.mean[1], data.values[1].mean(axis=0))
    np.testing.assert_array_equal(known.covariance, np.stack([np.eye(3)] * 2))
    for covariance, ddof in (("unbiased", 1), ("mle", 0)):
        fitted = GaussianGenerator.fit(GaussianSettings(dimension=3, covariance=covariance), data, [0, 0])  # type: ignore[arg-type]
        np.testing.assert_allclose(fitted.mean[1], data.values[1].mean(axis=0))
        np.testing.assert_allclose(fitted.covariance[1], np.cov(data.values[1].T, ddof=ddof))
    weights = np.linspace(1, 2, 25)
    fitted = GaussianGenerator.fit(GaussianSettings(dimension=3), Samples(data.values, None, weights), [0, 0])
    np.testing.assert_allclose(fitted.covariance[0], np.cov(data.values[0].T, aweights=weights))


def test_gaussian_samples_have_the_covariance_times_the_bias() -> None:
    root = np.array([[1.0, 0, 0], [0.5, 2, 0], [0, -1, 0.3]])
    model = GaussianGenerator(np.array([[1.0, 2, 3]]), (root @ root.T)[None])
    drawn = model.sample(200_000, [0], 0.25).values[0]
    np.testing.assert_allclose(drawn.mean(axis=0), [1, 2, 3], atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), 0.25 * root @ root.T, atol=0.02)


def test_a_singular_gaussian_is_sampled_and_changes_no_other_universe() -> None:
    few = np.random.default_rng(0).normal(size=(1, 3, 5))
    many = np.random.default_rng(1).normal(size=(1, 3, 5)) @ np.diag([1, 1, 0, 0, 0])
    settings = GaussianSettings(dimension=5)
    model = GaussianGenerator.fit(settings, Samples(np.concatenate([few, many])), [0, 0])
    drawn = model.sample(50, [1, 2], 1.0).values
    assert np.linalg.matrix_rank(drawn[0] - model.mean[0], tol=1e-6) == 2
    assert np.abs(drawn[1][:, 2:]).max() < 1e-6
    assert np.isnan(model.measure()["log_det"]).all()
    healthy = GaussianGenerator(np.zeros((1, 5)), np.eye(5)[None])
    both = GaussianGenerator(np.zeros((2, 5)), np.stack([model.covariance[0], np.eye(5)]))
    np.testing.assert_array_equal(both.sample(9, [1, 2], 1.0).values[1], healthy.sample(9, [2], 1.0).values[0])


def test_gaussian_measures() -> None:
    model = GaussianGenerator(np.array([[3.0, 4.0]]), np.diag([4.0, 9.0])[None])
    measured = {name: float(value[0]) for name, value in model.measure().items()}
    assert measured == pytest.approx(
        {"w2_squared": 25 + 1 + 4, "variance": 6.5, "mean_square": 12.5, "log_det": np.log(36)}
    )


def test_categorical_bias_sharpens() -> None:
    model = CategoricalGenerator(np.array([[0.1, 0.3, 0.6, 0.0]]))
    drawn = model.sample(200_000, [0], 0.5).values[0]
    expected = np.array([0.01, 0.09, 0.36, 0]) / 0.46
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), expected, atol=0.005)


@pytest.mark.parametrize("bias", [1e-300, 0.0025, 0.3, 1.0])
def test_a_categorical_draws_its_own_categories_however_small_the_bias(bias: float) -> None:
    """p^(1/λ) is no number for a small λ: with λ = .0025, .1^400."""
    model = CategoricalGenerator(np.array([[0.1, 0.1, 0.1, 0.7], [0.5, 0.0, 0.5, 0.0], [1e-320, 0.0, 0.0, 0.0]]))
    drawn = model.sample(2000, [0, 1, 2], bias).values
    assert (drawn[0] == 3).mean() == pytest.approx(
        1 if bias < 0.1 else 0.7 ** (1 / bias) / (3 * 0.1 ** (1 / bias) + 0.7 ** (1 / bias)), abs=0.03
    )
    assert np.bincount(drawn[1], minlength=4) == pytest.approx([1000, 0, 1000, 0], abs=100)
    assert set(drawn[2]) == {0}
    again = CategoricalGenerator.fit(CategoricalSettings(categories=4), Samples(drawn), [0, 0, 0])
    np.testing.assert_allclose(again.probabilities.sum(axis=1), 1)


class _Edge:
    """A stream of the largest number below 1."""

    def random(self, count: int) -> np.ndarray:
        return np.full(count, 1 - 2.0**-53)


def test_a_number_just_below_one_is_the_last_category_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda seed: _Edge())
    for left in ([0.1] * 10, [0.3, 0.3, 0.3, 0.0], [1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]):
        drawn = CategoricalGenerator(np.array([left])).sample(3, [0], 0.7).values
        assert set(drawn[0]) == {np.flatnonzero(left)[-1]}


def test_categorical_measures() -> None:
    measured = CategoricalGenerator(np.array([[0.5, 0.5, 0.0, 0.0]])).measure()
    found = {name: float(value[0]) for name, value in measured.items()}
    assert found == pytest.approx(
        {"total_variation": 0.5, "heterozygosity": 0.5, "entropy": np.log(2), "categories_left": 2}
    )


def test_the_mixture_finds_its_modes_and_loses_them_with_bias() -> None:
    settings = MixtureSettings(modes=9)
    data = MixtureGenerator.truth(settings, [0], 0, 900)
    model = MixtureGenerator.fit(settings, data, [0])
    reference = MixtureGenerator.truth(settings, [1], 0, 900).values[0]
    fair = measure_points(model.sample(900, [2], 1.0).values[0], reference, model.modes)
    assert fair["modes_covered"] == 9
    assert fair["in_mode"] > 0.95
    assert fair["recall"] > 0.9
    biased = measure_points(model.sample(900, [2], 0.1).values[0], reference, model.modes)
    assert biased["precision"] > fair["precision"]
    assert biased["recall"] < 0.6 * fair["recall"]
    one_mode = measure_points(reference[:300].repeat(3, axis=0) * 0.01, reference, mode_centres(9))
    assert one_mode["modes_covered"] == 1


def test_points_are_measured_against_any_number_of_modes() -> None:
    """Ten thousand modes: not by a table of all distances, which takes gigabytes."""
    modes = mode_centres(10_000)
    tracemalloc.start()
    found = measure_points(modes[:1000] + 0.1, modes[:1000], modes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found["modes_covered"], found["in_mode"]) == (1000, 1)
    assert found["mode_entropy"] == pytest.approx(np.log(1000))
    assert peak < 100e6


def test_modes_stand_on_a_square_grid() -> None:
    centres = mode_centres(25)
    assert centres.shape == (25, 2)
    np.testing.assert_allclose(centres.mean(axis=0), 0, atol=1e-12)
    with pytest.raises(ValueError, match=r"mixture\.modes is 24"):
        mode_centres(24)
