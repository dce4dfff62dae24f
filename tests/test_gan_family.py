"""The GAN family plays the game it names, obeys its seeds and weights, and is truncated toward typical styles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.generators.gan import GanGenerator, GanSettings, critic_loss, pairing_loss
from policies.loops.samples import Samples
from policies.rl.health import DegenerateBatch

TINY = GanSettings(width=4, latent=6, steps=3, batch_size=8)


@pytest.fixture
def data() -> Samples:
    return Samples(np.random.default_rng(0).integers(0, 256, (1, 20, 12, 8, 3), dtype=np.uint8))


@pytest.fixture
def generator(data: Samples) -> GanGenerator:
    return GanGenerator.fit(TINY, data, [0])


@pytest.fixture(scope="module")
def patterns() -> np.ndarray:
    """Two images, dark with a bright half: the left one, or the right one."""
    images = np.full((2, 8, 8, 1), 30, np.uint8)
    images[0, :, :4] = images[1, :, 4:] = 220
    return images


@pytest.fixture(scope="module")
def trained(patterns: np.ndarray) -> GanGenerator:
    """Fitted to both patterns, of which the first weighs three times as much."""
    weights = np.array([3.0, 1.0]).repeat(10)
    settings = GanSettings(width=8, latent=6, steps=150, batch_size=32, gradient_penalty=2.0)
    return GanGenerator.fit(settings, Samples(patterns.repeat(10, axis=0)[None], weights=weights), [0])


def parameters(generator: GanGenerator) -> torch.Tensor:
    return torch.cat([values.flatten() for values in generator.networks.state_dict().values()])


def test_a_pair_costs_less_the_more_its_favoured_image_leads() -> None:
    scores = torch.tensor([[2.0], [0.0]])
    expected = (np.log1p(np.exp(-3)) + np.log1p(np.exp(1))) / 2
    assert pairing_loss(scores, torch.tensor([[-1.0], [1.0]])).item() == pytest.approx(expected)


def test_the_critic_favours_real_images_and_pays_for_its_slopes_at_both() -> None:
    class Cubic(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.pow(3).sum(dim=1, keepdim=True)

    real, fake = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    pairs = (np.log1p(np.exp(-1)) + np.log1p(np.exp(7))) / 2
    r1, r2 = (9 + 9) / 2, (0 + 144) / 2  # of |∇|² = Σ (3x²)²
    assert critic_loss(Cubic(), real, fake, 0.5).item() == pytest.approx(pairs + 0.25 * (r1 + r2))


def test_it_learns_both_patterns_in_proportion_to_their_weights(trained: GanGenerator, patterns: np.ndarray) -> None:
    drawn = trained.sample(500, [1], 1.0).values[0].astype(float)
    distance = np.abs(drawn[:, None] - patterns).mean(axis=(2, 3, 4))  # the patterns are 190 apart
    assert np.median(distance.min(axis=1)) < 40
    assert 0.65 < (distance.argmin(axis=1) == 0).mean() < 0.85


def test_the_centres_are_the_means_of_the_styles_nearest_to_them(trained: GanGenerator) -> None:
    latents = torch.randn(20_000, trained.settings.latent, generator=torch.Generator().manual_seed(3))
    styles, centres = trained.networks.style(latents), trained.networks.centres
    nearest = torch.cdist(styles, centres).argmin(dim=1)
    means = torch.stack([styles[nearest == index].mean(dim=0) for index in range(len(centres))])
    assert (means - centres).norm(dim=1).max() < 0.1 * (styles - styles.mean(dim=0)).norm(dim=1).mean()


def test_bias_draws_each_style_toward_its_nearest_centre(trained: GanGenerator) -> None:
    networks = trained.networks
    styles = networks.style(torch.randn(500, trained.settings.latent, generator=torch.Generator().manual_seed(1)))
    nearest = networks.centres[torch.cdist(styles, networks.centres).argmin(dim=1)]
    for bias in (1.0, 0.3, 1e-6):
        expected = networks.synthesis(bias * styles + (1 - bias) * nearest).permute(0, 2, 3, 1).numpy()
        drawn = trained.sample(500, [1], bias).values[0].astype(float)
        assert np.abs(drawn - (expected + 1) * 127.5).max() < 0.51


def test_equal_seeds_give_equal_models_and_images(data: Samples, generator: GanGenerator) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again, other = GanGenerator.fit(TINY, data, [0]), GanGenerator.fit(TINY, data, [1])
    drawn, redrawn, else_drawn = generator.sample(7, [5], 0.5), again.sample(7, [5], 0.5), again.sample(7, [6], 0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(parameters(generator), parameters(again))
    assert not torch.equal(parameters(generator), parameters(other))
    assert np.array_equal(drawn.values, redrawn.values)
    assert not np.array_equal(drawn.values, else_drawn.values)


def test_samples_are_images_of_the_shape_it_saw(generator: GanGenerator) -> None:
    drawn = generator.sample(600, [0], 1.0)
    assert drawn.values.shape == (1, 600, 12, 8, 3)
    assert drawn.values.dtype == np.uint8
    assert drawn.labels is None
    assert len(np.unique(drawn.values[0].reshape(600, -1), axis=0)) > 590


def test_what_weighs_nothing_teaches_nothing_and_labels_are_ignored(data: Samples, generator: GanGenerator) -> None:
    spoilt = replace(data, values=data.values.copy(), weights=np.array([1.0, 2.0] * 5 + [0.0] * 10))
    light = replace(data, weights=spoilt.weights)
    spoilt.values[0, 10:] = 0
    first, second = (parameters(GanGenerator.fit(TINY, each, [0])) for each in (light, spoilt))
    assert torch.equal(first, second)
    assert not torch.equal(first, parameters(generator))
    labelled = GanGenerator.fit(TINY, replace(data, labels=np.zeros((1, 20), np.int64)), [0])
    assert torch.equal(parameters(labelled), parameters(generator))


def test_fine_tuning_goes_on_from_a_copy_of_the_start(data: Samples, generator: GanGenerator) -> None:
    before = parameters(generator).clone()
    still = GanGenerator.fit(TINY.model_copy(update={"learning_rate": 1e-9}), data, [9], start=generator)
    moved = GanGenerator.fit(TINY, data, [9], start=generator)
    for part in ("style", "synthesis", "critic"):
        start, near, far = (
            torch.cat([values.flatten() for values in getattr(each.networks, part).parameters()])
            for each in (generator, still, moved)
        )
        assert torch.allclose(near, start, atol=1e-6)
        assert not torch.allclose(far, start, atol=1e-3)
    assert torch.equal(parameters(generator), before)


def test_saving_loses_nothing(data: Samples, generator: GanGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "first")
    before = torch.get_rng_state()
    loaded = GanGenerator.load(tmp_path / "first")
    assert torch.equal(before, torch.get_rng_state())
    loaded.save(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert loaded.settings == generator.settings
    assert np.array_equal(loaded.sample(5, [1], 0.5).values, generator.sample(5, [1], 0.5).values)
    tuned, retuned = (GanGenerator.fit(TINY, data, [2], start=each) for each in (generator, loaded))
    assert torch.equal(parameters(tuned), parameters(retuned))


def test_numbers_that_are_not_finite_are_no_images(generator: GanGenerator) -> None:
    with torch.no_grad():
        for parameter in generator.networks.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DegenerateBatch, match="draws NaN or infinite numbers"):
        generator.sample(2, [0], 1.0)
