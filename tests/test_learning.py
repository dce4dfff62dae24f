"""The learner of a diffusion model: what it trains, what it gives away, and how it goes on where it stopped."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.denoisers import load_family
from pipelines.rl.activations import kept_bytes
from pipelines.rl.learning import DiffusionLearner, LearnerState
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.trajectory import Trajectory
from pipelines.rl.weights import changed_by, checksum, fill, load_weights, masters, to_numpy
from pipelines.settings import ModelSettings
from pipelines.storage.checkpoint import CheckpointStore
from policies.rl.ratio import LEAST, RatioBound, RatioError
from policies.rl.settings import SamplingSettings, TrainingSettings
from policies.rl.update import PolicyLearner
from tests.models import PROMPTS

SAMPLING = SamplingSettings(steps=4, guidance_scale=2.0)
TRAINING = TrainingSettings(
    micro_batch=8,
    images_per_step=6,
    images_per_prompt=2,
    updates_per_step=2,
    learning_rate=1e-3,
    clip_range=0.1,
)
BATCH = [prompt for prompt in PROMPTS for _ in range(2)]
SEEDS = list(range(6))
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
LORA_TARGETS = ("to_q", "to_out.0", "conv1")


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def model(request: pytest.FixtureRequest, tiny_v_pipeline: Path) -> ModelSettings:
    return ModelSettings(path=str(tiny_v_pipeline), lora_rank=request.param, lora_targets=LORA_TARGETS)


WHOLE = pytest.mark.parametrize("model", [0], ids=["full"], indirect=True)  # where LoRA is no other case


@pytest.fixture
def sampler(model: ModelSettings) -> DiffusionPolicy:
    """As samplers hold it: the plain UNet, into which weights are loaded."""
    return DiffusionPolicy(model, SAMPLING)


def make_learner(model: ModelSettings, seed: int = 0) -> DiffusionLearner:
    return DiffusionLearner(model, SAMPLING, TRAINING, seed)


def draw(sampler: DiffusionPolicy, version: int = 0) -> Trajectory:
    return sampler.rollout(BATCH, SEEDS, version)[1]


@functools.cache
def plain_unet_names(path: str) -> tuple[str, ...]:
    return tuple(name for name, _ in load_family(path, torch.float32).network.named_modules())


def test_restored_learner_goes_on_bit_for_bit(model: ModelSettings, sampler: DiffusionPolicy, tmp_path: Path) -> None:
    """Through a checkpoint on the disk and into a learner that started from other random numbers."""
    learner, store = make_learner(model), CheckpointStore(tmp_path)
    learner.learn(draw(sampler), ADVANTAGE, seed=1)
    store.commit(1, learner.state().tensors, {"version": learner.weights_version})
    commit = store.load()
    resumed = make_learner(model, seed=99)
    resumed.restore(LearnerState(commit.tensors, commit.state["version"]))
    assert checksum(resumed.weights()) == checksum(learner.weights())
    sampler.load(learner.weights())
    trajectory = draw(sampler, version=1)
    for each in (learner, resumed):
        each.learn(trajectory, ADVANTAGE, seed=2)
    assert checksum(resumed.weights()) == checksum(learner.weights())
    assert checksum(resumed.state().tensors) == checksum(learner.state().tensors)
    assert resumed.weights_version == learner.weights_version == 2


def test_optimizer_moments_matter(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    """The test above would also pass without moments, were the optimiser to have none."""
    learner, forgetful = make_learner(model), make_learner(model)
    learner.learn(draw(sampler), ADVANTAGE, seed=1)
    state = learner.state()
    moments = {key.rsplit("/", 1)[1] for key in state.tensors if key.startswith("optimizer/")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    parameters = {key: value for key, value in state.tensors.items() if key.startswith("parameter/")}
    forgetful.restore(LearnerState(parameters, 1))
    sampler.load(learner.weights())
    trajectory = draw(sampler, version=1)
    for each in (learner, forgetful):
        each.learn(trajectory, ADVANTAGE, seed=2)
    assert checksum(forgetful.weights()) != checksum(learner.weights())


def test_state_of_another_model_is_refused(tiny_v_pipeline: Path) -> None:
    full = make_learner(ModelSettings(path=str(tiny_v_pipeline)))
    lora = make_learner(ModelSettings(path=str(tiny_v_pipeline), lora_rank=2))
    with pytest.raises(KeyError):
        lora.restore(full.state())


def test_sampler_and_learner_agree_after_a_transfer(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    """The ratio is 1 again on the images of the second version, LoRA merged in the sampler and not in the learner."""
    learner = make_learner(model)
    learner.learn(draw(sampler), ADVANTAGE, seed=1)
    assert sampler.load(learner.weights()) > 0
    statistics, _ = learner.learn(draw(sampler, version=1), ADVANTAGE, seed=2)
    assert sorted(statistics.first_update_error) == [0, 1, 2]
    assert max(statistics.first_update_error.values()) < 1e-5


def test_images_of_other_weights_are_refused(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    learner = make_learner(model)
    with pytest.raises(ValueError, match="drawn by weights version 1, the learner holds 0"):
        learner.learn(draw(sampler, version=1), ADVANTAGE, seed=1)
    assert learner.weights_version == 0


def test_weights_are_counted_and_summed_as_they_travel(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    learner = make_learner(model)
    before = learner.weights()
    assert sampler.load(before) == 0
    _, changed = learner.learn(draw(sampler), ADVANTAGE, seed=1)
    after = learner.weights()
    differing = {name.split(".lora_")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert sampler.load(after) == len(differing) > 0
    assert sampler.load(after) == 0
    assert changed > 0
    assert checksum(before) != checksum(after)
    assert checksum(after) == checksum(learner.weights()) == checksum(dict(reversed(after.items())))


def test_checksum_covers_names_shapes_types_and_bytes() -> None:
    base: dict[str, np.ndarray] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    others: list[dict[str, np.ndarray]] = [
        {"b": base["a"]},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"].view(np.int32)},
        {"a": np.nextafter(base["a"], np.float32(9))},
        {"a": base["a"], "b": np.zeros(1, np.float32)},
        {"a": base["a"].ravel()[:1].reshape(())},
        {"a": base["a"].ravel()[:1]},
    ]
    assert len({checksum(weights) for weights in [base, *others]}) == len(others) + 1
    assert checksum({"a": base["a"].T.copy().T}) == checksum(base)  # not the order in memory


def test_an_unknown_weight_is_refused(sampler: DiffusionPolicy) -> None:
    with pytest.raises(KeyError, match=r"no\.such\.weight"):
        sampler.load({"no.such.weight": np.zeros(1, np.float32)})


def test_full_fine_tuning_changes_everything_that_has_a_gradient(tiny_v_pipeline: Path) -> None:
    model = ModelSettings(path=str(tiny_v_pipeline))
    learner = make_learner(model)
    names = set(learner.parameters)
    assert names == {name for name, _ in learner.policy.network.named_parameters()}
    before = learner.weights()
    _, changed = learner.learn(draw(DiffusionPolicy(model, SAMPLING)), ADVANTAGE, seed=1)
    after = learner.weights()
    moved = {name for name in names if not np.array_equal(before[name], after[name])}
    with_gradient = {name for name, p in learner.parameters.items() if p.grad is not None and p.grad.any()}
    assert moved == with_gradient
    assert changed == len(moved) == len(names)


def test_only_the_unet_is_trained_and_nothing_drops_out(model: ModelSettings) -> None:
    pipeline = make_learner(model).policy.family.pipeline
    assert not any(p.requires_grad for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    dropouts = [module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)


def test_lora_binds_to_exactly_the_named_modules(tiny_v_pipeline: Path) -> None:
    model = ModelSettings(path=str(tiny_v_pipeline), lora_rank=4, lora_targets=LORA_TARGETS)
    learner = make_learner(model)
    endings = tuple(f".{target}" for target in LORA_TARGETS)
    targets = [name for name in plain_unet_names(model.path) if f".{name}".endswith(endings)]
    assert {name.rsplit(".", 1)[1] for name in targets} == {"to_q", "0", "conv1"}
    assert set(learner.parameters) == {f"{n}.lora_{half}.default.weight" for n in targets for half in "AB"}
    assert set(changed_by(learner.weights())) == {f"{name}.weight" for name in targets}
    assert set(learner.weights()) == {f"{n}.lora_{half}.weight" for n in targets for half in "AB"}
    assert learner.parameters[f"{targets[0]}.lora_A.default.weight"].shape[0] == 4


@pytest.mark.parametrize("targets", [("to_q", "to_typo"), ("o_q",), ("to_out.1.nothing",)])
def test_lora_that_would_bind_to_nothing_is_refused(tiny_v_pipeline: Path, targets: tuple[str, ...]) -> None:
    model = ModelSettings(path=str(tiny_v_pipeline), lora_rank=4, lora_targets=targets)
    with pytest.raises(ValueError, match=f"LoRA target '{targets[-1]}' matches no module"):
        make_learner(model)


def test_lora_starts_at_the_base_model(tiny_v_pipeline: Path) -> None:
    learner = make_learner(ModelSettings(path=str(tiny_v_pipeline), lora_rank=4, lora_targets=LORA_TARGETS))
    plain = load_family(str(tiny_v_pipeline), torch.float32).network
    assert load_weights(plain, learner.weights()) == 0


def test_merged_lora_is_the_network_that_was_trained(tiny_v_pipeline: Path) -> None:
    model = ModelSettings(path=str(tiny_v_pipeline), lora_rank=4, lora_targets=LORA_TARGETS)
    sampler, learner = DiffusionPolicy(model, SAMPLING), make_learner(model)
    learner.learn(draw(sampler), ADVANTAGE, seed=1)
    latents, times, embeddings = torch.randn(4, 4, 8, 8), torch.tensor([999, 500, 100, 1]), sampler.embed(BATCH[:4])
    with torch.no_grad():
        base = sampler.predict(latents, times, embeddings)
        sampler.load(learner.weights())
        merged = sampler.predict(latents, times, embeddings)
        trained = learner.policy.predict(latents, times, embeddings)
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)


def test_what_is_saved_draws_the_same_in_the_stock_pipeline(
    model: ModelSettings, sampler: DiffusionPolicy, tmp_path: Path
) -> None:
    learner = make_learner(model)
    trajectory = draw(sampler)
    learner.learn(trajectory, ADVANTAGE, seed=1)
    sampler.load(learner.weights())
    images, after = sampler.rollout(BATCH, SEEDS)
    assert np.abs(after.latents[:, -1] - trajectory.latents[:, -1]).max() > 1e-2
    learner.save(str(tmp_path))
    assert not list(tmp_path.rglob("*.bin"))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = stock(BATCH, generator=generators, eta=1.0, num_inference_steps=4, guidance_scale=2.0).images
    difference = np.abs(np.stack([np.asarray(image) for image in drawn]).astype(int) - images)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_sum_density_is_learned_from_as_well(tiny_v_pipeline: Path) -> None:
    """The sampler stores the mean over pixels; a learner that wants the sum scales it and finds ratio 1 too."""
    model = ModelSettings(path=str(tiny_v_pipeline))
    training = TRAINING.model_copy(update={"log_density": "sum", "updates_per_step": 1, "ratio_tolerance": 1e-2})
    learner = DiffusionLearner(model, SAMPLING, training, seed=0)
    statistics, _ = learner.learn(draw(DiffusionPolicy(model, SAMPLING)), ADVANTAGE, seed=0)
    assert max(statistics.first_update_error.values()) < 256 * 1e-5


def test_micro_batches_are_found_of_equal_size(tiny_pipeline: Path) -> None:
    """700 transitions do not fit into one call: two of 350, not 512 and 188."""
    training = TrainingSettings(
        images_per_step=140, images_per_prompt=7, updates_per_step=1, timestep_fraction=0.5, micro_batch=None
    )
    model = ModelSettings(path=str(tiny_pipeline))
    assert DiffusionLearner(model, SamplingSettings(steps=10), training, seed=0).micro_batch == 350
    few = training.model_copy(update={"images_per_step": 7})
    assert DiffusionLearner(model, SamplingSettings(steps=10), few, seed=0).micro_batch == 35


def test_micro_batches_shrink_with_the_memory_of_the_machine(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, training = ModelSettings(path=str(tiny_pipeline)), TrainingSettings(updates_per_step=1)
    wide = DiffusionLearner(model, SAMPLING, training, seed=0)
    taken = kept_bytes(wide.policy)
    monkeypatch.setattr("pipelines.rl.activations.memory_limit", lambda: 8 * 10 * taken)
    assert DiffusionLearner(model, SAMPLING, training, seed=0).micro_batch <= 10 < wide.micro_batch


def test_activations_are_computed_twice_where_memory_is_small(
    model: ModelSettings, sampler: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which gives the same bits, and room for a micro-batch that there was none for."""
    usual = make_learner(model)
    taken = kept_bytes(usual.policy)
    monkeypatch.setattr("pipelines.rl.activations.memory_limit", lambda: 8 * 3 * taken)
    small = make_learner(model)
    assert [each.policy.network.is_gradient_checkpointing for each in (usual, small)] == [False, True]
    assert kept_bytes(small.policy) < 0.8 * taken
    trajectory = draw(sampler)
    for each in (usual, small):
        each.learn(trajectory, ADVANTAGE, seed=1)
    assert checksum(small.weights()) == checksum(usual.weights())


def averaging(model: ModelSettings, **keys: object) -> DiffusionLearner:
    training = TRAINING.model_copy(update={"ema_decay": 0.75, **keys})
    return DiffusionLearner(model, SAMPLING, training, seed=0)


def test_the_average_follows_the_weights(model: ModelSettings, sampler: DiffusionPolicy, tmp_path: Path) -> None:
    learner = averaging(model)
    values = [{name: value.detach().clone() for name, value in learner.parameters.items()}]
    for version in range(2):
        learner.learn(draw(sampler, version), ADVANTAGE, seed=version)
        values.append({name: value.detach().clone() for name, value in learner.parameters.items()})
        sampler.load(learner.weights())
    for name, mean in learner.average.items():
        expected = 0.75 * (0.75 * values[0][name] + 0.25 * values[1][name]) + 0.25 * values[2][name]
        torch.testing.assert_close(mean, expected)
    current, average = checksum(learner.weights()), checksum(learner.weights("averaged"))
    assert current != average
    assert checksum(learner.weights()) == current  # looking at the average leaves the weights as they are
    resumed = averaging(model)
    resumed.restore(learner.state())
    assert (checksum(resumed.weights()), checksum(resumed.weights("averaged"))) == (current, average)
    learner.save(tmp_path)
    saved, plain = (load_family(path, torch.float32).network for path in (str(tmp_path), model.path))
    assert load_weights(plain, learner.weights("averaged")) > 0
    for one, other in zip(saved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_half_precision_weight_learns_as_a_float32_one_does() -> None:
    """200 AdamW steps at 1e-5: each is lost on a bfloat16 weight of 0.05, whose neighbours are 2e-4 away."""

    def moved(dtype: torch.dtype) -> tuple[float, float]:
        weight = torch.nn.Parameter(torch.full((4,), 0.05, dtype=dtype))
        held = masters({"weight": weight})
        training = TrainingSettings(images_per_step=8, updates_per_step=1, learning_rate=1e-5)
        learner = PolicyLearner([*held.values()], training, micro_batch=8)
        learner.optimizer.register_step_post_hook(lambda *_: fill({"weight": weight}, held))
        average, before = held["weight"].detach().clone(), held["weight"].detach().clone()
        for number in range(200):
            generator = torch.Generator().manual_seed(number)
            learner.learn(lambda images, _: (weight.sum() + images.to(dtype), None), 8, torch.arange(1), generator)
            average.lerp_(held["weight"].detach(), 1e-3)
        assert torch.equal(weight, held["weight"].to(dtype))
        return float((held["weight"].detach() - before).mean()), float((average - before).mean())

    found = moved(torch.bfloat16)
    assert found == pytest.approx(moved(torch.float32), rel=1e-2)
    assert found[0] == pytest.approx(-2e-3, rel=1e-2)


def test_a_network_in_half_precision_learns_in_float32(tiny_v_pipeline: Path) -> None:
    """Its ratio is 1, its state and averages are float32, and what goes on from its state goes on bit for bit."""
    model = ModelSettings(path=str(tiny_v_pipeline), dtype="bfloat16")
    sampler = DiffusionPolicy(model, SAMPLING)
    keys = {"ema_decay": 0.999, "learning_rate": 1e-5, "kl_weight": 0.1}
    learner, resumed = averaging(model, **keys), averaging(model, **keys)
    begun = {name: value.clone() for name, value in learner.average.items()}
    for version in range(2):
        statistics, changed = learner.learn(draw(sampler, version), ADVANTAGE, seed=version)
        assert changed == len(learner.masters)
        assert max(statistics.first_update_error.values()) == 0
        sampler.load(learner.weights())
        assert checksum(learner.weights()) == checksum(
            {name: to_numpy(value) for name, value in sampler.network.named_parameters()}
        )
    state = learner.state()
    assert {array.dtype for array in state.tensors.values()} == {np.dtype(np.float32)}
    sent = learner.weights()
    assert {array.dtype for array in sent.values()} == {np.dtype(np.uint16)}  # bfloat16's bits: half of float32's bytes
    assert draw(sampler, 2).latents.dtype == np.uint16
    moved = sum(bool((mean != begun[name]).any()) for name, mean in learner.average.items())
    assert moved > len(begun) / 2  # the others are 1 everywhere, where float32 has no neighbour as near
    assert {parameter.dtype for parameter in learner.policy.network.parameters()} == {torch.bfloat16}
    resumed.restore(state)
    trajectory = draw(sampler, 2)
    for each in (learner, resumed):
        each.learn(trajectory, ADVANTAGE, seed=2)
    assert checksum(resumed.state().tensors) == checksum(learner.state().tensors)


def test_gradients_too_small_or_too_large_for_float16_arrive() -> None:
    def gradient(size: float) -> float:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
        training = TrainingSettings(images_per_step=8, updates_per_step=1, max_gradient_norm=1e9)
        learner = PolicyLearner([*masters({"weight": weight}).values()], training, 8, loss_scale=2.0**16)
        arange, generator = torch.arange(1), torch.Generator().manual_seed(0)
        return learner.learn(
            lambda images, _: (weight.float() * size + 0 * images, None), 8, arange, generator
        ).gradient_norm

    for size in (1e-9, 1e-3, 1.0, 1e3):
        assert gradient(size) == pytest.approx(size, rel=1e-2)


def test_the_optimisers_state_is_where_its_parameters_are() -> None:
    """Seen on tensors that only pretend to be on a GPU: a fused AdamW wants its count of steps there, too."""
    steps = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = torch.nn.Parameter(torch.zeros(2, device="cuda"))
        learner = PolicyLearner([parameter], TRAINING, micro_batch=1)
        learner.restore_moments([steps])
        assert {value.device.type for value in learner.optimizer.state[parameter].values()} == {"cuda"}
        parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()


@pytest.mark.parametrize("objective", ["reward_weighted", "negative_aware"])
def test_objectives_on_the_forward_process(model: ModelSettings, sampler: DiffusionPolicy, objective: str) -> None:
    """They learn, have no ratio, and where DiffusionNFT keeps an average, it is the average that draws."""
    learner = averaging(model, objective=objective)
    statistics, changed = learner.learn(draw(sampler), ADVANTAGE, seed=0)
    assert changed > 0
    assert statistics.loss > 0
    assert (statistics.ratio_mean, statistics.approximate_kl, statistics.first_update_error) == (None, None, {})
    draws_average = checksum(learner.weights()) == checksum(learner.weights("averaged"))
    assert draws_average == (objective == "negative_aware")


def test_the_reference_is_the_first_network(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    learner = DiffusionLearner(model, SAMPLING, TRAINING.model_copy(update={"kl_weight": 1.0}), seed=0)
    trajectory = draw(sampler)
    first = {name: value.detach().clone() for name, value in learner.parameters.items()}
    learner.learn(trajectory, ADVANTAGE, seed=0)
    rollouts = learner._rollouts(learner.policy, [replace(trajectory, weights_version=1)], ADVANTAGE, first, seed=0)
    images, steps = torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    latents = rollouts.latents[images, steps]
    with torch.no_grad():
        now = rollouts.network(latents, steps, images)
        base = sampler.predict(latents, sampler.schedule.timesteps[steps], sampler.embed(BATCH))
    for frozen in (rollouts.reference, rollouts.behaviour):
        torch.testing.assert_close(frozen(latents, steps, images), base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(now, base, rtol=1e-4, atol=1e-4)
    assert not rollouts.reference(latents, steps, images).requires_grad


def gradients(learner: DiffusionLearner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.parameters.values() if p.grad is not None])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@WHOLE
def test_folded_and_unfolded_gradients_agree(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    """All transitions of an update in one call, or one call for each: 1e-5 of the whole gradient."""
    trajectory, found = draw(sampler), []
    for micro_batch in (1, 64):
        training = TRAINING.model_copy(update={"micro_batch": micro_batch, "updates_per_step": 1})
        learner = DiffusionLearner(model, SAMPLING, training, 0)
        statistics, _ = learner.learn(trajectory, ADVANTAGE, seed=3)
        assert max(statistics.first_update_error.values()) < 1e-5
        found.append(gradients(learner))
    assert found[0].norm() > 0
    assert distance(*found) < 1e-5


@WHOLE
def test_images_without_an_advantage_are_not_computed(model: ModelSettings, sampler: DiffusionPolicy) -> None:
    """Half of the images teach nothing: half of the calls, and the gradient of all calls."""
    trajectory, found, calls = draw(sampler), [], []
    advantage = np.array([1.0, -1.0, 0.0, 0.0, 0.0, 2.0])
    for kl_weight in (0.0, 1e-12):  # with a KL every image counts
        training = TRAINING.model_copy(update={"micro_batch": 3, "updates_per_step": 1, "kl_weight": kl_weight})
        learner = DiffusionLearner(model, SAMPLING, training, 0)
        predict, sizes = learner.policy.predict, []

        def counted(latents: torch.Tensor, *rest: object, predict=predict, sizes=sizes) -> torch.Tensor:  # type: ignore[no-untyped-def]
            if torch.is_grad_enabled():
                sizes.append(len(latents))
            return predict(latents, *rest)

        learner.policy.predict = counted  # type: ignore[method-assign]
        learner.learn(trajectory, advantage, seed=3)
        found.append(gradients(learner))
        calls.append(sum(sizes))
    assert calls[0] * 2 == calls[1]
    assert found[0].norm() > 0
    assert distance(*found) < 1e-5


def test_an_update_in_which_nothing_teaches_is_one_of_no_gradient(
    model: ModelSettings, sampler: DiffusionPolicy
) -> None:
    learner = make_learner(model)
    advantage = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # one of the two updates has none
    learner.learn(draw(sampler), advantage, seed=0)
    counts = {int(state["step"]) for state in learner.learner.optimizer.state.values()}
    assert counts == {2}


def test_dropout_is_no_rounding(tiny_v_pipeline: Path) -> None:
    training = TRAINING.model_copy(update={"micro_batch": 3})
    learner = DiffusionLearner(ModelSettings(path=str(tiny_v_pipeline)), SAMPLING, training, seed=0)
    assert learner.ratio_bound == RatioBound(LEAST, recomputes=False)  # until something was measured
    found = learner.find_ratio_bound(BATCH)
    assert found.noise is not None
    assert found.noise < 1e-5
    assert learner.ratio_bound == found
    assert learner.learner.tolerance == found.tolerance == LEAST
    dropout = torch.nn.functional.dropout
    learner.policy.network.conv_out.register_forward_hook(lambda _, __, output: dropout(output, 0.1))
    with pytest.raises(RatioError, match=r"differ by 0\.\d+ nats .* Look for dropout"):
        learner.find_ratio_bound(BATCH)


@pytest.mark.parametrize("asked", ["auto", "recompute"])
def test_what_rounding_did_to_stored_log_probabilities_is_nothing_to_a_learner_that_recomputes(
    tiny_v_pipeline: Path, asked: str
) -> None:
    """Rounding is played: a part of the clip range is added to what a sampler stored."""
    model = ModelSettings(path=str(tiny_v_pipeline))
    training = TRAINING.model_copy(update={"ratio_tolerance": asked, "clip_range": 2e-5, "inner_epochs": 2})
    exact = draw(DiffusionPolicy(model, SAMPLING))
    noise = np.random.default_rng(0).normal(scale=1e-5, size=exact.log_probs.shape)
    ended = []
    for trajectory in (exact, replace(exact, log_probs=exact.log_probs + noise)):
        learner = DiffusionLearner(model, SAMPLING, training, seed=0)
        statistics, _ = learner.learn(trajectory, ADVANTAGE, seed=1)
        assert 0 < max(statistics.first_update_error.values()) < LEAST or trajectory is exact
        ended.append(checksum(learner.weights()))
    assert (ended[0] == ended[1]) == (asked == "recompute")
    far = replace(exact, log_probs=exact.log_probs + 1e-3)  # of another version, say
    with pytest.raises(RatioError, match="check weights version"):
        DiffusionLearner(model, SAMPLING, training, seed=0).learn(far, ADVANTAGE, seed=1)


def test_rounding_beyond_the_clip_range_is_computed_anew() -> None:
    bound = functools.partial(RatioBound.of, TRAINING.model_copy(update={"clip_range": 1e-4}), 48)
    assert bound(noise=1e-6) == RatioBound(LEAST, False, 1e-6)
    assert bound(noise=4e-4, coarse=True) == RatioBound(4e-3, True, 4e-4)
    with pytest.raises(RatioError, match=r"rounding does 0\.001 at most"):
        bound(noise=2e-3)  # in float32
    with pytest.raises(RatioError):
        bound(noise=float("nan"), coarse=True)
    by_sum = TRAINING.model_copy(update={"log_density": "sum", "clip_range": 0.1})
    assert RatioBound.of(by_sum, 48, 1e-4) == RatioBound(48 * LEAST, False, 1e-4)
    given = TRAINING.model_copy(update={"ratio_tolerance": 0.5})
    assert RatioBound.of(given, 48, 0.4) == RatioBound(0.5, False, 0.4)
    on_policy = TRAINING.model_copy(update={"objective": "score_function", "ratio_tolerance": "recompute"})
    assert not RatioBound.of(on_policy, 48).recomputes  # it has one update, and no old log-probabilities


def test_rounding_is_found_on_half_of_a_call_where_memory_is_short(
    tiny_v_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, asked = make_learner(ModelSettings(path=str(tiny_v_pipeline))), list[int]()
    denoise = learner.policy.denoise

    def short(prompts: list[str], *more: Any) -> Any:
        asked.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return denoise(prompts, *more)

    monkeypatch.setattr(learner.policy, "denoise", short)
    assert learner.find_ratio_bound(BATCH).noise is not None
    assert asked == [6, 3, 2]
