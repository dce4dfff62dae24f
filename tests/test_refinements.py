"""What is done to a fitted generator before it draws: Neon and SIMS by their exact laws, alignment by what it moves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestration.experiments.mad.analysis import laws
from orchestration.experiments.mad.config import ArmSettings, MadConfig
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.data.digits import captioned
from pipelines.generators.diffusion import DiffusionGenerator, DiffusionSettings
from pipelines.generators.gan import GanGenerator, GanSettings
from pipelines.generators.gaussian import GaussianGenerator, GaussianSettings
from pipelines.generators.text_to_image import TextToImageGenerator, TextToImageSettings
from pipelines.refinements.aligned import Aligned
from pipelines.refinements.neon import Neon
from pipelines.refinements.sims import Sims
from pipelines.storage.atomic import Files, packed, unpacked
from policies.loops.extrapolation import neon_best_weight, neon_risk, power_deviation, sims_deviation
from policies.loops.samples import Samples
from tests.models import PROMPTS
from tests.test_mad_laws import deviations, measured

UNIVERSES = 6000
NEON = [(0.9, 200, 150, 0.9), (0.7, 60, 90, 1.5), (0.8, 100, 40, -1.0), (1.2, 90, 50, 0.7)]  # λ, n, m, w


def neon_errors(bias: float, n: int, own: int, weight: float) -> np.ndarray:
    """(λθ_N − 1)² in many universes, by the generator and the refinement that the loop uses."""
    settings, seeds = GaussianSettings(), range(UNIVERSES)
    model = GaussianGenerator.fit(settings, GaussianGenerator.truth(settings, seeds, 0, n), seeds)
    led = Neon(weight=weight, samples=own).refine(model, settings, seeds, bias, "cpu")
    return np.asarray((bias * led.fitted()["covariance"][:, 0, 0] - 1) ** 2)


def apart(law: float, values: np.ndarray) -> float:
    return float((values.mean() - law) / (values.std(ddof=1) / np.sqrt(len(values))))


@pytest.mark.parametrize(("bias", "n", "own", "weight"), NEON)
def test_neon_obeys_its_parabola(bias: float, n: int, own: int, weight: float) -> None:
    found = neon_errors(bias, n, own, weight)
    assert abs(apart(neon_risk(weight, bias, n, own), found)) < 3
    endless = neon_risk(weight, bias, n, 10**9)  # naive: as if own samples left no noise in θ_s
    assert abs(apart(endless, found)) > 3


@pytest.mark.parametrize(("bias", "n", "own"), [(0.9, 1000, 1000), (0.7, 60, 90), (0.5, 500, 100)])
def test_the_best_weight_is_at_the_bottom(bias: float, n: int, own: int) -> None:
    best = neon_best_weight(bias, n, own)
    around = [neon_risk(best + step, bias, n, own) for step in (-0.05, 0.0, 0.05)]
    assert np.argmin(around) == 1
    assert around[0] == pytest.approx(around[2])
    if (bias, n) == (0.9, 1000):
        assert best == pytest.approx(0.937, abs=5e-4)
        assert neon_risk(0, bias, n, own) == pytest.approx(0.0116, abs=5e-5)
        assert neon_risk(best, bias, n, own) == pytest.approx(0.0033, abs=5e-5)
    assert neon_best_weight(1.0, n, own) == 0
    # A sampler that seeks diversity is led away by a positive weight as well, unlike what is said of Neon: what counts
    # here is the variance that is drawn.
    assert neon_best_weight(1.2, n, own) > 0
    assert neon_risk(neon_best_weight(1.2, n, own), 1.2, n, own) < neon_risk(0, 1.2, n, own)
    assert neon_best_weight(bias, 10**9, 10**9) == pytest.approx(1 / bias, rel=1e-6)


@pytest.mark.parametrize(("bias", "weight"), [(0.8, 1.25), (0.9, 0.5), (0.7, -0.5)])
def test_neon_in_the_loop_obeys_its_law(bias: float, weight: float) -> None:
    neon = {"weight": weight, "samples": 150}
    common: Any = {"family": "gaussian", "dimension": 12, "n_ini": 50, "sampling_bias": bias}
    arm = ArmSettings(**common, refinement="neon", neon=neon)
    found = deviations(arm, {"variance", "mean_square"})
    assert all(abs(value) < 3 for value in found.values()), found
    if weight == 1.25:  # 1/λ: the variance keeps its level
        naive = deviations(arm, {"variance"}, against=ArmSettings(**common))  # as if nothing were led away
        assert abs(naive["variance"]) > 3
        np.testing.assert_allclose(laws(arm, 4)["variance"], 1.25 * 0.8 + 0.25, rtol=1e-12)


def test_no_law_is_claimed_where_none_is_known() -> None:
    settings: Any = {"family": "gaussian", "n_ini": 30, "refinement": "neon"}
    assert laws(ArmSettings(**settings), 3)
    for other in ({"rule": "fresh", "n_real": 5, "n_synthetic": 9}, {"covariance": "mle"}, {"rule": "real_only"}):
        assert laws(ArmSettings(**settings | other), 3) == {}
    assert ArmSettings(**settings).underivable(3)


def test_a_weight_that_leaves_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a covariance with the eigenvalue -.* is none: choose a smaller weight"):
        neon_errors(0.9, 10, 5, 20.0)


class Analytic(torch.nn.Module):
    """The network of N(0, σ²) on a diffusion's noise levels, which predicts v."""

    def __init__(self, deviation: float, alphas: torch.Tensor) -> None:
        super().__init__()
        self.variance, self.alphas = deviation**2, alphas
        self.config = SimpleNamespace(num_class_embeds=1, in_channels=1, sample_size=(4, 4))
        self.device = torch.device("cpu")

    def register_to_config(self, **_: Any) -> None:
        """As a network of diffusers."""

    def forward(self, images: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        alpha, sigma = self.alphas[time].sqrt(), (1 - self.alphas[time]).sqrt()
        clean = alpha * self.variance / (alpha**2 * self.variance + sigma**2) * images
        noise = (images - alpha * clean) / sigma
        return SimpleNamespace(sample=alpha * noise - sigma * clean)


@pytest.mark.parametrize(("real", "own", "strength"), [(1.0, 0.75**0.5, 1.0), (0.5, 0.4, 0.5), (0.8, 0.7, 2.0)])
def test_sims_draws_with_its_exponent_and_not_the_density_power(
    monkeypatch: pytest.MonkeyPatch, real: float, own: float, strength: float
) -> None:
    """The family's own sampler, with networks that know two Gaussians. Pixels are clipped to [−1, 1], so all is
    a fifth."""
    scale = 0.2
    settings = DiffusionSettings(classes=0, timesteps=1000, sampling_steps=200)
    first = DiffusionGenerator(settings, Analytic(1.0, torch.ones(1)), np.ones(1))
    networks = [Analytic(scale * each, first.noises.alphas_cumprod) for each in (real, own)]
    models = [DiffusionGenerator(settings, each, np.ones(1)) for each in networks]
    led = models[0].led_away(models[1], strength)
    pixels = led.sample(2500, [3], 1.0).values.astype(np.float64) / 127.5 - 1
    found = float(pixels.std()) / scale
    assert found == pytest.approx(sims_deviation(real, own, strength), rel=0.01)
    assert found != pytest.approx(power_deviation(real, own, strength), rel=0.02)


def test_a_density_power_may_have_no_mass() -> None:
    assert sims_deviation(1.0, 0.75**0.5, 1.0) == pytest.approx(1.1547, abs=1e-4)
    assert power_deviation(1.0, 0.75**0.5, 1.0) == pytest.approx(1.2247, abs=1e-4)
    with pytest.raises(ValueError, match="no finite mass"):
        power_deviation(1.0, 0.5, 1.0)


DIFFUSION = DiffusionSettings(channels=8, training_steps=3, batch_size=4, timesteps=10, sampling_steps=2)
GAN = GanSettings(width=2, latent=2, steps=2, batch_size=2)


@pytest.fixture(scope="module", params=["diffusion", "gan"])
def fitted(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tiny model with its settings."""
    values = np.random.default_rng(0).integers(0, 256, (1, 12, 8, 8, 1), dtype=np.uint8)
    if request.param == "gan":
        return GanGenerator.fit(GAN, Samples(values), [0]), GAN
    return DiffusionGenerator.fit(DIFFUSION, Samples(values, np.arange(12)[None] % 3), [0]), DIFFUSION


def stored(model: Any) -> Files:
    return packed(model.save)


def test_neon_leads_weights_away_from_those_trained_on_own_samples(fitted: tuple[Any, Any]) -> None:
    model, settings = fitted
    how = settings, [5], 0.5, "cpu"
    worse, led = (Neon(weight=w, samples=8, updates=2).refine(model, *how) for w in (-1.0, 1.5))
    moved = 0
    for name, value in model.fitted().items():
        torch.testing.assert_close(led.fitted()[name], 2.5 * value - 1.5 * worse.fitted()[name], rtol=1e-4, atol=1e-5)
        moved += not torch.equal(value, worse.fitted()[name])
    assert moved
    again = Neon(weight=1.5, samples=8, updates=2).refine(model, *how)
    assert stored(again) == stored(led) != stored(model)
    loaded = unpacked(stored(led), lambda directory: type(model).load(directory))
    assert np.array_equal(loaded.sample(5, [1], 1.0).values, led.sample(5, [1], 1.0).values)


def test_sims_draws_by_two_networks_and_remembers_both() -> None:
    values = np.random.default_rng(0).integers(0, 256, (1, 12, 8, 8, 1), dtype=np.uint8)
    model = DiffusionGenerator.fit(DIFFUSION, Samples(values, np.arange(12)[None] % 3), [0])
    plain, led = (Sims(strength=w, samples=8, updates=2).refine(model, DIFFUSION, [5], 1.0, "cpu") for w in (0.0, 2.0))
    assert np.array_equal(plain.sample(6, [1], 1.0).values, model.sample(6, [1], 1.0).values)
    assert not np.array_equal(led.sample(6, [1], 1.0).values, model.sample(6, [1], 1.0).values)
    loaded = unpacked(stored(led), DiffusionGenerator.load)
    assert np.array_equal(loaded.sample(6, [1], 0.5).values, led.sample(6, [1], 0.5).values)


@pytest.fixture(scope="module")
def speaking(tiny_pipeline: Path) -> tuple[TextToImageGenerator, TextToImageSettings]:
    settings = TextToImageSettings(
        path=str(tiny_pipeline), from_scratch=False, training_steps=1, captioner=None, evaluator=None, sampling_steps=3
    )
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 16, 16, 3), dtype=np.uint8)
    return TextToImageGenerator.fit(settings, Samples(images, captions=np.array(PROMPTS * 2)[None]), [0]), settings


def aligned(**changes: Any) -> Aligned:
    known = {"steps": 4, "reward": "tests.rewards:redness", "images_per_step": 32, "sampling_steps": 3}
    return Aligned(**{**known, "learning_rate": 1e-3, **changes})


def redness(model: Any) -> float:
    images = model.sample(96, [9], 1.0).values[0].astype(float)
    return float((images[..., 0] - images[..., 1]).mean() / 255)


@pytest.mark.parametrize(("objective", "images"), [("importance_sampling", 32), ("negative_aware", 64)])
def test_alignment_moves_a_generation_up_its_reward(objective: str, images: int) -> None:
    """That of the default models, left as they are."""
    pictures, _, captions = captioned(1)
    settings = TextToImageSettings(from_scratch=False, training_steps=1, learning_rate=1e-9, sampling_steps=8)
    model = TextToImageGenerator.fit(
        settings, Samples(pictures[None, :64], captions=np.array(captions[:64])[None]), [0]
    )
    before = redness(model)
    how = {"objective": objective, "images_per_step": images, "sampling_steps": 5}
    right, shuffled = (
        redness(aligned(shuffled=each, **how).refine(model, settings, [3], 1.0, "cpu")) - before
        for each in (False, True)
    )
    assert right > 0.012
    assert shuffled < right / 2  # the control: rewards dealt out to the images at random


def test_alignment_repeats_itself_and_keeps_to_its_seed(speaking: Any) -> None:
    model, settings = speaking
    one, again, other = (aligned(steps=2).refine(model, settings, [seed], 1.0, "cpu") for seed in (1, 1, 2))
    assert stored(one) == stored(again) != stored(other)
    for reward, same in (("the_same", True), ("redness", False)):  # where all images are as good, nothing is learned
        led = aligned(reward=f"tests.rewards:{reward}").refine(model, settings, [1], 1.0, "cpu")
        assert (stored(led) == stored(model)) == same
    assert one.captions == model.captions
    held = aligned(steps=2, kl_weight=1e6).refine(model, settings, [1], 1.0, "cpu")
    far, near = (
        sum(float((each - model.fitted()[name]).abs().sum()) for name, each in led.fitted().items())
        for led in (one, held)
    )
    assert stored(held) != stored(one)
    assert near < 2 * far


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family=categorical", "n_ini=20", "refinement=neon"], "family categorical has no weights to extrapolate"),
        (["family=gan", "n_ini=20", "refinement=sims"], "family gan has no score"),
        (["family=diffusion", "n_ini=20", "refinement=aligned"], "family diffusion knows no prompts"),
        (["n_ini=20", "refinement=neno"], "refinement: .*neno"),
        (["n_ini=20", "refinement=neon", "neon.wieght=2"], "unknown key 'neon.wieght'; did you mean 'neon.weight'?"),
        (["n_ini=20", "refinement=aligned", "aligned.images_per_step=40"], "images_per_step"),
        (["n_ini=20", "refinement=aligned", "aligned.objective=nonsense"], "objective"),
        (["n_ini=20", "refinement=neon", "derive=[effective_samples]", "rule=fresh"], "without a refinement|n_real"),
    ],
)
def test_what_cannot_be_refined_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight_mad(load_config(MadConfig, None, overrides))


def test_a_refined_arm_shares_what_comes_before_with_a_plain_one() -> None:
    from orchestration.experiments.mad.loop import chain
    from pipelines.mad.graph import RealSource

    plain, led = (
        list(chain("arm", ArmSettings(family="gaussian", n_ini=20, refinement=each), [0], 2, RealSource(50)))
        for each in (None, "neon")
    )
    assert plain[0].fit.key == led[0].fit.key == plain[0].model.key != led[0].model.key
    assert plain[1].fit.key != led[1].fit.key
    assert measured(ArmSettings(family="gaussian", n_ini=20, refinement="neon"), 2, 3)["variance"].shape == (3, 2)
