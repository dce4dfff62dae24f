"""The whole loop on a real Ray and a real MLflow store, with genuine tiny models.

What it computes does not depend on who computes it, on being interrupted, or on a neighbour.
"""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.run import DiskError
from pipelines.storage.checkpoint import CheckpointStore
from pipelines.storage.locations import CHECKOUT
from policies.rl.health import DegenerateBatch
from tests.models import build_tiny_captioner, build_tiny_pipeline, build_tiny_sd3
from tests.processes import start, wait_until
from tests.rewards import HANG
from tests.schemas import checked

STEPS = 4
PROMPTS = ("a red seven", "a blue two", "a green one", "a red two", "a blue seven", "a green two")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of seconds: tiny random models, a reward that needs no language, one store (a new one takes a second)."""
    directory = tmp_path_factory.mktemp("loop")
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        "name=tiny",
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={build_tiny_pipeline(directory / 'pipeline')}",
        "captioner.path=null",
        "reward.function=tests.rewards:redness",
        "evaluation.evaluator=null",
        "evaluation.images=12",
        "evaluation.interim_images=6",
        "evaluation.every=2",
        "evaluation.patience=0",
        "sampling.steps=4",
        f"training.steps={STEPS}",
        "training.images_per_step=24",
        "training.images_per_prompt=6",
        "training.updates_per_step=2",
        "training.timestep_fraction=0.5",
        "training.learning_rate=1e-3",
        "training.ema_decay=0.5",
        "checkpoint.every=1",
        "actors.images_per_call=5",
        "actors.threads.learner=1",
        f"tracking.uri=sqlite:///{directory / 'mlflow.db'}",
        "tracking.system_metrics=false",
    ]


def configure(overrides: list[str], *more: str) -> DdpoConfig:
    return load_config(DdpoConfig, None, [*overrides, *more])


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(overrides: list[str], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed run with two samplers."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory = tmp_path_factory.mktemp("runs") / "two"
    path = run_ddpo(configure(overrides, f"output_dir={directory}", "actors.samplers=2"))
    assert path == directory / "summary.json"
    return directory


def assert_same_end(directory: Path, finished: Path) -> None:
    """Weights and images, which do not depend on the number of samplers."""
    assert summary(directory)["weights_sha256"] == summary(finished)["weights_sha256"]
    ends = [np.load(each / "evaluations" / f"step-{STEPS:06d}.npz")["images"] for each in (directory, finished)]
    np.testing.assert_array_equal(*ends)


def test_the_summary_holds_what_machines_read(finished: Path) -> None:
    content = summary(finished)
    assert content["images"] == STEPS * 24
    assert content["steps"] == STEPS
    assert content["evaluator_accuracy_before"] is None
    assert content["evaluator_accuracy_after"] is None
    assert content["reward_before"] != content["reward_after"]
    assert 0 < sum(content["seconds_by_stage"].values()) < content["wall_seconds"]
    assert content["cpu_seconds"] > 0
    assert len(content["weights_sha256"]) == 64
    manifest, _ = checked(finished)
    assert manifest["mlflow_run_id"] == content["mlflow_run_id"]
    assert manifest["inputs"].keys() == {"prompts", "model.path", "code of tests.rewards"}
    assert not (finished / "error.txt").exists()


def test_every_file_is_on_the_page_of_runs(finished: Path) -> None:
    page = (CHECKOUT / "docs/runs.md").read_text(encoding="utf-8").split("##")[0]
    names = {path.name for place in (finished, finished / "figures") for path in place.iterdir()}
    assert not {name for name in names if name not in page}
    assert len(names) > 10


def test_the_journal_has_every_step_once(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        errors = [value for key, value in line.items() if key.startswith("first_update_error/")]
        assert errors
        assert max(errors) < 1e-5
        assert line["weights/changed_tensors"] > 0
    assert len({line["weights/checksum"] for line in lines}) == STEPS


def test_mlflow_holds_the_run(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(json.loads((finished / "manifest.json").read_text())["config"]["tracking"]["uri"])
    run_id = summary(finished)["mlflow_run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.params["resolved.micro_batch"]
    assert run.data.tags["git_commit"]
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["prompts"]
    history = client.get_metric_history(run_id, "reward/mean")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    journal = [json.loads(line)["reward/mean"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [point.value for point in history] == journal
    for name in ("calibration/true", "calibration/shuffled", "calibration/noise"):
        assert [point.step for point in client.get_metric_history(run_id, name)] == [0]
    paths = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"figures", "pipeline", "checkpoints", "summary.json", "images"} <= paths
    names = [Path(artifact.path).name for artifact in client.list_artifacts(run_id, "images")]
    steps = {int(found.group(1)) for name in names if (found := re.search(r"step\D(\d+)", name))}
    assert steps == {0, 2, 4}


def test_a_stock_pipeline_draws_what_the_run_showed(finished: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from orchestration.experiments.ddpo.evaluation import fixed_work

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = fixed_work(PROMPTS, 12)
    shown = np.load(finished / "evaluations" / f"step-{STEPS:06d}.npz")["images"]
    drawn = pipeline(
        prompts,
        num_inference_steps=4,
        eta=1.0,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    difference = np.abs(np.round(drawn * 255).astype(int) - shown.astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_generate_draws_from_a_run_and_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    from orchestration.experiments.ddpo.evaluation import fixed_work
    from orchestration.experiments.ddpo.generate import generate

    prompts, seeds = fixed_work(PROMPTS, 2)
    shown = np.load(finished / "evaluations" / f"step-{STEPS:06d}.npz")["images"][:2]
    for source in (finished, finished / "checkpoints" / f"step-{STEPS:06d}"):
        paths = generate(source, prompts, seeds, tmp_path / source.name)
        drawn = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
        assert np.abs(drawn - shown).max() <= 1


def test_a_run_that_its_reward_fools_stops_and_keeps_its_best_weights(
    overrides: list[str], ray_session: None, tmp_path: Path
) -> None:
    """The reward rises, the held-out function falls: from the first step on everything is worse than before."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS[:4], "[unseen]", *PROMPTS[4:]]))
    more = [f"output_dir={directory}", f"prompts={prompts}", "training.steps=6", "training.ema_decay=0"]
    more += ["training.objective=negative_aware", "training.learning_rate=1e-2", "training.timestep_fraction=1.0"]
    more += ["reward.function={tests.rewards:redness: 2.0, tests.rewards:jitter: 0.5}", "checkpoint.keep=1"]
    more += ["reward.held_out=[tests.rewards:the_opposite]", "reward.options={tests.rewards:jitter: {size: 0.001}}"]
    more += ["evaluation.every=1", "evaluation.patience=2", "evaluation.interim_images=12", "actors.samplers=1"]
    run_ddpo(configure(overrides, *more))
    found = summary(directory)
    assert found["steps"] < 6
    assert found["stopped"].startswith("over-optimisation: the held-out measure fell from")
    assert found["kept_step"] == 1
    assert {1, found["steps"]} == set(CheckpointStore(directory / "checkpoints").steps())

    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert last["rewards/tests.rewards:the_opposite"] == -last["rewards/tests.rewards:redness"]
    whole = 2 * last["rewards/tests.rewards:redness"] + 0.5 * last["rewards/tests.rewards:jitter"]
    assert last["evaluation/reward"] == pytest.approx(whole, abs=1e-12)
    assert last["evaluation/reward"] > first["evaluation/reward"]
    assert last["evaluation/kl_to_base"] > first["evaluation/kl_to_base"] > 0
    assert found["evaluation_images"] == 12
    parts = 8 * last["seen/reward"] + 4 * last["unseen/reward"]
    assert parts == pytest.approx(12 * last["evaluation/reward"], abs=1e-9)
    kept = json.loads((directory / "evaluations" / "step-000001.json").read_text())
    assert kept["kept"] is True
    assert found["reward_after"] == kept["evaluation/reward"] == first["evaluation/reward"]


def test_a_check_says_which_rewards_can_teach(
    overrides: list[str], ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of actors without a learner, or in this process alone: one that sees a difference, and one that does not."""
    from orchestration.experiments.ddpo import reward_check
    from orchestration.experiments.ddpo.reward_check import check, render

    names = "{tests.rewards:redness: 1, tests.rewards:the_same: 1}"
    model = build_tiny_pipeline(tmp_path / "pipeline", seed=3)  # whose images differ enough
    config = configure(overrides, f"model.path={model}", f"reward.function={names}", "actors.samplers=1")
    with monkeypatch.context() as patch:
        patch.setattr(reward_check, "WorkerGroup", None)
        here = check(config)
    monkeypatch.setattr(reward_check, "external_address", lambda: "a cluster, whose actors do it")
    found = check(config)
    for name, finding in found.items():
        assert (finding.means, finding.spread) == (here[name].means, pytest.approx(here[name].spread, abs=1e-6))
    redness, same = found["tests.rewards:redness"], found["tests.rewards:the_same"]
    assert same.objection == "all images of a prompt score the same: there is nothing to learn from"
    assert same.means == {"true": 0.5, "shuffled": 0.5, "noise": 0.5}
    assert redness.objection is None
    assert redness.spread > 0.01
    assert redness.means["true"] == pytest.approx(redness.means["shuffled"])  # it reads no prompt
    assert abs(redness.means["noise"]) < 0.05 < redness.means["true"]
    assert redness.rank_correlation is None
    assert redness.milliseconds > 0 < redness.per_second
    lines = "".join(str(part) for part in render(found).renderables[1:])
    assert "tests.rewards:redness: can teach" in lines


@pytest.mark.parametrize(
    ("found", "objection"),
    [
        ((True, True, 0.1, 0.5), None),
        ((False, False, 0.1, None), None),
        ((True, True, 0.0, 0.5), "score the same"),
        ((True, True, 0.1, -0.2), "ranks images against"),
        ((True, False, 0.1, None), "does not prefer"),
    ],
)
def test_what_speaks_against_a_reward(found: tuple[bool, bool, float, float | None], objection: str | None) -> None:
    from orchestration.experiments.ddpo.reward_check import Finding

    said = Finding({}, *found, 1.0, 1.0).objection
    assert said is None if objection is None else objection in str(said)


def test_a_reward_that_fails_stops_the_run_with_its_reason(
    overrides: list[str], ray_session: None, tmp_path: Path
) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo
    from orchestration.experiments.ddpo.preflight import preflight_ddpo

    directory = tmp_path / "run"
    own = "reward.function=tests/rewards.py:fails_later"  # by its file
    config = configure(overrides, f"output_dir={directory}", own, "actors.samplers=1")
    with pytest.raises(RuntimeError, match=r"the reward function failed: KeyError: 'the weights' \(at") as failed:
        run_ddpo(config)
    (shown,) = failed.value.__notes__  # what a terminal and a notebook show of it: the user's own frames alone
    assert re.fullmatch(
        r"(?s)  Traceback .*rewards\.py.*in fails_later.*in _deeper.*\n  KeyError: 'the weights'", shown
    )
    assert "pipelines/rewards" not in shown
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["status"] == "FAILED"
    assert "the weights" in manifest["error"]
    told = (directory / "error.txt").read_text()
    assert "Traceback" in told
    assert "orchestration/experiments/ddpo/loop.py" in told
    preflight_ddpo(config)  # nothing was committed: the same command may be given again


def test_steps_without_usable_numbers_may_be_skipped(overrides: list[str], ray_session: None, tmp_path: Path) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo

    config = configure(
        overrides,
        f"output_dir={tmp_path / 'run'}",
        "reward.function=tests.rewards:the_same",
        "actors.samplers=1",
        "training.steps=2",
        "training.on_sick_numbers=skip",
    )
    run_ddpo(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sick"] for line in lines] == [1, 1]
    assert summary(tmp_path / "run")["reward_before"] == summary(tmp_path / "run")["reward_after"]
    stops = DdpoRun.create(configure(overrides, f"output_dir={tmp_path / 'stopped'}"))
    with pytest.raises(DegenerateBatch, match="all rewards are alike"):
        stops.skip_update(DegenerateBatch("all rewards are alike"))


def test_a_fork_begins_where_its_source_stood_with_any_number_of_samplers(
    overrides: list[str], finished: Path, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.experiments.ddpo.loop import resume_ddpo
    from orchestration.experiments.ddpo.run import DdpoRun

    same = DdpoRun.fork(finished, [f"output_dir={tmp_path / 'same'}", "actors.samplers=3"], step=STEPS - 1)
    assert json.loads((same / "manifest.json").read_text())["status"] == "FORKED"
    resume_ddpo(same)
    assert_same_end(same, finished)
    assert summary(same)["mlflow_run_id"] != summary(finished)["mlflow_run_id"]
    past = [(directory / "metrics.jsonl").read_text().splitlines()[: STEPS - 1] for directory in (same, finished)]
    assert past[0] == past[1]
    other = DdpoRun.fork(finished, [f"output_dir={tmp_path / 'other'}", "training.learning_rate=5e-4"], step=STEPS - 1)
    odd = [other / "evaluations" / "step-000000.json", other / "evaluations" / "step-000002.npz", other / "spans.jsonl"]
    for path in odd:  # side files are for people: what is damaged is named and left out
        path.write_bytes(b'{"step": 1, "lanes": {"driver": [[1]]}}\n{\n\n')
    resume_ddpo(other)
    said = capsys.readouterr().out
    assert all(str(path) in said for path in odd[:2])
    assert summary(other)["weights_sha256"] != summary(finished)["weights_sha256"]
    assert summary(other)["reward_before"] is None
    assert {"curves.png", "timeline.png"} <= {path.name for path in (other / "figures").iterdir()}
    for wrong, message in (
        (["model.lora_rank=4"], "model"),
        ([f"training.steps={STEPS - 1}"], "stands after 3 already"),
        ([f"output_dir={finished}"], "holds a run already"),
    ):
        with pytest.raises(ConfigError, match=message):
            DdpoRun.fork(finished, wrong, step=STEPS - 1)
    with pytest.raises(ConfigError, match=r"no commit of step 1 \(there are: \[3, 4\]\)"):
        DdpoRun.fork(finished, [], step=1)


def test_two_learners_go_on_where_one_stood_and_when_one_of_them_is_killed(
    overrides: list[str], finished: Path, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.experiments.ddpo.loop import resume_ddpo
    from orchestration.experiments.ddpo.run import DdpoRun

    other = [f"output_dir={tmp_path / 'run'}", "actors.learners=2", "actors.samplers=1"]
    directory = DdpoRun.fork(finished, other, step=3)

    def kill_one_when_all_is_learned(run: DdpoRun) -> None:
        learners = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                learners += [process] * process.cmdline()[0].startswith("ray::LearnerActor")
        assert len(learners) == 2
        learners[1].kill()

    resume_ddpo(directory, on_step=kill_one_when_all_is_learned)
    said = capsys.readouterr().out
    assert "from step 4 on learners is 2, no longer 1" in said
    assert "going back to step 4" in said
    line = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["policy/learners"] == 2
    assert max(value for key, value in line.items() if key.startswith("first_update_error/")) < 1e-5
    one, two = (CheckpointStore(each / "checkpoints").load(STEPS).tensors for each in (finished, directory))
    assert one.keys() == two.keys()
    flat = [
        np.concatenate([each[name].ravel() for name in sorted(each) if "parameter/" in name]) for each in (one, two)
    ]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-5 * np.linalg.norm(flat[0])


def test_work_that_hangs_is_done_again_and_one_sampler_draws_what_two_do(
    overrides: list[str], finished: Path, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory = tmp_path / "run"
    own = ["actors.samplers=1", "actors.timeout_seconds=15", "reward.function=tests.rewards:hangs_once"]
    config = configure(overrides, f"output_dir={directory}", *own)
    steps: list[int] = []

    def hang_in_the_third_step_once(run: Any) -> None:
        steps.append(run.step)
        if steps == [1, 2]:
            HANG.touch()

    try:
        run_ddpo(config, hang_in_the_third_step_once)
        assert not HANG.exists()
    finally:
        HANG.unlink(missing_ok=True)
    assert "step 3: rewards: nothing finished within 15 s" in capsys.readouterr().out
    assert_same_end(directory, finished)
    lines = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))


@pytest.fixture
def small_disk(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with room for two commits and a half, and what else a run writes meanwhile."""
    place = tmp_path / "disk"
    place.mkdir()
    commits = [sum(file.stat().st_size for file in each.iterdir()) for each in (finished / "checkpoints").iterdir()]
    others = sum(file.stat().st_size for file in (finished / "evaluations").iterdir()) // 2
    size = f"size={max(commits) * 5 // 2 + others}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(place)], capture_output=True).returncode:
        pytest.skip("this system lets only an administrator mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_said_and_what_was_committed_stands(
    overrides: list[str], finished: Path, ray_session: None, small_disk: Path, tmp_path: Path
) -> None:
    """A third commit has no room beside the two before it, until the disk is made larger."""
    from mlflow import MlflowClient

    from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo

    directory, store = small_disk / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    message = r"No space left on device \(0\.0 GB free\); the last commit stands"
    with pytest.raises(DiskError, match=message):
        run_ddpo(configure(overrides, f"output_dir={directory}", f"tracking.uri={store}"))
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    resume_ddpo(directory)
    assert summary(directory)["weights_sha256"] == summary(finished)["weights_sha256"]
    points = MlflowClient(store).get_metric_history(summary(directory)["mlflow_run_id"], "reward/mean")
    assert [point.step for point in points] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("refusal", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses_is_named_and_the_way_on(refusal: int, overrides: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    error = OSError(refusal, os.strerror(refusal), str(directory / "metrics.jsonl"))
    message = rf"metrics\.jsonl: {os.strerror(refusal)} .*the last commit stands.*ouroboros resume {directory}"
    with pytest.raises(DiskError, match=message), DdpoRun.create(configure(overrides, f"output_dir={directory}")):
        raise error
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["status"] == "FAILED"
    assert re.search(message, manifest["error"])


def test_a_server_that_is_away_is_said_at_once_and_leaves_nothing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo
    from orchestration.tracking import tracker as tracking
    from orchestration.tracking.tracker import TrackingError

    monkeypatch.setattr(tracking, "_NEW_SECONDS", 0.0)
    directory = tmp_path / "run"
    config = configure(overrides, f"output_dir={directory}", "tracking.uri=http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 cannot be reached"):
        run_ddpo(config)
    assert not directory.exists()


def test_64_pixel_models_with_guidance_score_function_and_lora_run(ray_session: None, tmp_path: Path) -> None:
    """What it leaves: LoRA that gives the base's stock pipeline the run's images, a card, a model for the registry."""
    from mlflow import MlflowClient

    from orchestration.experiments.ddpo.loop import run_ddpo
    from orchestration.runs.run import register

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = load_config(
        DdpoConfig,
        None,
        [
            f"output_dir={tmp_path / 'run'}",
            f"prompts={tmp_path / 'prompts.txt'}",
            f"model.path={build_tiny_pipeline(tmp_path / 'pipeline', image_size=64)}",
            f"captioner.path={build_tiny_captioner(tmp_path / 'captioner', image_size=64)}",
            "model.lora_rank=4",
            "sampling.guidance_scale=3.0",
            "sampling.steps=3",
            "training.objective=score_function",
            "training.updates_per_step=1",
            "training.images_per_step=8",
            "training.images_per_prompt=4",
            "training.steps=2",
            "training.learning_rate=3e-2",
            "evaluation.evaluator=null",
            "evaluation.images=6",
            "evaluation.interim_images=6",
            "actors.samplers=1",
            "tracking.system_metrics=false",
        ],
    )
    run_ddpo(config)
    run = tmp_path / "run"
    assert summary(run)["steps"] == 2
    before, shown = (np.load(run / "evaluations" / f"step-00000{n}.npz")["images"].astype(int) for n in (0, 2))
    assert shown.shape == (6, 64, 64, 3)
    assert np.abs(shown - before).max() > 9

    drawn = drawn_by_the_base_with_lora(tmp_path / "pipeline", run / "pipeline" / "lora")
    assert np.abs(drawn - shown).max() <= 1
    assert (drawn == shown).mean() > 0.99

    card = (run / "pipeline" / "README.md").read_text()
    facts = summary(run)
    assert f"| reward | {facts['reward_before']:.3f} | {facts['reward_after']:.3f} |" in card
    assert f"`{tmp_path / 'pipeline'}`, by LoRA," in card
    assert "| `training.learning_rate` | 0.03 |" in card
    assert facts["weights_sha256"] in card
    assert all(f"    {prompt}\n" in card for prompt in PROMPTS)
    assert all((run / "pipeline" / name).exists() for name in re.findall(r"\((\w+\.png)\)", card))

    said: list[str] = []
    address = register(run, "tiny-lora", "champion", said.append)
    assert register(run, "tiny-lora", "champion", said.append) == address == "models:/tiny-lora/1"
    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    version = client.get_model_version_by_alias("tiny-lora", "champion")
    assert version.run_id == facts["mlflow_run_id"]
    assert version.tags["weights_sha256"] == facts["weights_sha256"]
    artifacts = {file.path for file in client.list_artifacts(version.run_id, "pipeline")}
    assert {"pipeline/README.md", "pipeline/curves.png", "pipeline/lora", "pipeline/model_index.json"} <= artifacts
    (run / "manifest.json").write_text((run / "manifest.json").read_text().replace("FINISHED", "KILLED"))
    with pytest.raises(ConfigError, match="it is not a finished DDPO run"):
        register(run, "tiny-lora", "champion", said.append)


def drawn_by_the_base_with_lora(base: Path, adapter: Path) -> np.ndarray:
    import torch
    from diffusers import StableDiffusionPipeline

    from orchestration.experiments.ddpo.evaluation import fixed_work

    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(adapter)
    prompts, seeds = fixed_work(PROMPTS, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"generator": generators, "num_inference_steps": 3, "eta": 1.0, "guidance_scale": 3.0}
    return np.round(pipeline(prompts, **call, output_type="np").images * 255).astype(int)


def test_a_flow_learns_without_densities(overrides: list[str], ray_session: None, tmp_path: Path) -> None:
    """Stable Diffusion 3 by DiffusionNFT, drawn by the averaged weights; no number of a ratio is told."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    more = [f"output_dir={tmp_path / 'run'}", f"model.path={build_tiny_sd3(tmp_path / 'flow')}", "actors.samplers=1"]
    more += ["training.objective=negative_aware", "training.steps=2", "sampling.eta=0.7", "sampling.guidance_scale=2"]
    run_ddpo(configure(overrides, *more))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["policy/loss"] > 0 and line["weights/changed_tensors"] > 0 for line in lines)
    assert not any(
        "ratio" in key or "first_update" in key or key == "policy/approximate_kl" for line in lines for key in line
    )
    assert json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())["_class_name"].endswith(
        "3Pipeline"
    )
    report = (tmp_path / "run" / "report.html").read_text()
    assert "negative_aware" in report


def test_ctrl_c_beside_a_neighbour_and_resume(
    overrides: list[str], finished: Path, ray_session: None, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    from orchestration.experiments.ddpo.loop import resume_ddpo

    neighbour_directory, directory = tmp_path / "neighbour", tmp_path / "interrupted"
    log, neighbour_log = tmp_path / "log.txt", tmp_path / "neighbour.txt"
    own = ["ddpo", *overrides, "tracking.uri=null"]
    waits, held, go = "tests.rewards:Waits", directory / "checkpoints/step-000002", tmp_path / "go"
    waiting = [f"reward.function={waits}", f"reward.options={{{waits}: {{since: {held}, until: {go}}}}}"]
    neighbour = start([*own, f"output_dir={neighbour_directory}"], neighbour_log)
    process = start([*own, *waiting, f"output_dir={directory}"], log, afresh=True)
    try:
        begun = directory / "manifest.json"
        wait_until(lambda: begun.exists() or process.poll() is not None, 300, "the beginning of the run")
        second = tmp_path / "second.txt"
        assert start(["resume", str(directory)], second).wait(timeout=180) == 2
        assert "is being run by another process" in second.read_text()
        wait_until(lambda: "step 2/" in log.read_text() or process.poll() is not None, 600, "the second step")
        assert process.poll() is None, log.read_text()
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in family)
        os.killpg(process.pid, signal.SIGINT)
        interrupted = time.monotonic()
        assert process.wait(timeout=30) == 130, log.read_text()
        assert time.monotonic() - interrupted < 10
        wait_until(lambda: not [c for c in family if c.is_running()], 5, f"the end of {family}")
        assert neighbour.wait(timeout=600) == 0, neighbour_log.read_text()
    finally:
        for each in (process, neighbour):
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)

    manifest = json.loads((directory / "manifest.json").read_text())
    committed = manifest["committed_step"]
    assert manifest["status"] == "KILLED"
    assert 1 <= committed < STEPS
    assert f"last committed step: {committed}" in log.read_text()
    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    assert client.get_run(manifest["mlflow_run_id"]).info.status == "KILLED"

    # What was resolved at the start is replayed, whatever the machine would give now.
    resolved = json.loads((finished / "manifest.json").read_text())["resolved"]
    assert manifest["resolved"] == resolved
    assert resolved["learner_threads"] == 1

    go.touch()
    resume_ddpo(directory)
    assert client.get_run(manifest["mlflow_run_id"]).info.status == "FINISHED"
    points = client.get_metric_history(manifest["mlflow_run_id"], "reward/mean")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    expected = summary(finished)["weights_sha256"]
    assert summary(directory)["weights_sha256"] == expected
    assert summary(neighbour_directory)["weights_sha256"] == expected
    assert summary(directory)["mlflow_run_id"] == manifest["mlflow_run_id"]


def test_ctrl_c_while_ray_starts_leaves_no_process(overrides: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process = start(["ddpo", *overrides, "tracking.uri=null", f"output_dir={tmp_path / 'run'}"], log, afresh=True)

    def raylet_runs() -> bool:
        return any("raylet" in child.name() for child in psutil.Process(process.pid).children(recursive=True))

    wait_until(raylet_runs, 300, "Ray's start")
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130, log.read_text()
    wait_until(lambda: not [c for c in family if c.is_running()], 5, f"the end of {family}")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "KILLED"
