"""An image is a function of (weights, prompt, seed); stock pipeline and learner agree with the sampler about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from diffusers import StableDiffusionPipeline

from actors.roles.sampler import PolicyVersion, Sampler
from pipelines.captioner import Captioner
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.stored_latents import StoredLatents
from pipelines.rl.trajectory import Trajectory
from pipelines.rl.weights import checksum, to_numpy
from pipelines.settings import CaptionerSettings, ModelSettings
from pipelines.storage.checkpoint import CheckpointStore, LearnerState
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS, build_tiny_blip2, build_tiny_captioner, build_tiny_clip, build_tiny_pipeline

BATCH = [prompt for prompt in PROMPTS for _ in range(3)][:8]
SEEDS = [2**62 + index for index in range(8)]


@pytest.fixture(params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest, tiny_pipeline: Path, tiny_v_pipeline: Path) -> ModelSettings:
    return ModelSettings(path=str(tiny_pipeline if request.param == "epsilon" else tiny_v_pipeline))


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for rounding: never more than one of 255 levels apart, and more than 99 % identical."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def draw_with_stock_pipeline(directory: str | Path, sampling: SamplingSettings) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        BATCH,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        eta=sampling.eta,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
    ).images
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_an_image_does_not_depend_on_the_others_of_its_batch(model: ModelSettings, guidance_scale: float) -> None:
    policy = DiffusionPolicy(model, SamplingSettings(steps=5, guidance_scale=guidance_scale))
    images, trajectory = policy.rollout(BATCH, SEEDS)
    for i in (0, 7):
        alone, alone_trajectory = policy.rollout([BATCH[i]], [SEEDS[i]])
        assert_same_images(images[i : i + 1], alone)
        np.testing.assert_allclose(trajectory.latents[i], alone_trajectory.latents[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(trajectory.log_probs[i], alone_trajectory.log_probs[0], rtol=0, atol=1e-3)
    order = [3, 1, 4, 0, 5, 2, 6, 7]
    shuffled, _ = policy.rollout([BATCH[i] for i in order], [SEEDS[i] for i in order])
    assert_same_images(images[order], shuffled)


def test_the_same_chunk_gives_the_same_bits(model: ModelSettings) -> None:
    """Whoever draws it, whatever was drawn before, and whatever state the global generator is in."""
    sampling = SamplingSettings(steps=5, guidance_scale=2.0)
    images, trajectory = DiffusionPolicy(model, sampling).rollout(BATCH, SEEDS)
    other = DiffusionPolicy(model, sampling)
    other.rollout(["a gray zero"], [1])
    torch.manual_seed(12345)
    again, trajectory_again = other.rollout(BATCH, SEEDS)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(trajectory.latents, trajectory_again.latents)
    np.testing.assert_array_equal(trajectory.log_probs, trajectory_again.log_probs)


def test_prompt_and_seed_both_matter(model: ModelSettings) -> None:
    policy = DiffusionPolicy(model, SamplingSettings(steps=5, guidance_scale=5.0))
    images, _ = policy.rollout([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [1, 2, 1])
    assert (images[0] != images[1]).mean() > 0.5
    assert (images[0] != images[2]).mean() > 0.1


def test_trajectory_is_complete(model: ModelSettings) -> None:
    policy = DiffusionPolicy(model, SamplingSettings(steps=5))
    images, trajectory = policy.rollout(BATCH, SEEDS, weights_version=3)
    assert (trajectory.prompts, trajectory.seeds, trajectory.weights_version) == (BATCH, SEEDS, 3)
    assert trajectory.latents.shape == (8, 6, 4, 8, 8)
    assert trajectory.latents.dtype == np.float32
    assert trajectory.log_probs.dtype == np.float64
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(SEEDS[5]))
    np.testing.assert_array_equal(trajectory.latents[5, 0], noise.numpy())
    np.testing.assert_array_equal(policy.decode(torch.from_numpy(trajectory.latents[:, -1])), images)
    finite = np.isfinite(trajectory.log_probs)
    assert finite[:, policy.schedule.stochastic_steps.numpy()].all()
    assert finite.sum() == 8 * len(policy.schedule.stochastic_steps)


def test_a_deterministic_last_step_has_no_log_probability(tiny_v_pipeline: Path) -> None:
    policy = DiffusionPolicy(ModelSettings(path=str(tiny_v_pipeline)), SamplingSettings(steps=5))
    _, trajectory = policy.rollout(BATCH[:2], SEEDS[:2])
    assert np.isnan(trajectory.log_probs[:, -1]).all()
    assert policy.schedule.stochastic_steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_stock_pipeline_draws_the_same_images(model: ModelSettings, guidance_scale: float) -> None:
    sampling = SamplingSettings(steps=6, guidance_scale=guidance_scale)
    images, _ = DiffusionPolicy(model, sampling).rollout(BATCH, SEEDS)
    assert_same_images(images, draw_with_stock_pipeline(model.path, sampling))


def first_update_errors(model: ModelSettings, guidance_scale: float, micro_batch: int) -> dict[int, float]:
    """The largest |ratio − 1| over 8 images for every stochastic step, before anything was learned."""
    sampling = SamplingSettings(steps=5, guidance_scale=guidance_scale)
    training = TrainingSettings(images_per_step=8, images_per_prompt=1, updates_per_step=1, micro_batch=micro_batch)
    policy = DiffusionPolicy(model, sampling)
    _, trajectory = policy.rollout(BATCH, SEEDS)
    learner = DiffusionLearner(model, sampling, training, seed=0)
    statistics, _ = learner.learn(trajectory, np.linspace(-1, 1, 8), seed=0)
    assert sorted(statistics.first_update_error) == policy.schedule.stochastic_steps.tolist()
    return {step: float(np.expm1(error)) for step, error in statistics.first_update_error.items()}


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_ratio_is_one_on_the_first_update(tiny_pipeline: Path, guidance_scale: float, micro_batch: int) -> None:
    """For every image and timestep, although sampling and training call the network with other batches."""
    errors = first_update_errors(ModelSettings(path=str(tiny_pipeline)), guidance_scale, micro_batch)
    assert len(errors) == 5
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("kernels", "mode"),
    [(("channels_last",), None), (("compiled",), "default"), (("channels_last", "graphs"), "reduce-overhead")],
)
def test_a_network_made_fast_draws_the_same_and_has_ratio_one(
    tiny_pipeline: Path, kernels: Any, mode: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled, compile_ = list[str](), torch.nn.Module.compile

    def captured(network: torch.nn.Module, mode: str, **how: Any) -> None:
        compiled.append(mode)
        compile_(network, backend="eager", **how)  # captured alike, without the minutes a compiler takes

    monkeypatch.setattr(torch.nn.Module, "compile", captured)
    sampling = SamplingSettings(steps=3, guidance_scale=5.0)
    rank = 0 if mode else 2
    model = ModelSettings(path=str(tiny_pipeline), lora_rank=rank, kernels=kernels)
    plain = DiffusionPolicy(ModelSettings(path=str(tiny_pipeline)), sampling)
    training = TrainingSettings(images_per_step=8, images_per_prompt=1, updates_per_step=1, micro_batch=12)
    policy, learner = DiffusionPolicy(model, sampling), DiffusionLearner(model, sampling, training, seed=0)
    assert compiled == ([mode, mode] if mode else [])
    weight = learner.policy.network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in kernels)
    images, trajectory = policy.rollout(BATCH, SEEDS)
    assert_same_images(images, plain.rollout(BATCH, SEEDS)[0])
    for seed in range(2):  # weights that were sent are used, too
        statistics, changed = learner.learn(trajectory, np.linspace(-1, 1, 8), seed=seed)
        assert max(statistics.first_update_error.values()) < 1e-5
        assert changed
        policy.load(learner.weights())
        again, trajectory = policy.rollout(BATCH, SEEDS, learner.weights_version)
    assert not np.array_equal(again, images)
    learner.save(tmp_path / "saved")  # whatever its layout, as others read it
    saved = DiffusionPolicy(ModelSettings(path=str(tmp_path / "saved")), sampling)
    assert_same_images(saved.rollout(BATCH, SEEDS)[0], again)
    goes_on = DiffusionLearner(model, sampling, training, seed=1)
    state, store = learner.state(), CheckpointStore(tmp_path / "commits")
    store.commit(1, state.tensors, {})  # which keeps no memory layout
    goes_on.restore(LearnerState(store.load(1).tensors, state.weights_version))
    for each in (goes_on, learner):
        each.learn(trajectory, np.linspace(-1, 1, 8), seed=2)
    assert checksum(goes_on.state().tensors) == checksum(learner.state().tensors)


def test_ratio_is_one_where_the_last_step_is_deterministic(tiny_v_pipeline: Path) -> None:
    errors = first_update_errors(ModelSettings(path=str(tiny_v_pipeline)), guidance_scale=5.0, micro_batch=7)
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_divergence_from_the_base_is_that_of_its_normal_steps(
    tiny_v_pipeline: Path, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the mean it is log p − log p_base of the steps that were taken."""
    sampling = SamplingSettings(steps=5, guidance_scale=guidance_scale)
    model = ModelSettings(path=str(tiny_v_pipeline))
    base, sampler = DiffusionPolicy(model, sampling), Sampler(model, sampling, "cpu", 1)
    prompts, seeds = BATCH * 3, list(range(24))
    _, untouched = sampler.rollout(PolicyVersion(), prompts, seeds, sampling)
    np.testing.assert_array_equal(sampler.divergence(PolicyVersion(), untouched), np.zeros(16))

    weights = {name: 1.2 * to_numpy(each) for name, each in base.network.named_parameters()}
    assert sampler.set_weights(1, weights).changed_tensors > 10
    _, trajectory = sampler.rollout(PolicyVersion(1), prompts, seeds, sampling)
    divergences, schedule = sampler.divergence(PolicyVersion(1), trajectory), base.schedule
    latents, conditions = torch.from_numpy(trajectory.latents), base.embed(prompts)
    taken, there = trajectory.log_probs, np.full((24, 5), np.nan)
    for step in schedule.stochastic_steps:
        index = step.repeat(24)
        with torch.no_grad():
            output = base.predict(latents[:, step], schedule.timesteps[index], conditions)
        there[:, step] = schedule.log_prob(latents[:, step], latents[:, step + 1], output, index).numpy()
    ratios = np.nansum(taken - there, axis=1) * latents[0, 0].numel()
    error = ratios.std() / np.sqrt(24)
    assert divergences.shape == (16,)
    assert abs(ratios.mean() - divergences.mean()) < 4 * error
    assert divergences.mean() > 5 * error

    restarted = Sampler(model, sampling, "cpu", 1)  # as Ray does it between the chunk and its measure
    monkeypatch.setattr(ray, "get", lambda sent: sent)
    sent = PolicyVersion(1, checksum(weights), weights)
    np.testing.assert_array_equal(restarted.divergence(sent, trajectory), divergences)
    assert sampler.set_weights(2, weights).changed_tensors == 0  # they are there again


def test_trajectories_are_joined_in_order_and_never_mixed(model: ModelSettings) -> None:
    policy = DiffusionPolicy(model, SamplingSettings(steps=2))
    parts = [policy.rollout([PROMPTS[i]], [SEEDS[i]], weights_version=1)[1] for i in range(3)]
    joined = Trajectory.concatenate(parts)
    assert (joined.prompts, joined.seeds) == (list(PROMPTS), SEEDS[:3])
    np.testing.assert_array_equal(joined.latents[2], parts[2].latents[0])
    np.testing.assert_array_equal(joined.log_probs[1], parts[1].log_probs[0])
    stored = StoredLatents([each.latents for each in (parts[0], joined, parts[2])], torch.device("cpu"))
    images, steps = torch.tensor([4, 0, 3, 1, 4]), torch.tensor([0, 2, 1, 1, 2])
    expected = [parts[each].latents[0] for each in (2, 0, 2, 0, 2)]
    for found, where in ((stored[images, steps], steps), (stored[images, -1], torch.full((5,), -1))):
        np.testing.assert_array_equal(found, [each[step] for each, step in zip(expected, where.tolist(), strict=True)])
    newer = policy.rollout([PROMPTS[0]], [0], weights_version=2)[1]
    with pytest.raises(ValueError, match=r"versions \[1, 2\]"):
        Trajectory.concatenate([*parts, newer])


@pytest.mark.parametrize("build", [build_tiny_captioner, build_tiny_blip2])
def test_captions_are_a_function_of_the_image(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    captioner = Captioner(CaptionerSettings(path=str(build(tmp_path)), max_new_tokens=4))
    images = np.random.default_rng(0).integers(0, 256, size=(6, 16, 16, 3), dtype=np.uint8)
    captions = captioner.caption(images)
    assert captions == [captioner.caption(image[None])[0] for image in images]
    assert len(set(captions)) > 1
    assert {len(caption.split()) for caption in captions} <= {3, 4}


def test_a_model_that_is_no_captioner(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip is no captioner"):
        Captioner(CaptionerSettings(path=str(build_tiny_clip(tmp_path))))


def test_models_of_another_size(tmp_path: Path) -> None:
    build_tiny_pipeline(tmp_path / "pipeline", image_size=64)
    build_tiny_captioner(tmp_path / "captioner", image_size=64)
    policy = DiffusionPolicy(ModelSettings(path=str(tmp_path / "pipeline")), SamplingSettings(steps=2))
    images, trajectory = policy.rollout(BATCH[:2], SEEDS[:2])
    assert images.shape == (2, 64, 64, 3)
    assert trajectory.latents.shape == (2, 3, 4, 32, 32)
    assert len(Captioner(CaptionerSettings(path=str(tmp_path / "captioner"))).caption(images)) == 2
