"""The extractor tells real digits apart, and is a function of its data and its seed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from pipelines.measures import features
from pipelines.measures.distances import frechet_distance
from pipelines.measures.features import Extractor, VisionModel, given_extractor, load_extractor, train_extractor

IMAGES = (load_digits().images * 255 / 16).round().astype(np.uint8)[..., None]
LABELS = load_digits().target


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor(IMAGES[:1400], LABELS[:1400], classes=10, seed=0)


@pytest.fixture(scope="module")
def unlabelled() -> Extractor:
    return train_extractor(IMAGES[:1400], None, classes=0, seed=0)


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


def test_without_labels_it_ranks_what_a_classifier_ranks_and_pixels_do_not(
    extractor: Extractor, unlabelled: Extractor
) -> None:
    """Images that are ever worse, in seven ways: each way's order is kept, and the order of all is nearly that of the
    classifier, which the pixels' is not."""
    rest, random = IMAGES[1000:1397], np.random.default_rng(0)
    assert not (rest == IMAGES[1400:]).all()
    worse = worsened(rest, LABELS[1000:1397], random)

    def distances(seen: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        real = seen(IMAGES[1400:])
        return np.array([[frechet_distance(seen(images), real) for images in way] for way in worse.values()])

    by_labels, by_views = distances(extractor.features), distances(unlabelled.features)
    by_pixels = distances(lambda images: images.reshape(len(images), -1) / 255.0)
    assert (np.diff(by_views, axis=1) > 0).all(), dict(zip(worse, by_views, strict=True))
    agreement, of_pixels = (spearmanr(each.ravel(), by_labels.ravel()).statistic for each in (by_views, by_pixels))
    assert agreement > max(0.9, of_pixels + 0.02), (agreement, of_pixels)


def worsened(images: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Three sets (n, 8, 8, 1) uint8 each, a little, clearly and much worse."""

    def cut(values: np.ndarray) -> np.ndarray:
        return values.clip(0, 255).round().astype(np.uint8)

    noise, other, middle = random.normal(size=images.shape), images[::-1], 128.0

    def of_classes(count: int) -> np.ndarray:
        return images[random.choice(np.flatnonzero(labels < count), len(images))]

    def of_images(count: int) -> np.ndarray:
        return images[random.choice(count, len(images))]

    return {
        "noise": [cut(images + spread * noise) for spread in (15, 40, 90)],
        "blur": [cut(gaussian_filter(images.astype(float), (0, spread, spread, 0))) for spread in (0.5, 0.8, 1.2)],
        "contrast": [cut((images - middle) * share + middle) for share in (0.8, 0.6, 0.3)],
        "saturation": [cut((images - middle) * share + middle) for share in (1.3, 2, 5)],
        "blends": [cut(images * (1 - share) + other * share) for share in (0.1, 0.25, 0.5)],
        "classes lost": [of_classes(count) for count in (7, 4, 1)],
        "images lost": [of_images(count) for count in (100, 40, 10)],
    }


@pytest.mark.parametrize(("kind", "size"), [("vit", 16), ("resnet", 32)])
def test_a_vision_model_looks_at_images_of_any_size(kind: str, size: int, tmp_path: Path) -> None:
    import transformers

    if kind == "vit":
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=size, patch_size=8))
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        model = transformers.ResNetModel(config)
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(tmp_path)
    files = given_extractor(str(tmp_path), IMAGES[:2])
    assert set(files) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    loaded = load_extractor(tmp_path)
    assert isinstance(loaded, VisionModel)
    seen = loaded.features(IMAGES[:40])
    assert (seen.shape, seen.dtype) == ((40, 12), np.float64)
    assert np.allclose(loaded.features(np.repeat(IMAGES[35:36], 3, axis=3)), seen[35], atol=1e-5)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=f"data.extractor: {tmp_path}: ") as error:
        given_extractor(str(tmp_path), IMAGES[:2])
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("brief")
def test_an_earlier_extractor_can_be_given_for_images_of_its_shape(tmp_path: Path) -> None:
    trained = train_extractor(IMAGES[:100], None, 0, seed=0)
    trained.save(tmp_path)
    assert set(given_extractor(str(tmp_path), IMAGES[:2])) == {"config.json", "model.safetensors"}
    with pytest.raises(
        ValueError, match=r"it looks at images \(height, width, channels\) \(8, 8, 1\), not \(4, 16, 1\)"
    ):
        given_extractor(str(tmp_path), IMAGES[:2].reshape(2, 4, 16, 1))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"data\.extractor: "):
        given_extractor(str(tmp_path), IMAGES[:2])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("classes", [10, 0])
def test_equal_seeds_write_equal_bytes(classes: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        train_extractor(IMAGES[:100], LABELS[:100], classes, seed).save(tmp_path / name)
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
    bare = train_extractor(images, None, classes=0, seed=0)
    bare.save(tmp_path)
    assert np.array_equal(load_extractor(tmp_path).features(images), bare.features(images))
