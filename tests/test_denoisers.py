"""Every family of models end to end, with genuine classes: drawn, learned from, sent on, drawn by stock pipelines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from pipelines.denoisers import load_family
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import lora_layers
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import (
    PROMPTS,
    build_tiny_flux,
    build_tiny_pipeline,
    build_tiny_pixels,
    build_tiny_sd3,
    build_tiny_video,
    build_tiny_xl,
)

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_pipeline,
    "sd-v": lambda directory: build_tiny_pipeline(directory, prediction_type="v_prediction"),
    "xl": build_tiny_xl,
    "sd3": build_tiny_sd3,
    "sd3.5": lambda directory: build_tiny_sd3(directory, dynamic=True),
    "flux": build_tiny_flux,
    "schnell": lambda directory: build_tiny_flux(directory, guidance_embeds=False, dynamic=False),
    "pixels": build_tiny_pixels,
    "video": build_tiny_video,
}
GUIDANCE = {"sd": 5.0, "sd-v": 1.0, "xl": 5.0, "sd3": 3.0, "sd3.5": 3.0, "flux": 3.5, "schnell": 1.0, "pixels": 1.0}
GUIDANCE["video"] = 5.0
FLOWS = ("sd3", "sd3.5", "flux", "schnell")
BATCH, SEEDS = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]], [1, 2, 3, 2**62]
TRAINING = TrainingSettings(images_per_step=4, images_per_prompt=1, updates_per_step=1, micro_batch=3)


@pytest.fixture(scope="module", params=BUILDERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(path=str(BUILDERS[name](tmp_path_factory.mktemp(name))))


@pytest.fixture(scope="module")
def sampling(name: str) -> SamplingSettings:
    return SamplingSettings(steps=6, eta=0.7 if name in FLOWS else 1.0, guidance_scale=GUIDANCE[name])


@pytest.fixture(scope="module")
def policy(model: ModelSettings, sampling: SamplingSettings) -> DiffusionPolicy:
    return DiffusionPolicy(model, sampling)


def test_a_model_that_was_loaded_asks_its_directory_no_more(
    name: str, policy: DiffusionPolicy, sampling: SamplingSettings, tmp_path: Path
) -> None:
    """A study's products are unpacked only to be loaded."""
    directory = BUILDERS[name](tmp_path / "pipeline")
    loaded = DiffusionPolicy(ModelSettings(path=str(directory)), sampling)
    shutil.rmtree(directory)
    np.testing.assert_array_equal(loaded.rollout(BATCH, SEEDS)[0], policy.rollout(BATCH, SEEDS)[0])


def test_log_probabilities_are_those_of_a_normal(policy: DiffusionPolicy) -> None:
    """With the mean found by taking the step without noise, and the deviation by taking it with noise 1."""
    _, trajectory = policy.rollout(BATCH, SEEDS)
    latents, told = torch.from_numpy(trajectory.latents), policy.embed(BATCH)
    for step in policy.schedule.stochastic_steps.tolist():
        index = torch.full((4,), step)
        before, after = latents[:, step], trajectory.latents[:, step + 1].astype(np.float64)
        with torch.no_grad():
            output = policy.predict(before, policy.schedule.timesteps[index], told).double()
        mean = policy.schedule.mean(before, output, index).numpy()
        sigma = float(policy.schedule.sigma[step])
        density = norm.logpdf(after, mean, sigma).reshape(4, -1).mean(axis=1)
        np.testing.assert_allclose(trajectory.log_probs[:, step], density, rtol=0, atol=1e-4)
        drawn = (after - mean) / sigma  # the noise: of four images, hundreds of numbers
        assert abs(drawn.mean()) < 0.2
        assert drawn.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_learner_reproduces_what_was_drawn_and_moves_the_sampler(
    model: ModelSettings, sampling: SamplingSettings, rank: int
) -> None:
    targets = ("conv1", "conv2", "to_q") if "pixels" in model.path else ("to_q", "to_v", "to_out.0")
    trained = model.model_copy(update={"lora_rank": rank, "lora_targets": targets})
    sampler, learner = DiffusionPolicy(model, sampling), DiffusionLearner(trained, sampling, TRAINING, seed=0)
    before, trajectory = sampler.rollout(BATCH, SEEDS)
    statistics, changed = learner.learn(trajectory, np.array([1.0, -1.0, 2.0, -2.0]), seed=0)
    assert list(statistics.first_update_error) == sampler.schedule.stochastic_steps.tolist()
    assert max(statistics.first_update_error.values()) < 1e-5
    assert changed > 0
    assert sampler.load(learner.weights()) > 0
    for name, held in whole(learner).items():
        torch.testing.assert_close(dict(sampler.network.named_parameters())[name], held, rtol=0, atol=0)
    after, trajectory = sampler.rollout(BATCH, SEEDS, weights_version=1)
    assert not np.array_equal(
        trajectory.latents[:, -1], DiffusionPolicy(model, sampling).rollout(BATCH, SEEDS)[1].latents[:, -1]
    )
    statistics, _ = learner.learn(trajectory, np.array([1.0, -1.0, 2.0, -2.0]), seed=1)
    assert max(statistics.first_update_error.values()) < 1e-4
    assert before.shape == after.shape == (4, *before.shape[1:3], 3)


def whole(learner: DiffusionLearner) -> dict[str, torch.Tensor]:
    """What a learner trains, LoRA merged, by the plain network's names."""
    layers = lora_layers(learner.policy.network)
    return {f"{name}.weight": layer.whole() for name, layer in layers.items()} or dict(learner.parameters)


def test_a_stock_pipeline_draws_the_same_images(name: str, model: ModelSettings, sampling: SamplingSettings) -> None:
    """Of a flow with so little noise that the SDE is the ODE, which is what the stock pipeline follows."""
    if name in FLOWS:
        sampling = sampling.model_copy(update={"eta": 1e-6})
    ours, _ = DiffusionPolicy(model, sampling).rollout(BATCH, SEEDS)
    pipeline = load_family(model.path, torch.float32).pipeline
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": 6, "output_type": "np", "generator": generators}
    if name == "pixels":
        theirs = pipeline(batch_size=4, eta=1.0, **options).images
    elif name in FLOWS:
        theirs = pipeline(BATCH, guidance_scale=GUIDANCE[name], height=16, width=16, **options).images
    elif name == "video":
        videos = pipeline(BATCH, num_frames=3, guidance_scale=5.0, eta=1.0, **options).frames
        theirs = videos.reshape(4, 3 * 16, 16, 3)  # frames below each other
    else:
        theirs = pipeline(BATCH, guidance_scale=GUIDANCE[name], eta=1.0, **options).images
    difference = np.abs(np.round(theirs * 255) - ours.astype(float))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.98
    assert ours.std() > 5


def test_the_flow_keeps_its_marginals(tmp_path: Path) -> None:
    """If data are N(0, s²), the flow's velocity is known, and the SDE's samples have to be N(0, s²) as well."""
    s, steps = 0.5, 400
    family = load_family(str(build_tiny_sd3(tmp_path)), torch.float32)
    schedule = family.schedule(SamplingSettings(steps=steps, eta=0.7))
    x = torch.randn(1, 1, 200, 200, dtype=torch.float64)
    for step in range(steps):
        t, index = schedule.times[step], torch.tensor([step])  # type: ignore[attr-defined]
        variance = (1 - t) ** 2 * s**2 + t**2
        velocity = x * (t - (1 - t) * s**2) / variance  # E[ε − x_0 | x_t]
        x = schedule.mean(x, velocity, index) + schedule.sigma[step] * torch.randn(x.shape, dtype=x.dtype)
    assert x.std().item() == pytest.approx(s, rel=0.03)
    assert schedule.sigma[-1] == 0 < schedule.sigma[:-1].min()


@pytest.mark.parametrize("step", [0, 3, 5])
def test_forward_process_and_denoised_are_each_others_inverse(policy: DiffusionPolicy, step: int) -> None:
    """The network's best output leads back to x_0 from wherever noise leads."""
    schedule, index = policy.schedule, torch.full((2,), step)
    clean, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    mixed = schedule.diffuse(clean, noise, index)
    kind = getattr(schedule, "prediction_type", "flow")
    if kind == "v_prediction":
        alpha = schedule.alpha[step]  # type: ignore[attr-defined]
        best = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    else:
        best = noise - clean if kind == "flow" else noise
    torch.testing.assert_close(schedule.denoised(mixed, best, index), clean, rtol=1e-6, atol=1e-6)


def test_divergence_is_that_of_two_normals(policy: DiffusionPolicy) -> None:
    schedule, index = policy.schedule, torch.tensor([0, 3])
    x, first, second = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    normal = [
        torch.distributions.Normal(schedule.mean(x, output, index), schedule.sigma[index].view(2, 1, 1, 1))
        for output in (first, second)
    ]
    expected = torch.distributions.kl_divergence(*normal).flatten(1)
    torch.testing.assert_close(schedule.divergence(x, first, second, index), expected.mean(1))
    torch.testing.assert_close(schedule.divergence(x, first, second, index, "sum"), expected.sum(1))


def test_what_is_no_known_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(ValueError, match=r"is a SanaPipeline; known are StableDiffusionPipeline, .*DDPMPipeline"):
        load_family(str(tmp_path), torch.float32)


def test_pixels_without_prompts_cannot_be_guided(tmp_path: Path) -> None:
    path = build_tiny_pixels(tmp_path)
    with pytest.raises(ValueError, match=r"knows no prompts that could guide it: set sampling\.guidance_scale=1"):
        DiffusionPolicy(ModelSettings(path=str(path)), SamplingSettings(guidance_scale=2.0))


def test_times_of_a_flow_depend_on_the_size_where_it_says_so(tmp_path: Path) -> None:
    """t is shifted to e^μ / (e^μ + 1/t − 1), with μ linear in the number of tokens."""
    family = load_family(str(build_tiny_flux(tmp_path)), torch.float32)
    slope = (1.15 - 0.5) / (4096 - 4)
    shift = np.exp(0.5 + slope * (16 - 4))
    even = np.array([1, 0.75, 0.5, 0.25])
    times = family.schedule(SamplingSettings(steps=4)).times  # type: ignore[attr-defined]
    np.testing.assert_allclose(times, [*(shift / (shift + 1 / even - 1)), 0], rtol=1e-6)


def test_what_was_distilled_without_guidance_cannot_be_guided(tmp_path: Path) -> None:
    path = build_tiny_flux(tmp_path, guidance_embeds=False)
    with pytest.raises(ValueError, match=r"was distilled without guidance .*: set sampling\.guidance_scale=1"):
        DiffusionPolicy(ModelSettings(path=str(path)), SamplingSettings(guidance_scale=2.0))
