"""What a run is said to hold in memory before it starts, against what is counted, found and measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.memory_plan import foreseen_activations, memory_lines, memory_of
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import load_config
from pipelines.denoisers import load_family
from pipelines.rl.activations import _kept, foreseen, kept_bytes, most_alive, taught
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import checksum, prepare
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import build_tiny_pipeline, build_tiny_pixels, build_tiny_sd3, build_tiny_xl

DEMONSTRATION = Path("configs/ddpo/digits.yaml")


@pytest.mark.parametrize("rank", [0, 3])
def test_memory_is_what_the_parts_count(rank: int, tiny_pipeline: Path) -> None:
    config = load_config(
        DdpoConfig, DEMONSTRATION, [f"model.path={tiny_pipeline}", f"model.lora_rank={rank}", "model.dtype=bfloat16"]
    )
    family = load_family(str(tiny_pipeline), torch.bfloat16)
    parts = [part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(each.numel() * each.element_size() for part in parts for each in part.parameters())
    trained = sum(4 * each.numel() for each in prepare(family.network, config.model).values())
    latents = 256 * 11 * 4 * 8 * 8 * 2  # images, latents of a path, channels, height, width, bytes
    roles = preflight_ddpo(config, Machine(8, 0)).roles
    rows = {row["role"]: row for row in memory_of(config, roles, [])["roles"]}
    assert rows["sampler"]["bytes"] == pytest.approx(weights, rel=0.01)
    assert rows["learner"]["bytes"] == pytest.approx(weights + 5 * trained, rel=0.01)
    assert rows["learner"]["host"]["trajectories"] == latents
    activations = foreseen_activations(config, roles)
    assert activations is not None
    more = {row["role"]: row for row in memory_of(config, roles, [], activations)["roles"]}
    assert more["learner"]["bytes"] - rows["learner"]["bytes"] == activations.learner
    assert more["sampler"]["process"] - rows["sampler"]["process"] == activations.sampler
    assert "activations apart" in memory_lines(memory_of(config, roles, []))[-1]


def test_what_is_alive_is_counted_at_its_most() -> None:
    begun = torch.zeros(1000)

    def call() -> None:
        twice = begun * 2  # 4,000 bytes
        more = torch.cat([twice, begun])  # and 8,000
        del twice
        more.view(2, -1).add_(1)  # nothing new
        assert float((more + 1).sum()) == 4000  # and 8,000, when 4,000 are gone, and their sum

    assert most_alive(call) == 16_004
    assert most_alive(lambda: begun.view(10, -1)) == 0


def test_memory_that_is_kept_is_that_of_the_whole_of_which_parts_are_kept() -> None:
    """As of a layer whose two halves are multiplied: each half keeps both."""
    weight = torch.nn.Parameter(torch.ones(1000))

    def predicted(count: int) -> torch.Tensor:
        value, gate = (torch.ones(count, 1000) * weight).chunk(2, dim=1)
        return value * gate.exp().detach()  # keeps one half, ones, and what follows from the other

    # The ones: 4,000 bytes more; the half: 0 of the value, and 2,000 of what it is multiplied with.
    assert _kept(predicted, [weight], torch.device("cpu")) == 4000 + 2000

    def halves(count: int) -> torch.Tensor:
        value, gate = (torch.ones(count, 1000) * weight).chunk(2, dim=1)
        return value * gate

    assert _kept(halves, [weight], torch.device("cpu")) == 4000 + 4000


@pytest.mark.parametrize("build", [build_tiny_xl, build_tiny_sd3, build_tiny_pixels])
def test_activations_of_every_family_are_foreseen(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    """A prompt's own conditions, transformers, and models of pixels, that have neither autoencoder nor prompts."""
    model = ModelSettings(path=str(build(tmp_path / "pipeline")))
    sampling = SamplingSettings(steps=4, guidance_scale=1.0 if build is build_tiny_pixels else 2.0)
    training = TrainingSettings(images_per_step=16, images_per_prompt=4)
    planned = foreseen(model, sampling, training, images=3, learners=1)
    learner = DiffusionLearner(model, sampling, training, seed=0)
    assert planned.micro_batch == learner.micro_batch
    policy = DiffusionPolicy(model, sampling)
    real = most_alive(lambda: policy.decode(policy.denoise(["a red seven"] * 3, range(3))[0]))
    assert planned.sampler == pytest.approx(real, rel=0.3)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("image_size", [16, 64])
def test_a_plan_knows_the_micro_batch_that_a_learner_will_find(
    tmp_path: Path, rank: int, image_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a number of the model, on the meta device; and what a call of the real one holds."""
    model = ModelSettings(path=str(build_tiny_pipeline(tmp_path, image_size=image_size)), lora_rank=rank)
    sampling = SamplingSettings(steps=6, guidance_scale=3.0)
    training = TrainingSettings(images_per_step=96, images_per_prompt=4, updates_per_step=2, timestep_fraction=0.5)
    planned = foreseen(model, sampling, training, images=5, learners=1)
    learner = DiffusionLearner(model, sampling, training, seed=0)
    assert planned.micro_batch == learner.micro_batch
    real_calls = kept_bytes(learner.policy)
    monkeypatch.setattr("pipelines.rl.activations._LARGE", 0)
    assert kept_bytes(learner.policy) == real_calls  # as of a large network, in calls without numbers
    other = DiffusionLearner(model, sampling, training, seed=0)
    drawn = DiffusionPolicy(model, sampling).rollout(["a red seven"] * 4, range(4))[1]
    for each in (learner, other):  # which leave nothing behind
        each.learn(drawn, np.array([1.0, -1.0, 0.5, -0.5]), seed=1)
    assert checksum(other.weights()) == checksum(learner.weights())
    few = foreseen(model, sampling, training.model_copy(update={"micro_batch": 5}), images=5, learners=1)
    for parameter in learner.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    real = most_alive(lambda: taught(learner.policy, 5))
    assert few.learner == pytest.approx(real, rel=0.05)
    policy = DiffusionPolicy(model, sampling)
    real = most_alive(lambda: policy.decode(policy.denoise(["a red seven"] * 5, range(5))[0]))
    assert planned.sampler == pytest.approx(real, rel=0.25)
