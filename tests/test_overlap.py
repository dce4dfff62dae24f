"""Depth 1: the next step is drawn while this one is learned from, by exactly the weights before."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.timeline import (
    append_spans,
    middle_of,
    nested,
    read_spans,
    render_profile,
    steps_of,
    write_trace,
)
from pipelines.rl.learning import DiffusionLearner, LearnerState
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.trajectory import Trajectory
from pipelines.rl.weights import checksum
from pipelines.settings import ModelSettings
from policies.rl.objectives.ddpo import decoupled_loss, importance_sampling_loss
from policies.rl.ratio import RatioError
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS

STEPS = 4
SAMPLING = SamplingSettings(steps=4)
TRAINING = TrainingSettings(
    depth=1, micro_batch=8, images_per_step=6, images_per_prompt=2, updates_per_step=2, learning_rate=1e-3
)
BATCH, SEEDS = [prompt for prompt in PROMPTS for _ in range(2)], list(range(6))
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient"),
    [
        (2.0, 1.3, 0.0),  # good and likelier than where the step began by more than the clip
        (2.0, 0.7, -2.0 * 0.7),
        (-2.0, 0.7, 0.0),
        (-2.0, 1.05, 2.0 * 1.05),  # within the clip
    ],
)
def test_the_clip_is_about_where_the_step_began_and_the_weight_about_who_drew(
    advantage: float, ratio: float, gradient: float
) -> None:
    """Closed form: w · max(−A ρ, −A clip(ρ)), whose derivative by log p is w · (−A ρ) or 0."""
    weight, start = 1.7, torch.tensor([-3.0], dtype=torch.float64)
    new = (start + np.log(ratio)).requires_grad_()
    loss = decoupled_loss(new, start, start - np.log(weight), torch.tensor([advantage], dtype=torch.float64), 0.1)
    loss.sum().backward()
    clipped = min(max(ratio, 0.9), 1.1)
    assert loss.item() == pytest.approx(weight * max(-advantage * ratio, -advantage * clipped), abs=1e-12)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(weight * gradient, abs=1e-12)


def test_it_is_the_usual_loss_bit_for_bit_where_the_images_are_one_s_own() -> None:
    new, old, advantage = torch.randn(3, 1000, dtype=torch.float64)
    usual = importance_sampling_loss(new, old, advantage, 0.2)
    assert torch.equal(decoupled_loss(new, old, old, advantage, 0.2), usual)


@pytest.fixture(params=["importance_sampling", "negative_aware", "reward_weighted"])
def pair(request: pytest.FixtureRequest, tiny_v_pipeline: Path) -> tuple[DiffusionLearner, DiffusionPolicy]:
    model = ModelSettings(path=str(tiny_v_pipeline))
    training = TRAINING.model_copy(update={"objective": request.param, "ema_decay": 0.5})
    return DiffusionLearner(model, SAMPLING, training, seed=0), DiffusionPolicy(model, SAMPLING)


def draw(sampler: DiffusionPolicy, version: int) -> Trajectory:
    return sampler.rollout(BATCH, SEEDS, version)[1]


def test_a_learner_takes_images_of_the_version_before_and_no_others(
    pair: tuple[DiffusionLearner, DiffusionPolicy],
) -> None:
    learner, sampler = pair
    first = draw(sampler, 0)
    before = learner.weights()
    assert learner.learn(first, ADVANTAGE, seed=1)[0].staleness == 0
    assert checksum(learner.weights("previous")) == checksum(before)
    statistics, changed = learner.learn(first, ADVANTAGE, seed=2)
    assert (statistics.staleness, learner.weights_version) == (1, 2)
    assert changed > 0
    if learner.training.objective == "importance_sampling":
        assert set(statistics.first_update_error) == {0, 1, 2}
        assert max(statistics.first_update_error.values()) < 1e-5
        assert statistics.behaviour_kl is not None
        assert statistics.behaviour_kl > 1e-9
    for version in (0, 3):
        with pytest.raises(ValueError, match=f"version {version}, the learner holds 2: at depth 1"):
            learner.learn(replace(first, weights_version=version), ADVANTAGE, seed=3)


@pytest.mark.parametrize("pair", ["importance_sampling"], indirect=True)
def test_a_replay_that_gives_something_else_stops(pair: tuple[DiffusionLearner, DiffusionPolicy]) -> None:
    learner, sampler = pair
    first = draw(sampler, 0)
    learner.learn(first, ADVANTAGE, seed=1)
    sampler.load(learner.weights())
    with pytest.raises(RatioError, match="differs by"):  # drawn by the present weights, said to be of those before
        learner.learn(draw(sampler, 0), ADVANTAGE, seed=2)
    assert learner.weights_version == 1


@pytest.mark.parametrize("pair", ["importance_sampling"], indirect=True)
def test_the_first_update_weighs_by_who_drew(pair: tuple[DiffusionLearner, DiffusionPolicy]) -> None:
    """Its gradient is −E[w A ∇ log p], w = p_now / p_drawn: by hand, from the network's own densities."""
    learner, sampler = pair
    settings = {"updates_per_step": 1, "max_gradient_norm": 1e9, "learning_rate": 3e-3}
    learner.training = learner.learner.settings = TRAINING.model_copy(update=settings)
    first = draw(sampler, 0)
    learner.learn(first, ADVANTAGE, seed=1)
    before = {name: value.detach().clone() for name, value in learner.parameters.items()}
    rollouts = learner._rollouts(learner.policy, [first], ADVANTAGE, before, seed=2)
    images, steps = torch.arange(6).repeat_interleave(3), torch.arange(3).repeat(6)
    output = rollouts.network(rollouts.latents[images, steps], steps, images)
    here, there = rollouts.latents[images, steps], rollouts.latents[images, steps + 1]
    new = rollouts.schedule.log_prob(here, there, output, steps)
    weight = (new - rollouts.log_probs[images, steps]).exp().detach()
    assert (weight - 1).abs().max() > 1e-3
    names = list(learner.parameters)
    loss = -(weight * torch.tensor(ADVANTAGE)[images] * new).mean()
    expected = torch.autograd.grad(loss, [learner.parameters[name] for name in names])
    learner.learn(first, ADVANTAGE, seed=2)
    got = torch.cat([learner.parameters[name].grad.flatten() for name in names])  # type: ignore[union-attr]
    wanted = torch.cat([each.flatten() for each in expected])
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_restored_with_the_weights_before_it_goes_on_bit_for_bit(
    pair: tuple[DiffusionLearner, DiffusionPolicy],
) -> None:
    learner, sampler = pair
    first = draw(sampler, 0)
    learner.learn(first, ADVANTAGE, seed=1)
    other = DiffusionLearner(learner.model, SAMPLING, learner.training, seed=9)
    other.restore(LearnerState(learner.state().tensors, 1))
    assert checksum(other.weights("previous")) == checksum(learner.weights("previous")) != checksum(learner.weights())
    ends = [each.learn(first, ADVANTAGE, seed=2) and each.state() for each in (learner, other)]
    assert checksum(ends[0].tensors) == checksum(ends[1].tensors)


def test_what_has_no_meaning_ahead_is_refused() -> None:
    for wrong in (["training.depth=2"], ["training.depth=1", "training.objective=score_function"]):
        with pytest.raises(ConfigError, match=r"less than or equal to 1|on-policy: .* depth to 0"):
            load_config(DdpoConfig, None, ["training.updates_per_step=1", *wrong])


@pytest.fixture(scope="module")
def settings(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of seconds, one step ahead, evaluated every other step with averaged weights."""
    directory = tmp_path_factory.mktemp("overlap")
    (directory / "prompts.txt").write_text("\n".join(["a red seven", "a blue two", "a green one", "a red two"]))
    return [
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={tiny_pipeline}",
        "captioner.path=null",
        "reward.function=tests.rewards:redness",
        "evaluation.evaluator=null",
        "evaluation.images=8",
        "evaluation.interim_images=8",
        "evaluation.every=2",
        "evaluation.patience=0",
        "sampling.steps=3",
        f"training.steps={STEPS}",
        "training.depth=1",
        "training.images_per_step=12",
        "training.images_per_prompt=6",
        "training.updates_per_step=2",
        "training.learning_rate=1e-3",
        "training.ema_decay=0.5",
        "checkpoint.every=1",
        "actors.images_per_call=5",
        "actors.samplers=2",
        "actors.threads.learner=1",
        f"tracking.uri=sqlite:///{directory / 'mlflow.db'}",
        "tracking.system_metrics=false",
    ]


@pytest.fixture(scope="module")
def finished(settings: list[str], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ddpo(load_config(DdpoConfig, None, [*settings, f"output_dir={directory}"]), profile=True)
    return directory


def journal(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def test_step_k_is_drawn_by_version_k_minus_one(finished: Path) -> None:
    lines = journal(finished)
    assert [line["weights/version"] for line in lines] == [1, 2, 3, 4]
    assert [line["policy/staleness"] for line in lines] == [0, 1, 1, 1]
    for line in lines:
        errors = [value for key, value in line.items() if key.startswith("first_update_error/")]
        assert len(errors) == 3
        assert max(errors) < 1e-5
        assert ("policy/behaviour_kl" in line) == (line["step"] > 1)
    assert summary(finished)["discarded_images"] == 0


def test_stopped_and_resumed_it_ends_in_the_same_weights(
    settings: list[str], finished: Path, ray_session: None, tmp_path: Path
) -> None:
    from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo

    directory = tmp_path / "stopped"

    def stop(run: Any) -> None:
        if run.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ddpo(load_config(DdpoConfig, None, [*settings, f"output_dir={directory}", "actors.samplers=1"]), stop)
    resume_ddpo(directory)
    assert summary(directory)["weights_sha256"] == summary(finished)["weights_sha256"]
    assert summary(directory)["discarded_images"] == 12  # of the third step, which was being drawn
    same = ("reward/mean", "weights/checksum", "policy/staleness", "policy/behaviour_kl", "evaluation/reward")
    for here, there in zip(journal(directory), journal(finished), strict=True):
        assert {key: here.get(key) for key in same} == {key: there.get(key) for key in same}
    ends = [np.load(each / "evaluations" / f"step-{STEPS:06d}.npz")["images"] for each in (directory, finished)]
    np.testing.assert_array_equal(*ends)


def test_the_next_step_is_drawn_and_scored_while_this_one_is_learned_from(finished: Path) -> None:
    lanes = read_spans(finished)
    assert list(lanes) == ["driver", "sampler 0", "sampler 1", "reward", "learner"]
    assert [what for what, *_ in lanes["driver"]].count("step") == STEPS

    def overlapping(lane: str, what: str) -> float:
        own = [span[1:] for span in lanes[lane] if span[0] == what]
        learning = [span[1:] for span in lanes["learner"] if span[0] == "learning"]
        return sum(max(0.0, min(b, d) - max(a, c)) for a, b in own for c, d in learning)

    assert overlapping("sampler 0", "drawing") + overlapping("sampler 1", "drawing") > 0
    assert overlapping("reward", "scoring") > 0
    window = middle_of(lanes)
    assert len(steps_of(window)) == 3
    assert {what for what, *_ in window["sampler 0"]} <= {"drawing", "taking weights", "comparing with the base"}
    assert (finished / "figures" / "timeline.png").exists()
    assert "What each actor did" in (finished / "report.html").read_text()


def test_a_profile_accounts_for_every_second_of_every_actor(finished: Path) -> None:
    table = render_profile(finished)
    actors, activities, seconds = ([*column.cells] for column in table.columns[:3])
    assert [name for name in actors if name] == ["driver", "sampler 0", "sampler 1", "reward", "learner"]
    sums = np.add.reduceat([float(str(each)) for each in seconds], [row for row, name in enumerate(actors) if name])
    np.testing.assert_allclose(sums, sums[0], atol=0.005 * len(actors))  # each is rounded to hundredths
    parts = ("network", "noise", "scheduler", "log-probability", "decoding")
    learned = ("forward", "backward", "optimiser", "clipping", "replay › forward")
    expected = {f"drawing › {part}" for part in parts} | {f"learning › {part}" for part in learned}
    seen = {what for spans in read_spans(finished).values() for what, *_ in nested(spans)}
    assert expected <= seen  # the table leaves out what takes hardly any time
    assert {"learning › backward", "drawing › network"} <= set(activities) <= seen | {"idle"}
    events = json.loads(write_trace(finished).read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == set(read_spans(finished))
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_memory_is_told_for_every_actor(finished: Path) -> None:
    peaks = summary(finished)["peak_memory_bytes"]
    assert peaks.keys() == read_spans(finished).keys()
    assert all(peak["memory"] > 50e6 for peak in peaks.values())
    assert all(line["object_store_bytes"] >= 0 for line in journal(finished))


def test_time_within_time_counts_once() -> None:
    spans = [
        ("learning", 0.0, 10.0),
        ("forward", 1.0, 4.0),
        ("checks", 2.0, 3.0),
        ("forward", 5.0, 6.0),
        ("state", 10.0, 12.0),
    ]
    found = [(what, depth, own) for what, _, _, depth, own in nested(spans)]
    assert found == [
        ("learning", 0, 6.0),
        ("learning › forward", 1, 2.0),
        ("learning › forward › checks", 2, 1.0),
        ("learning › forward", 1, 1.0),
        ("state", 0, 2.0),
    ]


def test_what_is_written_again_of_a_step_counts(tmp_path: Path) -> None:
    for step, what in ((1, "lost"), (2, "lost too"), (2, "kept")):
        append_spans(tmp_path, step, {"driver": [(what, float(step), step + 1.0)]})
    assert read_spans(tmp_path) == {"driver": [("lost", 1.0, 2.0), ("kept", 2.0, 3.0)]}
    assert middle_of(read_spans(tmp_path)) == {}
