"""Processes that make each update together: the numbers of one, whether weights are whole in each or sharded."""

import contextlib
import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.numpy import load_file

from actors.failures import MARKS_OF_A_PEER
from pipelines.default_models import pretrain
from pipelines.generators.text_to_image import TextToImageGenerator, TextToImageSettings
from pipelines.rl.learning import DiffusionLearner, LearnerState
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.trajectory import Trajectory
from pipelines.rl.weights import checksum
from pipelines.settings import ModelSettings
from pipelines.sharing import Sharing, shared
from pipelines.studies.distil import Distiller
from pipelines.studies.erase import Eraser, Prompts
from pipelines.training import train
from policies.consistency import ConsistencySettings
from policies.erasing import ErasingSettings
from policies.loops.samples import Samples
from policies.rl.group import DivergedError, Group, gathered, meeting_place
from policies.rl.health import DegenerateBatch, ShortOfMemoryError
from policies.rl.ratio import RatioError
from policies.rl.settings import SamplingSettings, TrainingSettings
from policies.rl.update import PolicyLearner
from tests.models import PROMPTS, build_tiny_sd3
from tests.test_pretrain import make_hasty

SAMPLING = SamplingSettings(steps=4, guidance_scale=2.0)
BATCH = [prompt for prompt in PROMPTS for _ in range(2)]
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
# 6 images × 2 steps in one update: 12 transitions, 6 or 4 for each learner, in calls of 5.
ONE_UPDATE = TrainingSettings(
    micro_batch=5,
    images_per_step=6,
    images_per_prompt=2,
    updates_per_step=1,
    timestep_fraction=0.5,
    max_gradient_norm=1e9,
    clip_range=0.1,
)
SIX_UPDATES = ONE_UPDATE.model_copy(
    update={
        "updates_per_step": 6,
        "max_gradient_norm": 1.0,
        "clip_range": 1e-6,
        "kl_weight": 0.1,  # for which other weights are put in and out of the network
        "ema_decay": 0.5,
    }
)
AT_ANY_RATIO = {"ratio_tolerance": float("inf")}


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Pool]]:
    """A process for each rank, as torch remembers which it was, that has imported what learners need and no more."""
    context = multiprocessing.get_context("forkserver")
    models = ("unets.unet_2d_condition", "transformers.transformer_sd3", "autoencoders.autoencoder_kl")
    parts = ["peft", "torch.distributed.fsdp", "torch._dynamo", *(f"diffusers.models.{each}" for each in models)]
    context.set_forkserver_preload([__name__, *parts])
    with context.Pool(1) as first, context.Pool(1) as second, context.Pool(1) as third:
        yield [first, second, third]


def together(pool: list[Pool], size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(group, *arguments)`` returns in each of ``size`` learners."""
    outcomes = what_comes_of(pool, size, work, *arguments)
    for error in outcomes:
        if isinstance(error, Exception):
            raise error
    return outcomes


def what_comes_of(pool: list[Pool], size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same, with the errors that are raised there."""
    store = meeting_place("127.0.0.1")
    calls = [pool[rank].apply_async(_member, (store.port, rank, size, work, arguments)) for rank in range(size)]
    return [call.get(timeout=300) for call in calls]


def _member(port: int, rank: int, size: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    group = Group.join("127.0.0.1", port, rank, size, "cpu", timeout=200.0) if size > 1 else Group()
    try:
        return work(group, *arguments)
    except (RuntimeError, ValueError) as error:
        return error
    finally:
        if size > 1:
            torch.distributed.destroy_process_group()


@dataclasses.dataclass
class Outcome:
    statistics: dict[str, Any]
    changed: int
    gradients: dict[str, np.ndarray]
    held: int
    weights: str
    state: LearnerState


def learn(
    group: Group,
    model: ModelSettings,
    training: TrainingSettings,
    trajectory: Trajectory,
    sharding: bool = False,
    state: LearnerState | None = None,
) -> Outcome:
    """In a learner: one step, from the beginning or from ``state``."""
    learner = DiffusionLearner(model, SAMPLING, training, seed=0, group=group, sharding=sharding)
    assert group.sharded == (sharding and group.size > 1)
    if state is not None:
        learner.restore(state)
    statistics, changed = learner.learn(trajectory, ADVANTAGE, seed=1)
    parameters = learner.masters
    held = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in learner.policy.network.parameters())
    gradients = {name: gathered(p.grad).numpy() for name, p in parameters.items() if p.grad is not None}
    return Outcome(
        dataclasses.asdict(statistics), changed, gradients, held, checksum(learner.weights()), learner.state()
    )


@pytest.fixture(scope="module")
def models(tiny_v_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSettings]:
    unet, transformer = str(tiny_v_pipeline), str(build_tiny_sd3(tmp_path_factory.mktemp("sd3")))
    return {
        "unet": ModelSettings(path=unet),
        "unet, lora": ModelSettings(path=unet, lora_rank=4, lora_targets=("to_q", "to_out.0", "conv1")),
        "transformer": ModelSettings(path=transformer),
        "transformer, lora": ModelSettings(path=transformer, lora_rank=4, lora_targets=("to_q", "to_k", "proj_out")),
    }


def draw(model: ModelSettings) -> Trajectory:
    return DiffusionPolicy(model, SAMPLING).rollout(BATCH, list(range(len(BATCH))))[1]


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """‖one − other‖ / ‖other‖ over all tensors."""
    assert one.keys() == other.keys()
    vectors = [np.concatenate([each[name].ravel().astype(float) for name in sorted(each)]) for each in (one, other)]
    return float(np.linalg.norm(vectors[0] - vectors[1]) / np.linalg.norm(vectors[1]))


def numbers(outcome: Outcome) -> dict[str, float]:
    """The statistics that all numbers of learners have in common."""
    apart = ("learners", "first_update_error", "behaviour_kl")
    return {name: each for name, each in outcome.statistics.items() if name not in apart}


@pytest.mark.parametrize("kind", ["unet", "unet, lora", "transformer", "transformer, lora"])
def test_two_and_three_learners_have_the_gradient_of_one(kind: str, models: Any, pool: list[Pool]) -> None:
    model, trajectory = models[kind], draw(models[kind])
    alone = learn(Group(), model, ONE_UPDATE, trajectory)
    assert np.linalg.norm(np.concatenate([gradient.ravel() for gradient in alone.gradients.values()])) > 1e-4
    for size, sharding in ((2, False), (3, False), (3, True)):
        outcomes = together(pool, size, learn, model, ONE_UPDATE, trajectory, sharding)
        first = outcomes[0]
        assert numbers(first) == pytest.approx(numbers(alone), rel=1e-5, abs=1e-7)
        assert first.statistics["first_update_error"].keys() == alone.statistics["first_update_error"].keys()
        assert first.statistics["learners"] == size
        for outcome in outcomes:
            assert distance(outcome.gradients, alone.gradients) < 1e-5, (size, sharding)
            assert outcome.statistics == first.statistics
            assert outcome.weights == first.weights
            assert outcome.changed == alone.changed
        if sharding:  # each holds its part, some of which is filled up to equal sizes
            assert first.held < 1.3 * alone.held / size


@pytest.mark.parametrize("kind", ["unet", "unet, lora"])
def test_after_six_updates_all_learners_are_equal_and_others_go_on(kind: str, models: Any, pool: list[Pool]) -> None:
    """From the state of three to two who share weights out, and from theirs to two who do not."""
    model, trajectory = models[kind], draw(models[kind])
    later, training = dataclasses.replace(trajectory, weights_version=1), ONE_UPDATE.model_copy(update=AT_ANY_RATIO)
    alone = learn(Group(), model, SIX_UPDATES, trajectory)
    assert alone.statistics["clip_fraction"] > 0
    for size, sharding in ((3, False), (2, True)):
        outcomes = together(pool, size, learn, model, SIX_UPDATES, trajectory, sharding)
        assert len({outcome.weights for outcome in outcomes}) == 1
        assert [len(outcome.state.tensors) > 0 for outcome in outcomes] == [True, False, False][:size]
        state = outcomes[0].state
        assert distance(state.tensors, alone.state.tensors) < 1e-3
        assert numbers(outcomes[0]) == pytest.approx(numbers(alone), rel=1e-2)
        here = learn(Group(), model, training, later, state=state)
        there = together(pool, 2, learn, model, training, later, not sharding, state)[0]
        assert distance(there.gradients, here.gradients) < 1e-5
        assert distance(there.state.tensors, here.state.tensors) < 1e-5


def test_learners_in_half_precision_share_out_float32_weights(models: Any, pool: list[Pool]) -> None:
    model = models["unet"].model_copy(update={"dtype": "bfloat16"})
    training = ONE_UPDATE.model_copy(update={"learning_rate": 1e-5})
    trajectory = draw(model)
    alone = learn(Group(), model, training, trajectory)
    for sharding in (False, True):
        first, second = together(pool, 2, learn, model, training, trajectory, sharding)
        assert first.weights == second.weights
        assert first.changed == alone.changed
        assert distance(first.gradients, alone.gradients) < 1e-2
        assert distance(first.state.tensors, alone.state.tensors) < 1e-3
        assert {array.dtype for array in first.state.tensors.values()} == {np.dtype(np.float32)}
        later, anyhow = dataclasses.replace(trajectory, weights_version=1), training.model_copy(update=AT_ANY_RATIO)
        here = learn(Group(), model, anyhow, later, state=first.state)
        there = together(pool, 2, learn, model, anyhow, later, not sharding, first.state)[0]
        assert distance(there.gradients, here.gradients) < 1e-2


def test_what_one_learner_finds_all_raise(models: Any, pool: list[Pool]) -> None:
    trajectory = draw(models["unet"])
    trajectory.log_probs[5] += 1e-3  # the last learner's
    for outcome in what_comes_of(pool, 3, learn, models["unet"], ONE_UPDATE, trajectory):
        assert isinstance(outcome, RatioError)
        assert "differs by 0.001 nats" in str(outcome)
    trajectory.log_probs[5] -= 1e-3
    trajectory.latents[5] = np.nan
    with_any_ratio = ONE_UPDATE.model_copy(update=AT_ANY_RATIO)
    for outcome in what_comes_of(pool, 3, learn, models["unet"], with_any_ratio, trajectory):
        assert isinstance(outcome, DegenerateBatch)
        assert "gradient's norm is nan" in str(outcome)


def shrink(group: Group, sharded: bool) -> Any:
    """In a learner: an update of 16 transitions, of which the second learner's memory takes two at a time."""
    group.sharded = sharded
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def objective(images: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, None]:
        if group.rank == 1 and len(images) > 2:
            raise torch.OutOfMemoryError
        return weight * images.double(), None

    settings = TrainingSettings(images_per_step=16, updates_per_step=1)
    learner = PolicyLearner([weight], settings, micro_batch=8, group=group)
    statistics = learner.learn(objective, 16, torch.arange(1), torch.Generator().manual_seed(0))
    return statistics.micro_batch, statistics.gradient_norm, statistics.loss


def test_all_learners_make_smaller_calls_if_one_has_to(pool: list[Pool]) -> None:
    assert together(pool, 2, shrink, False) == [(2, 7.5, 7.5)] * 2
    error = next(each for each in what_comes_of(pool, 2, shrink, True) if isinstance(each, ShortOfMemoryError))
    assert "micro-batches of 8" in str(error)


def disagree(group: Group) -> None:
    group.check_same(f"{int(group.rank == 1):02x}" * 32)


def leave_alone(group: Group) -> Any:
    if group.rank == 0:
        return group.any(True)


def test_learners_that_differ_or_do_not_come_are_named(pool: list[Pool]) -> None:
    for outcome in what_comes_of(pool, 3, disagree):
        assert isinstance(outcome, DivergedError)
        assert "learners [1] hold other weights than learner 0" in str(outcome)
    lost = what_comes_of(pool, 2, leave_alone)[0]
    assert isinstance(lost, RuntimeError)
    assert any(mark in str(lost) for mark in MARKS_OF_A_PEER)


def train_together(
    group: Group, directory: str, batch: int = 10, steps: int = 12, stop: int = 0, spread: bool | None = None
) -> tuple[dict[str, np.ndarray], list[str], int]:
    """In a process: a small diffusion model's training, shared; what was trained, what was told, and the commits. It is
    given up after ``stop`` of them, and begins at the last one that is there."""
    torch.manual_seed(0)
    network: Any = UNet2DModel(
        8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    frozen = network.conv_in.bias.requires_grad_(False).clone()
    random, told, commits = torch.Generator().manual_seed(1), list[str](), list[str]()
    kept = Path(directory) / "kept"

    def keep(place: Path | None) -> None:
        commits.append("")
        if place:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept)
        if len(commits) == stop:
            raise ValueError("given up")

    def draw() -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, 1, 8, 8, generator=random), torch.randint(50, (batch,), generator=random)

    def loss(network: Any, images: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return (network(images, times).sample - 2 * images).square().mean()

    own = Sharing(group, keep, kept if kept.exists() else None, 0.0, spread)
    with shared(own), contextlib.suppress(ValueError):
        train(network, draw, loss, steps, 1e-3, told.append, clip=1.0, fused=True)
    assert torch.equal(network.conv_in.bias, frozen)
    assert all(type(each) is torch.nn.Parameter for each in network.parameters())
    return {name: each.detach().numpy() for name, each in network.named_parameters()}, told, len(commits)


@pytest.mark.parametrize(("size", "spread"), [(2, False), (3, False), (2, True), (3, True)])
@pytest.mark.parametrize("batch", [10, 2])
def test_a_training_that_is_shared_gives_the_numbers_of_one(
    size: int, spread: bool, batch: int, pool: list[Pool], tmp_path: Path
) -> None:
    directory = str(tmp_path)
    ((alone, *_),) = together(pool, 1, train_together, directory, batch)
    for each, _, commits in together(pool, size, train_together, directory, batch, 12, 0, spread):
        assert commits == 12
        assert all(np.abs(each[name] - alone[name]).max() < 1e-5 for name in alone)


@pytest.mark.parametrize("spread", [False, True])
def test_a_shared_training_goes_on_where_it_was_committed(spread: bool, pool: list[Pool], tmp_path: Path) -> None:
    whole, _ = together(pool, 2, train_together, str(tmp_path / "whole"), 10, 12, 0, spread)
    interrupted, _ = together(pool, 2, train_together, str(tmp_path / "cut"), 10, 12, 7, spread)
    assert distance(interrupted[0], whole[0]) > 1e-3
    goes_on, _ = together(pool, 2, train_together, str(tmp_path / "cut"), 10, 12, 0, spread)
    assert goes_on[2] == 5
    assert all(np.array_equal(goes_on[0][name], whole[0][name]) for name in whole[0])


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_what_is_no_mean_over_rows_is_not_divided(spread: bool, normed: bool, pool: list[Pool]) -> None:
    (alone,) = together(pool, 1, train_undivided, spread, normed)
    found = together(pool, 2, train_undivided, spread, normed)
    assert max(distance(each, alone) for each in found) < 1e-6


def train_undivided(group: Group, spread: bool, normed: bool) -> dict[str, np.ndarray]:
    network, random = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), torch.Generator().manual_seed(0)
    if normed:
        network.append(torch.nn.BatchNorm1d(3))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3))

    def loss(network: Any, rows: torch.Tensor) -> torch.Tensor:
        return (network(rows) + rows).square().mean() if normed else network(rows).std(dim=0).sum()

    with shared(Sharing(group, spread=spread)):
        train(network, lambda: (torch.randn(5, 3, generator=random),), loss, 5, 1e-2, divisible=normed)
    return {name: each.numpy() for name, each in network.state_dict().items()}


def fit_together(group: Group, path: str, lora_rank: int, spread: bool) -> dict[str, np.ndarray]:
    """In a process: a text-to-image model, fitted by all."""
    about: dict[str, Any] = {"path": path, "captioner": None, "evaluator": None, "lora_rank": lora_rank}
    settings = TextToImageSettings(**about, from_scratch=not lora_rank, training_steps=4, batch_size=6)
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 16, 16, 3), dtype=np.uint8)
    with shared(Sharing(group, spread=spread)):
        fitted = TextToImageGenerator.fit(settings, Samples(images, captions=np.array([[*PROMPTS] * 2])), [0])
    return {name: each.numpy() for name, each in fitted.fitted().items()}


def erase_together(group: Group, path: str) -> dict[str, np.ndarray]:
    """In a process: a concept is erased by all."""
    eraser, settings = Eraser(path), ErasingSettings(images=4, rounds=2, updates=3, batch=5, steps=3)
    with shared(Sharing(group)):
        losses = eraser.erase(Prompts.of("red", PROMPTS), "esd-x", settings, 0)
    held = {name: each.numpy() for name, each in eraser.network.named_parameters()}
    return held | {"losses": np.array(losses)}


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("spread", [False, True])
def test_workers_fit_a_model_as_one_does(lora_rank: int, spread: bool, tiny_pipeline: Path, pool: list[Pool]) -> None:
    how = str(tiny_pipeline), lora_rank, spread
    (alone,) = together(pool, 1, fit_together, *how)
    for each in together(pool, 2, fit_together, *how):
        assert each.keys() == alone.keys()
        assert max(np.abs(each[name] - alone[name]).max() for name in alone) < 1e-5


def test_workers_erase_a_concept_as_one_does(tiny_pipeline: Path, pool: list[Pool]) -> None:
    (alone,) = together(pool, 1, erase_together, str(tiny_pipeline))
    for each in together(pool, 2, erase_together, str(tiny_pipeline)):
        assert len(each["losses"]) == 6
        assert max(np.abs(each[name] - alone[name]).max() for name in alone) < 1e-5


def distil_together(group: Group, path: str, spread: bool) -> dict[str, np.ndarray]:
    """In a process: a pipeline is distilled by all."""
    distiller, settings = Distiller(path), ConsistencySettings(updates=3, batch=5, skip=10)
    clean = torch.randn((4, *distiller.family.latent_shape), generator=torch.Generator().manual_seed(0))
    with shared(Sharing(group, spread=spread)):
        losses = distiller.distil(clean, [PROMPTS[0]] * 4, settings, 0, 2.0)
    held = {name: each.numpy() for name, each in distiller.network.named_parameters()}
    return held | {"losses": np.array(losses)}


@pytest.mark.parametrize("spread", [False, True])
def test_workers_distil_as_one_does(spread: bool, tiny_v_pipeline: Path, pool: list[Pool]) -> None:
    (alone,) = together(pool, 1, distil_together, str(tiny_v_pipeline), spread)
    for each in together(pool, 2, distil_together, str(tiny_v_pipeline), spread):
        assert max(np.abs(each[name] - alone[name]).max() for name in alone) < 1e-4


def build_together(group: Group, directory: str) -> None:
    """In a process: the default models, hastily, by all."""
    output = Path(directory, str(group.size))
    output.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, shared(Sharing(group)):
        make_hasty(patch)
        pretrain.build({"output": str(output), "seed": 3, "recipe": "digits"}, [], "cpu")


def test_workers_build_the_default_models_as_one_does(pool: list[Pool], tmp_path: Path) -> None:
    for size in (1, 2):
        together(pool, size, build_together, str(tmp_path))
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        one, two = (load_file(tmp_path / each / file) for each in ("1", "2"))
        assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-4, file
