"""The extractor tells real digits apart, and is a function of its data and its seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipelines.measures import features
from pipelines.measures.features import Extractor, load_extractor, train_extractor

IMAGES = (load_digits().images * 255 / 16).round().astype(np.uint8)[..., None]
LABELS = load_digits().target


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor(IMAGES[:1400], LABELS[:1400], classes=10, seed=0)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "UPDATES", 5)


def test_it_knows_digits_that_it_has_not_seen(extractor: Extractor) -> None:
    # In their file's order the last digits are by other hands than the first, which is harder than a random split.
    probabilities = extractor.probabilities(IMAGES[1400:])
    assert probabilities.shape == (397, 10)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == LABELS[1400:]).mean() > 0.93


def test_features_are_bounded_and_none_is_dead(extractor: Extractor) -> None:
    seen = extractor.features(IMAGES[1400:])
    assert seen.dtype == np.float64
    assert seen.shape == (397, features.DIMENSIONS)
    assert seen.std(axis=0).min() > 1e-3
    assert np.abs(seen).max() <= 1


def test_an_image_has_the_same_features_in_any_company(extractor: Extractor) -> None:
    together = extractor.features(IMAGES[:600])
    assert np.allclose(extractor.features(IMAGES[590:591]), together[590], atol=1e-5)


@pytest.mark.usefixtures("brief")
def test_equal_seeds_write_equal_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        train_extractor(IMAGES[:100], LABELS[:100], 10, seed).save(tmp_path / name)
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "again", "other"))
    assert first == again != other
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()


@pytest.mark.usefixtures("brief")
def test_loading_restores_it(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 9, 3), dtype=np.uint8)
    trained = train_extractor(images, np.arange(20) % 4, classes=4, seed=0)
    trained.save(tmp_path)
    loaded = load_extractor(tmp_path)
    assert loaded.sha256 == trained.sha256
    assert np.array_equal(loaded.probabilities(images), trained.probabilities(images))
    assert not loaded.network.training
