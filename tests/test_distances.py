"""Distances agree with their definitions, worked out by hand or by another library."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits

from pipelines.measures.distances import (
    frechet_distance,
    measure_images,
    memorisation,
    precision_recall_density_coverage,
)
from pipelines.measures.features import Extractor, train_extractor

ORDER = np.random.default_rng(0).permutation(1797)
IMAGES = (load_digits().images * 255 / 16).round().astype(np.uint8)[ORDER, ..., None]
LABELS = load_digits().target[ORDER]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor(IMAGES[:1000], LABELS[:1000], classes=10, seed=0)


def test_frechet_distance_is_the_one_with_a_matrix_root(rng: np.random.Generator) -> None:
    a = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 4))
    b = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 4)) + 1
    first, second = np.cov(a.T), np.cov(b.T)
    squared = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    expected = squared + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_shift_is_its_square(rng: np.random.Generator) -> None:
    a = rng.standard_normal((300, 32))
    assert frechet_distance(a, a + 0.5) == pytest.approx(32 * 0.25, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_singular_covariances_is_exact(rng: np.random.Generator) -> None:
    few = rng.standard_normal((10, 64))  # of rank 9
    assert 0 <= frechet_distance(few, few) < 1e-9
    assert frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    assert frechet_distance(few + 1e8, few + 1e8 + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    # Along one direction each, at right angles: tr Σ_a + tr Σ_b + the squared distance of the means.
    line = np.arange(4.0)[:, None]
    assert frechet_distance(line * [1, 0, 0], line * [0, 2, 0]) == pytest.approx((5 / 3) * (1 + 4) + 1.5**2 + 3**2)


def test_frechet_distance_of_what_has_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match="1 samples are too few for this figure: give 2 or more"):
        frechet_distance(np.zeros((1, 3)), np.zeros((1, 3)))
    broken = np.zeros((5, 3))
    broken[1, 0], broken[3, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 samples have features that are no finite numbers"):
        frechet_distance(np.zeros((5, 3)), broken)


def test_precision_recall_density_and_coverage_by_hand() -> None:
    # Radii of the real balls: 1.5, 1.5, 3, 1, 1; of the generated ones: 1.7, .2, .2, .1, .1.
    real = np.array([[-1.5], [0.0], [3.0], [10.0], [11.0]])
    generated = np.array([[0.5], [2.2], [2.4], [50.0], [50.1]])
    expected = {"precision": 0.6, "recall": 0.2, "density": 0.8, "coverage": 0.4}
    assert precision_recall_density_coverage(real, generated, k=1) == pytest.approx(expected)


def test_balls_of_equal_samples_are_points_that_hold_what_is_equal(rng: np.random.Generator) -> None:
    spot = rng.standard_normal(48)
    real = np.concatenate([np.tile(spot, (20, 1)), rng.standard_normal((20, 48)) + 50])
    collapsed = np.tile(spot, (40, 1))
    figures = precision_recall_density_coverage(real, collapsed)
    assert figures == {"precision": 1.0, "recall": 0.5, "density": 20 / 5, "coverage": 0.5}
    beside = precision_recall_density_coverage(real, collapsed + 1e-9)
    assert (beside["precision"], beside["recall"]) == (0.0, 0.0)
    same = precision_recall_density_coverage(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)


def test_sets_without_enough_neighbours_or_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 samples are too few for this figure: give 6 or more"):
        precision_recall_density_coverage(np.zeros((5, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="7 generated samples cannot be compared with 6 real ones"):
        precision_recall_density_coverage(np.zeros((6, 2)), np.zeros((7, 2)))


def test_density_of_the_real_distribution_is_one_for_any_k(rng: np.random.Generator) -> None:
    real, generated = rng.standard_normal((2, 2000, 2))
    for k in (2, 5):
        assert precision_recall_density_coverage(real, generated, k)["density"] == pytest.approx(1, abs=0.06)


def test_memorisation_is_one_in_twenty_for_the_real_distribution(rng: np.random.Generator) -> None:
    training, reference, generated = rng.standard_normal((3, 4000, 2))
    assert memorisation(generated, training, reference) == pytest.approx(0.05, abs=0.015)
    assert memorisation(training[:50], training, reference) == 1
    assert memorisation(generated + 100, training, reference) == 0


def test_copies_are_memorised_whatever_the_reference_holds(rng: np.random.Generator) -> None:
    training, reference = rng.integers(0, 256, (2, 300, 64)).astype(float)
    for copied in (0, 10, 30, 300):  # of the reference, 10 % duplicates and more
        reference[:copied] = training[:copied]
        assert memorisation(training, training, reference) == 1
        assert memorisation(training + 0.1, training + 0.1, reference) == 1
    half = np.concatenate([training[:150], 500 - training[:150]])
    assert memorisation(half, training, reference) == 0.5


def test_fresh_samples_score_one_in_twenty_however_many_distances_are_equal(rng: np.random.Generator) -> None:
    training = np.zeros((1, 8))

    def draw(shares: list[float]) -> np.ndarray:  # samples at distances 0, 1, 2
        return rng.choice(3, 4000, p=shares)[:, None] * np.eye(8)[:1]

    for shares in ([0, 0.5, 0.5], [0, 0.02, 0.98], [0, 1, 0], [0.03, 0.9, 0.07]):
        found = [memorisation(draw(shares), training, draw(shares)) for _ in range(4)]
        assert np.mean(found) == pytest.approx(0.05, abs=0.006)
    copies = [0.3, 0.4, 0.3]  # real data that repeats itself
    assert memorisation(draw(copies), training, draw(copies)) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("few", [1, 6, 20])
def test_a_small_reference_does_not_change_the_level(few: int, rng: np.random.Generator) -> None:
    sets = rng.standard_normal((250, few + 200, 2))
    found = [memorisation(each[few:], np.zeros((1, 2)), each[:few]) for each in sets]
    assert np.mean(found) == pytest.approx(0.05, abs=4 * np.std(found) / 250**0.5 + 1e-9)


def test_real_images_score_as_real_ones(extractor: Extractor) -> None:
    real, reference = IMAGES[1000:1398], IMAGES[1398:1796]
    others = reference, extractor.features(reference), IMAGES[:1000], extractor, 10
    figures, shares = measure_images(real, LABELS[1000:1398], *others)
    assert shares == pytest.approx([0.1] * 10, abs=0.04)
    assert min(figures[name] for name in ("precision", "recall", "coverage", "label_accuracy")) > 0.85
    assert figures["class_entropy"] == pytest.approx(np.log(10), abs=0.02)
    assert figures["memorisation"] < 0.2
    shuffled, _ = measure_images(real, (LABELS[1000:1398] + 1) % 10, *others)
    assert shuffled["label_accuracy"] < 0.05
    assert shuffled["fid"] == figures["fid"]


def test_collapse_copies_and_noise_show_in_their_own_figures(extractor: Extractor, rng: np.random.Generator) -> None:
    reference, training = IMAGES[1000:1200], IMAGES[:1000]

    def measure(images: np.ndarray) -> tuple[dict[str, float], list[float]]:
        return measure_images(images, None, reference, extractor.features(reference), training, extractor, classes=10)

    zeros = np.resize(IMAGES[:1000][LABELS[:1000] == 0], (200, 8, 8, 1))
    copies, shares = measure(zeros)
    noise, _ = measure(rng.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8))
    assert copies["precision"] > 0.8
    assert copies["recall"] < 0.2
    assert copies["class_entropy"] < 0.1
    assert copies["memorisation"] == 1
    assert noise["density"] < 0.3
    assert noise["fid"] > 3
    assert noise["memorisation"] == 0
    assert "label_accuracy" not in copies
    assert shares == [1.0] + [0.0] * 9


def test_unequal_counts_are_refused(extractor: Extractor) -> None:
    with pytest.raises(ValueError, match="10 generated samples cannot be compared with 11 real ones"):
        measure_images(IMAGES[:10], None, IMAGES[:11], np.zeros((11, 32)), IMAGES, extractor, classes=10)
