"""Curation by a reward against its exact law, through the rule that draws: one generation, given the model."""

import numpy as np
import pytest
from scipy.stats import chi2

from pipelines.generators.categorical import CategoricalGenerator
from pipelines.generators.gaussian import GaussianGenerator
from pipelines.mad.drawing import draw
from policies.loops.curation import curated_categorical, curated_gaussian, tilted_categorical, tilted_variance

SELECTION = {"rule": "curated", "reward": "first_coordinate"}  # of a category, its number
UNEVEN = np.array([0.4, 0.3, 0.2, 0.1])


def closeness(values: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    return -((values[:, 0] - 1) ** 2) / 2


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's χ² of ``counts`` (universes, k), each around its own ``expected``, k − 1 degrees of freedom each."""
    held = expected > 0
    assert not counts[~held].any()
    statistic = np.sum((counts - expected)[held] ** 2 / expected[held])
    return float(chi2.sf(statistic, held.sum() - len(counts)))


@pytest.mark.parametrize(("candidates", "samples"), [(2, 40), (3, 200), (5, 25)])
def test_curated_counts_are_multinomial_in_every_generation(candidates: int, samples: int) -> None:
    """Each generation is drawn from the frequencies of the one before, as the loop does; so few samples lose categories
    on the way. As if infinitely many candidates were compared, the counts are refused."""
    universes = 400
    frequencies = np.tile(UNEVEN, (universes, 1))
    for generation in range(1, 4):
        model = CategoricalGenerator(frequencies)
        selection = SELECTION | {"candidates": candidates}
        drawn = draw(model, samples, range(universes), generation, 1.0, selection).values
        counts = np.stack([np.bincount(each, minlength=4) for each in drawn])
        laws = [
            samples * np.stack([law(p) for p in frequencies])
            for law in (
                lambda p: curated_categorical(p, np.arange(4), candidates),
                lambda p: tilted_categorical(p, np.arange(4)),
            )
        ]
        assert p_value(counts, laws[0]) > 0.001
        assert p_value(counts, laws[1]) < 1e-6
        frequencies = counts / samples


def test_the_law_of_many_candidates_tends_to_the_tilted_distribution() -> None:
    rewards = np.array([0.0, 1.0, -0.5, 0.3])
    apart = [
        np.abs(curated_categorical(UNEVEN, rewards, k) - tilted_categorical(UNEVEN, rewards)).max() for k in (2, 8, 32)
    ]
    assert apart[0] > 3 * apart[1] > 9 * apart[2]
    for k in (2, 5):
        assert curated_categorical(UNEVEN, rewards, k).sum() == pytest.approx(1)
    twice = tilted_categorical(tilted_categorical(UNEVEN, rewards), rewards)
    np.testing.assert_allclose(twice, tilted_categorical(UNEVEN, rewards, 2))


def test_the_mean_worth_grows_by_what_was_proved() -> None:
    """E e^r never falls: it grows by (K − 1)/K · Var(e^r)/max e^r at least."""
    rewards, worth = np.array([0.0, 1.0, -0.5, 2.0]), np.exp([0.0, 1.0, -0.5, 2.0])
    for k in (2, 3, 6):
        before, after = UNEVEN @ worth, curated_categorical(UNEVEN, rewards, k) @ worth
        spread = UNEVEN @ worth**2 - before**2
        assert after >= before + (k - 1) / k * spread / worth.max()


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_two_candidates_move_a_gaussian_by_the_law(variance: float) -> None:
    universes, samples = 200, 2000
    model = GaussianGenerator(np.full((universes, 1), 3.0), np.full((universes, 1, 1), variance))
    drawn = draw(model, samples, range(universes), 1, 1.0, SELECTION | {"candidates": 2}).values[..., 0]
    moved, left = curated_gaussian(variance, 1.0, 2)
    for values, law, naive in (
        (drawn.mean(axis=1) - 3, moved, variance),  # of infinitely many candidates
        (drawn.var(axis=1, ddof=1), left, variance),
    ):
        error = values.std(ddof=1) / np.sqrt(universes)
        assert abs(values.mean() - law) < 3 * error
        assert abs(values.mean() - naive) > 3 * error


def test_many_candidates_tilt_a_gaussian() -> None:
    """The error of K candidates is of the order of 1/K."""
    universes, samples = 40, 200
    model = GaussianGenerator(np.zeros((universes, 1)), np.full((universes, 1, 1), 0.25))
    for reward, mean, variance in (
        ("first_coordinate", *curated_gaussian(0.25, 1.0, None)),
        (f"{__name__}:closeness", 0.2, tilted_variance(0.25, 1.0)),
    ):
        selection = {"rule": "curated", "reward": reward, "candidates": 400}
        drawn = draw(model, samples, range(universes), 1, 1.0, selection).values[..., 0]
        means, variances = drawn.mean(axis=1), drawn.var(axis=1, ddof=1)
        for values, law in ((means, mean), (variances, variance)):
            assert abs(values.mean() - law) < 3 * values.std(ddof=1) / np.sqrt(universes) + 1 / 400


def test_other_numbers_of_candidates_have_no_closed_form() -> None:
    with pytest.raises(ValueError, match="known of 2"):
        curated_gaussian(1.0, 1.0, 3)


@pytest.mark.parametrize("generations", [1, 3, 8])
def test_curation_without_fresh_data_is_reinforcement_learning_at_kl_weight_one_over_t(generations: int) -> None:
    """What maximises E r − (1/t) KL(q ‖ p_0), found by ascent from p_0, is where t curated generations of many
    candidates lead; at another weight it is not."""
    rewards = np.array([0.0, 0.8, -0.5, 0.3])

    def optimum(weight: float) -> np.ndarray:
        logits = np.log(UNEVEN)
        for _ in range(4000):
            q = np.exp(logits - logits.max())
            q /= q.sum()
            gain = rewards - weight * (np.log(q / UNEVEN) + 1)
            logits += 0.5 * q * (gain - q @ gain) / np.maximum(weight, 0.1)
        return q

    p = UNEVEN
    for _ in range(generations):
        p = curated_categorical(p, rewards, 30) if generations == 1 else tilted_categorical(p, rewards)
    tolerance = 0.02 if generations == 1 else 1e-3
    np.testing.assert_allclose(p, optimum(1 / generations), atol=tolerance)
    assert np.abs(p - optimum(2 / generations)).max() > 2 * tolerance
