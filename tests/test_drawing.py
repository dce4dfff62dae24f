"""How samples for the next generations are drawn: plainly, curated by a reward, verified or labelled by a network."""

from typing import Any

import numpy as np
import pytest

from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.generators.diffusion import DiffusionGenerator, DiffusionSettings
from pipelines.generators.gaussian import GaussianGenerator
from pipelines.mad.drawing import draw
from pipelines.mad.tasks import perform, read_rows, read_samples
from pipelines.measures.features import train_extractor
from pipelines.storage.atomic import packed
from policies.loops.rules.curated import curate
from policies.loops.rules.verified import verify
from policies.loops.samples import Samples

MODEL = GaussianGenerator(np.zeros((2, 1)), np.ones((2, 1, 1)))


def drawn(**selection: Any) -> Samples:
    return draw(MODEL, 4000, [0, 1], generation=3, bias=1.0, selection=selection or None)


def test_a_draw_is_a_function_of_seed_and_generation() -> None:
    again = draw(MODEL, 4000, [0, 1], 3, 1.0)
    np.testing.assert_array_equal(drawn().values, again.values)
    assert not np.array_equal(again.values, draw(MODEL, 4000, [0, 1], 4, 1.0).values)


def test_curation_keeps_one_of_k_by_the_exponential_of_its_reward() -> None:
    scores = np.tile(np.log([0.1, 0.2, 0.7]), (60_000, 1))
    kept = curate(scores, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(kept) / len(kept), [0.1, 0.2, 0.7], atol=0.01)


def test_curation_moves_the_samples_towards_the_reward() -> None:
    plain, few, many = (
        draw(MODEL, 4000, [0, 1], 3, 1.0, selection)
        for selection in (None, *({"rule": "curated", "candidates": k, "reward": "first_coordinate"} for k in (2, 64)))
    )
    assert abs(plain.values.mean()) < 0.05
    assert 0.3 < few.values.mean() < 0.6
    # With many candidates the density is p(x) exp(x), normalised: N(1, 1).
    assert many.values.mean() == pytest.approx(1, abs=0.06)
    assert many.values.shape == (2, 4000, 1)


def test_a_reward_of_ones_own_is_called_and_checked() -> None:
    selection = {"rule": "curated", "candidates": 8, "reward": "tests.rewards:minus_square"}
    assert draw(MODEL, 4000, [0, 1], 3, 1.0, selection).values.std() < 0.9
    with pytest.raises(ValueError, match="one finite number a sample"):
        drawn(rule="curated", candidates=2, reward="tests.rewards:one_number")


class Classifier:
    """Sure of the positive half axis."""

    def probabilities(self, values: np.ndarray) -> np.ndarray:
        sure = 1 / (1 + np.exp(-10 * values[:, 0]))
        return np.stack([1 - sure, sure], axis=1)


def test_verification_keeps_what_the_classifier_accepts() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    np.testing.assert_array_equal(verify(probabilities, np.array([0, 0, 1]), 0.8), [True, False, True])
    np.testing.assert_array_equal(verify(probabilities, None, 0.5), [True, True, True])

    class Labelled:
        def sample(self, count: int, seeds: list[int], bias: float) -> Samples:
            return Samples(MODEL.sample(count, [seeds[0], 0], bias).values[:1], np.ones((1, count), np.int64))

    labelled: Any = Labelled()
    classifier: Any = Classifier()
    selection = {"rule": "verified", "candidates": 8, "acceptance": 0.9}
    kept = draw(labelled, 500, [0], 2, 1.0, selection, classifier)
    assert kept.values.shape == (1, 500, 1)
    assert kept.values.min() > 0.2
    assert kept.labels is not None
    assert kept.labels.shape == (1, 500)
    with pytest.raises(ValueError, match=r"accepted \d+ of 500 samples and 500 are needed: raise candidates"):
        draw(labelled, 500, [0], 2, 1.0, {**selection, "candidates": 1}, classifier)


def test_relabelling_changes_labels_alone_and_loses_no_sample() -> None:
    class Labelled:
        def sample(self, count: int, seeds: list[int], bias: float) -> Samples:
            return Samples(MODEL.sample(count, [seeds[0], 0], bias).values[:1], np.arange(count)[None] % 2)

    labelled: Any = Labelled()
    classifier: Any = Classifier()
    plain = draw(labelled, 501, [0], 2, 1.0)
    given = draw(labelled, 501, [0], 2, 1.0, {"rule": "relabelled"}, classifier)
    np.testing.assert_array_equal(given.values, plain.values)
    assert given.labels is not None
    assert given.labels.dtype == np.int64
    np.testing.assert_array_equal(given.labels, plain.values[..., 0] > 0)
    assert plain.labels is not None
    np.testing.assert_array_equal(given.notes["asked"], plain.labels)
    assert 0.4 < (given.labels != plain.labels).mean() < 0.6
    np.testing.assert_array_equal(given.take(np.array([[3, 1]])).notes["asked"], [[1, 1]])


def test_what_is_stored_of_relabelled_samples_are_the_new_labels() -> None:
    """The task that the loop runs, with a real diffusion model and the real classifier."""
    data = load_real_data(DataSettings(limit=60))
    assert data.labels is not None
    settings = DiffusionSettings(channels=8, training_steps=2, sampling_steps=2)
    model = DiffusionGenerator.fit(settings, Samples(data.images[None], data.labels[None]), [0])
    eye = train_extractor(data.images, data.labels, 10, 0)
    parameters = {"family": "diffusion", "role": "training", "generation": 1, "seeds": [4], "count": 25, "start": 0}
    parameters |= {"sampling_bias": 1.0, "checkpoint": "a"}
    held = {}
    for name, selection in {"plain": None, "relabelled": {"rule": "relabelled"}}.items():
        task = {**parameters, "selection": selection}
        held[name] = perform("sample", task, [packed(model.save), packed(eye.save)], "cpu")
    plain, given = (read_samples(files) for files in held.values())
    np.testing.assert_array_equal(given.values, plain.values)
    assert given.labels is not None
    assert plain.labels is not None
    np.testing.assert_array_equal(given.labels[0], eye.probabilities(given.values[0]).argmax(axis=1))
    np.testing.assert_array_equal(read_rows(held["relabelled"])["asked"], plain.labels[0])
    assert not np.array_equal(given.labels, plain.labels)  # of a model of two updates
