"""The diffusion family learns what it is shown, obeys its seeds, and is guided as diffusers defines guidance."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.generators.diffusion import DiffusionGenerator, DiffusionSettings
from policies.loops.samples import Samples
from policies.rl.health import DegenerateBatch

TINY = DiffusionSettings(channels=8, training_steps=3, batch_size=4, timesteps=10, sampling_steps=2)


@pytest.fixture
def data() -> Samples:
    rng = np.random.default_rng(0)
    return Samples(rng.integers(0, 256, (1, 12, 8, 4, 3), dtype=np.uint8), np.arange(12)[None] % 3)


@pytest.fixture
def generator(data: Samples) -> DiffusionGenerator:
    return DiffusionGenerator.fit(TINY, data, [0])


def weights(generator: DiffusionGenerator) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in generator.unet.parameters()])


def test_it_learns_which_label_is_dark_and_which_is_light() -> None:
    values = np.array([20, 235], dtype=np.uint8).repeat(16)[None, :, None, None, None] * np.ones((4, 4, 1), np.uint8)
    settings = TINY.model_copy(update={"training_steps": 80, "batch_size": 16, "timesteps": 50, "sampling_steps": 5})
    drawn = DiffusionGenerator.fit(settings, Samples(values, np.arange(2).repeat(16)[None]), [0]).sample(40, [1], 1.0)
    assert drawn.labels is not None
    means = drawn.values[0].mean(axis=(1, 2, 3))
    assert np.abs(means - np.array([20, 235])[drawn.labels[0]]).max() < 80


def test_equal_seeds_give_equal_models_and_images(data: Samples, generator: DiffusionGenerator) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again, other = DiffusionGenerator.fit(TINY, data, [0]), DiffusionGenerator.fit(TINY, data, [1])
    drawn, redrawn, else_drawn = generator.sample(7, [5], 0.5), again.sample(7, [5], 0.5), again.sample(7, [6], 0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(generator), weights(again))
    assert not torch.equal(weights(generator), weights(other))
    assert np.array_equal(drawn.values, redrawn.values)
    assert not np.array_equal(drawn.values, else_drawn.values)


def test_samples_are_images_of_the_shape_it_saw(generator: DiffusionGenerator) -> None:
    drawn = generator.sample(300, [0], 1.0)
    assert drawn.values.shape == (1, 300, 8, 4, 3)
    assert drawn.values.dtype == np.uint8
    assert len(np.unique(drawn.values[0].reshape(300, -1), axis=0)) == 300


def test_every_prefix_asks_for_all_classes_alike(generator: DiffusionGenerator) -> None:
    labels, others = (generator.sample(20, [seed], 1.0).labels for seed in (0, 1))
    assert labels is not None
    assert labels.shape == (1, 20)
    for stop in range(1, 21):
        assert np.ptp(np.bincount(labels[0, :stop], minlength=3)) <= 1
    assert not np.array_equal(labels, others)


def test_labels_are_drawn_as_the_training_set_holds_them(data: Samples, tmp_path: Path) -> None:
    """A loop without bias keeps its classes' shares; what was never seen is never asked for."""
    rare = replace(data, labels=np.array([[0] * 9 + [2] * 3]))
    light = replace(rare, weights=np.repeat([1.0, 3.0], [9, 3]))
    settings = TINY.model_copy(update={"classes": 4})
    for each, expected in ((rare, [30, 0, 10, 0]), (light, [20, 0, 20, 0])):
        DiffusionGenerator.fit(settings, each, [0]).save(tmp_path)
        drawn = [DiffusionGenerator.load(tmp_path).sample(40, [seed], 1.0).labels for seed in (1, 2, 1)]
        np.testing.assert_array_equal(np.bincount(drawn[0][0], minlength=4), expected)
        assert np.array_equal(drawn[0], drawn[2])
        assert not np.array_equal(drawn[0], drawn[1])


def test_bias_is_guidance_of_scale_one_over_bias(generator: DiffusionGenerator) -> None:
    # One step from pure noise lands on −v, so that images depend linearly on the network's output.
    single = DiffusionGenerator(TINY.model_copy(update={"sampling_steps": 1}), generator.unet)
    embedding = generator.unet.class_embedding.weight
    embedding.mul_(5)
    conditional, guided = (single.sample(9, [0], bias).values.astype(float) for bias in (1.0, 0.5))
    embedding[:-1] = embedding[-1]
    free = single.sample(9, [0], 1.0).values.astype(float)
    inside = np.all([(images > 0) & (images < 255) for images in (conditional, guided, free)], axis=0)
    assert inside.mean() > 0.5
    assert np.abs(conditional - free).max() > 10
    assert np.abs(guided - (free + 2 * (conditional - free)))[inside].max() <= 2


def test_without_bias_the_network_is_called_once_a_step(generator: DiffusionGenerator) -> None:
    calls: list[int] = []
    generator.unet.register_forward_hook(lambda *_: calls.append(1))
    generator.sample(3, [0], 1.0)
    assert len(calls) == TINY.sampling_steps


def test_what_weighs_nothing_teaches_nothing(data: Samples) -> None:
    light = np.array([1.0, 2.0] * 3 + [0.0] * 6)
    spoilt = replace(data, values=data.values.copy())
    spoilt.values[0, 6:] = 0
    first, second = (
        weights(DiffusionGenerator.fit(TINY, replace(each, weights=light), [0])) for each in (data, spoilt)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(DiffusionGenerator.fit(TINY, data, [0])))


def test_hidden_labels_train_the_null_class(data: Samples, generator: DiffusionGenerator) -> None:
    def moved(label_dropout: float) -> bool:
        settings = TINY.model_copy(update={"label_dropout": label_dropout})
        ratio = DiffusionGenerator.fit(settings, data, [1], start=generator).unet.class_embedding.weight[-1] / null
        return bool(ratio.std() > 1e-5)  # weight decay alone shrinks all its entries alike

    null = generator.unet.class_embedding.weight[-1]
    assert not moved(0.0)
    assert moved(0.9)


def test_fine_tuning_goes_on_from_a_copy_of_the_start(data: Samples, generator: DiffusionGenerator) -> None:
    before = weights(generator).clone()
    still = TINY.model_copy(update={"learning_rate": 1e-9})
    tuned = DiffusionGenerator.fit(still, data, [9], start=generator)
    assert torch.allclose(weights(tuned), before, atol=1e-6)
    assert not torch.allclose(weights(DiffusionGenerator.fit(TINY, data, [9], start=generator)), before, atol=1e-4)
    assert torch.equal(weights(generator), before)


def test_saving_loses_nothing(generator: DiffusionGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "first")
    loaded = DiffusionGenerator.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    names = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert loaded.settings == generator.settings
    assert np.array_equal(loaded.sample(5, [1], 0.5).values, generator.sample(5, [1], 0.5).values)


def test_fewer_classes_than_labels_are_refused(data: Samples) -> None:
    with pytest.raises(ValueError, match="label 2 is none of the 2 classes: set classes higher"):
        DiffusionGenerator.fit(TINY.model_copy(update={"classes": 2}), data, [0])


def test_there_are_no_more_sampling_steps_than_noise_levels() -> None:
    assert DiffusionSettings(timesteps=20, sampling_steps=20).sampling_steps == 20
    with pytest.raises(ValueError, match=r"sampling_steps \(21\) must be at most timesteps \(20\)"):
        DiffusionSettings(timesteps=20, sampling_steps=21)


@pytest.mark.parametrize("classes", [None, 0])
def test_without_labels_it_is_unconditional(classes: int | None, data: Samples, tmp_path: Path) -> None:
    """Its one label is the null class, so no label reaches it and none is asked for."""
    settings = TINY.model_copy(update={"classes": classes})
    bare = DiffusionGenerator.fit(settings, replace(data, labels=None), [0])
    bare.save(tmp_path)
    assert (bare.classes, bare.unet.config.num_class_embeds) == (0, 1)
    drawn = DiffusionGenerator.load(tmp_path).sample(5, [1], 1.0)
    assert drawn.labels is None
    np.testing.assert_array_equal(drawn.values, bare.sample(5, [1], 1.0).values)
    if classes == 0:  # labels there are, but they are not used
        assert torch.equal(weights(bare), weights(DiffusionGenerator.fit(settings, data, [0])))


def test_classes_may_be_more_than_the_data_show(data: Samples) -> None:
    assert DiffusionGenerator.fit(TINY, data, [0]).classes == 3
    assert DiffusionGenerator.fit(TINY.model_copy(update={"classes": 5}), data, [0]).classes == 5


def test_numbers_that_are_not_finite_are_no_images(generator: DiffusionGenerator) -> None:
    with torch.no_grad():
        for parameter in generator.unet.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DegenerateBatch, match="draws NaN or infinite numbers"):
        generator.sample(2, [0], 1.0)
