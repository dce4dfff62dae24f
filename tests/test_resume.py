"""What a run goes on with: what it began with, from wherever the command is given, in a directory that is its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from actors.failures import ActorLost
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.inputs import ddpo_inputs
from orchestration.experiments.ddpo.rollout_queue import RolloutQueue
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.run import Budget, BudgetSettings, _inputs
from orchestration.experiments.sweep.trial import Trial
from orchestration.runs import inputs
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.inputs import changed_inputs
from orchestration.runs.manifest import has_only_begun, open_run, write_manifest
from orchestration.runs.run import _lock, check_output, going_on, new_directory, sync
from orchestration.tracking.tracker import Tracker, TrackingSettings
from pipelines.storage.atomic import commit_directory, read_lines
from pipelines.storage.checkpoint import CheckpointStore, LearnerState
from pipelines.storage.locations import CHECKOUT, fingerprint

REWARD = """
from helper_of_reward import SCALE

def score(images, prompts, captions, **options):
    return [SCALE] * len(images)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that a run reads under names relative to it, and a run that was begun there
    and has committed a step."""
    home = tmp_path / "home"
    shutil.copytree(CHECKOUT / "models" / "digits" / "pipeline", home / "model")
    (home / "prompts.txt").write_text("a\nb\n")
    (home / "words.txt").write_text("x")
    (home / "table.txt").write_text("x")
    (home / "own_reward.py").write_text(REWARD)
    (home / "helper_of_reward.py").write_text("SCALE = 1.0\n")
    monkeypatch.syspath_prepend(str(home))
    for name in ("own_reward", "helper_of_reward"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.chdir(home)
    run = DdpoRun.create(configured())
    run.store.commit(1, {"weight": np.zeros(1)}, {"seconds_by_stage": {}, "peaks": {}, "cpu_seconds": 0.0})
    run.manifest |= {"committed_step": 1, "status": "KILLED"}
    write_manifest(run.directory, run.manifest)
    run._lock.close()
    return home


def configured(*more: str) -> DdpoConfig:
    return load_config(
        DdpoConfig,
        None,
        [
            "prompts=prompts.txt",
            "model.path=model",
            "captioner.path=null",
            "evaluation.evaluator=null",
            "reward.function=own_reward:score",
            "reward.options={'own_reward:score': {words: words.txt, tables: [a, {path: table.txt}]}}",
            "training.images_per_step=4",
            "training.images_per_prompt=2",
            "output_dir=../run",
            "tracking.uri=sqlite:///mlflow.db",
            *more,
        ],
    )


def resume(run: Path, **options: Any) -> DdpoRun:
    with going_on(run, DdpoConfig, trusted=False) as (manifest, config):
        found = DdpoRun.resume(manifest, config, options.get("changes", False))
    found._lock.close()
    return found


READ = {
    "prompts": "prompts.txt",
    "model.path": "model/unet/diffusion_pytorch_model.safetensors",
    "reward.options.own_reward:score.words": "words.txt",
    "reward.options.own_reward:score.tables.1.path": "table.txt",
    "code of own_reward": "own_reward.py",
    "code of helper_of_reward": "helper_of_reward.py",
}


def test_everything_that_is_read_is_remembered_under_a_name_that_lasts(home: Path) -> None:
    inputs = open_run(home.parent / "run")["inputs"]
    assert {key: Path(each["path"]).is_absolute() for key, each in inputs.items()} == dict.fromkeys(READ, True)
    assert all(len(each["sha256"]) == 64 for each in inputs.values())


@pytest.mark.parametrize("key", READ)
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_difference_is_refused_by_name_or_recorded(home: Path, key: str, how: str) -> None:
    run, path = home.parent / "run", home / READ[key]
    resume(run)
    before = open_run(run)["inputs"][key]["sha256"]
    if how == "changed":
        with path.open("a") as file:
            file.write("# c")
    elif key.startswith("code of"):
        return  # its import names it
    else:
        path.unlink()
    with pytest.raises(ConfigError, match=rf"other inputs than it began with: {key}: .*--accept-changes") as refused:
        resume(run)
    assert str(home) in str(refused.value)
    assert str(refused.value).count("holds something else") + str(refused.value).count("is not there") == 1
    going = resume(run, changes=True)
    (change,) = going.manifest["changes"]
    assert (change["step"], list(change["inputs"]), change["inputs"][key][0]) == (1, [key], before)
    assert change["inputs"][key][1] != before


def test_it_goes_on_with_the_same_from_anywhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "prompts.txt").write_text("others\n")
    (elsewhere / "model").mkdir()
    monkeypatch.chdir(elsewhere)
    going = resume(Path("../run"))
    assert "changes" not in going.manifest
    assert Path.cwd() == elsewhere
    assert going.manifest["config"]["tracking"]["uri"] == f"sqlite:///{home}/mlflow.db"
    forked = DdpoRun.fork(Path("../run"), ["output_dir=forked", "training.learning_rate=1e-3"])
    assert forked == elsewhere / "forked"
    content = open_run(forked)["config"]
    assert content["prompts"] == str(home / "prompts.txt")
    tables = ["a", {"path": str(home / "table.txt")}]
    assert content["reward"]["options"]["own_reward:score"] == {"words": str(home / "words.txt"), "tables": tables}
    (home / "model" / "model_index.json").write_text("{} ")
    with pytest.raises(ConfigError, match=r"model"):
        DdpoRun.fork(Path("../run"), ["output_dir=another"])


def test_code_beside_a_reward_in_the_checkout_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of this program, nor of an environment that lies there as well."""
    files = {"own": "own.py", "helper": "helper.py", "pipelines.data.digits": "pipelines/data/digits.py"}
    files |= {"pipelines": "pipelines/__init__.py", "numpy": ".venv/lib/site-packages/numpy.py"}
    for each in map(tmp_path.joinpath, files.values()):
        each.parent.mkdir(parents=True, exist_ok=True)
        each.touch()
    (tmp_path / "own.py").write_text("import numpy, helper\nfrom pipelines.data.digits import parse\n")
    monkeypatch.setattr(inputs, "_file", lambda name: tmp_path / files[name] if name in files else None)
    assert {name for name, _ in inputs._used("own", None)} == {"own", "helper"}


def test_unchanged_files_are_not_read_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = ddpo_inputs(configured())
    path = home / "prompts.txt"
    monkeypatch.setattr("pipelines.storage.locations._file_digest", lambda path: f"read {path}")
    assert ddpo_inputs(configured(), held)["prompts"] == held["prompts"]
    times = path.stat()
    path.write_text("c\nd\n")  # as long, and made to look as old
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint("prompts.txt", held["prompts"])["sha256"] == f"read {path}"


def test_what_lies_in_the_checkout_is_known_by_its_place_there(home: Path) -> None:
    assert fingerprint("models/digits/evaluator")["path"] == "models/digits/evaluator"
    assert fingerprint("nobody/nothing") == {"path": "nobody/nothing", "sha256": None, "stamp": None}


def test_a_moved_run_is_the_same_and_a_copy_is_its_own(home: Path, tmp_path: Path) -> None:
    run, moved, copy = tmp_path / "run", tmp_path / "moved", tmp_path / "copy"
    going = resume(run)
    going.manifest |= {"mlflow_run_id": "known", "directory": str(run)}
    write_manifest(run, going.manifest)
    (run / "outbox").mkdir()
    run.rename(moved)
    again = resume(moved)
    assert (again.manifest["mlflow_run_id"], again._copied_from) == ("known", None)
    again.manifest["directory"] = str(moved)
    write_manifest(moved, again.manifest)

    shutil.copytree(moved, copy)
    with pytest.raises(ConfigError, match=f"{copy} is a copy of {moved}"):
        sync(copy, print)
    (moved / "link").symlink_to(moved)
    assert resume(tmp_path / "moved" / "link")._copied_from is None
    own = resume(copy)
    assert own._copied_from == own.manifest["copied_from"] == str(moved)
    assert "mlflow_run_id" not in own.manifest
    assert own.manifest["id"] != again.manifest["id"] == own.store.owners[1]
    assert (moved / "outbox").exists()
    assert not (copy / "outbox").exists()
    assert open_run(moved)["mlflow_run_id"] == "known"


def lay(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).mkdir(parents=True) if name.endswith("/") else (directory / name).touch()
    return directory


@pytest.mark.parametrize("left", [[".lock"], [".lock", "mlflow.db", "mlflow.db-journal"], [".lock", "outbox/"], "run"])
def test_a_beginning_is_no_run_in_the_way(home: Path, left: Any) -> None:
    """SIGKILL before the manifest, or any end before a commit: the same command begins anew, and takes what it reads as
    it is now."""
    directory = home.parent / "other"
    if left == "run":
        config = configured(f"output_dir={directory}")
        run = DdpoRun.create(config)
        write_manifest(directory, run.manifest | {"status": "FAILED", "committed_step": 0})
        run._lock.close()
        lay(directory / "evaluations", "step-000000.json")
        (directory / "error.txt").touch()
        (home / "prompts.txt").write_text("c\nd\n")
        assert resume(directory).manifest["changes"][0]["inputs"].keys() == {"prompts"}
        commit_directory(directory / "tasks" / "0123", {}, {"kind": "data"})
    else:
        lay(directory, *left)
    assert has_only_begun(directory)
    check_output(str(directory))
    with pytest.raises(ConfigError, match="is being run by another"), _lock(directory):
        new_directory(configured(f"output_dir={directory}"))
    assert new_directory(configured(f"output_dir={directory}")) == directory
    assert [path.name for path in directory.iterdir()] == [".lock"]


@pytest.mark.parametrize("known", [True, False])
def test_a_beginning_that_was_killed_does_not_run_for_ever_in_mlflow(
    home: Path, empty_store: Path, known: bool
) -> None:
    """Nor what is below it, even if it was killed before its directory knew of them."""
    directory, store = home.parent / "other", f"sqlite:///{empty_store}"
    own = f"output_dir={directory}", f"tracking.uri={store}", "tracking.system_metrics=false"
    run = DdpoRun.create(config := configured(*own))
    tracker = Tracker(directory, config.tracking, "other", key=run.manifest["id"])
    made = {tracker.run_id, tracker.child("an arm").run_id}
    stranger = Tracker(home.parent / "another", config.tracking, "other", key="another")
    write_manifest(
        directory, run.manifest | {"status": "RUNNING"} | ({"mlflow_run_id": tracker.run_id} if known else {})
    )
    tracker._outbox.close()  # as the end of its process would
    run._lock.close()
    client = MlflowClient(store)
    assert {client.get_run(each).info.status for each in made} == {"RUNNING"}
    new_directory(config)
    assert {client.get_run(each).info.status for each in made} == {"KILLED"}
    assert client.get_run(stranger.run_id).info.status == "RUNNING"
    stranger.finish("FINISHED")


def test_runs_whose_ids_were_lost_are_gone_on_with(home: Path, empty_store: Path) -> None:
    """A process that is killed after MLflow made its run, or one below it, and before its directory knew."""
    settings = TrackingSettings(uri=f"sqlite:///{empty_store}", system_metrics=False)
    first = Tracker(home.parent / "first", settings, "first", key="the run")
    arm = first.child("an arm")
    first._outbox.close()
    again = Tracker(home.parent / "first", settings, "first", key="the run")
    assert again.run_id == first.run_id
    assert again.child("an arm").run_id == arm.run_id
    assert again.child("another").run_id not in {first.run_id, arm.run_id}
    again.finish("FINISHED")
    other = Tracker(home.parent / "other", settings, "first", key="another run")
    assert other.run_id != first.run_id
    other.finish("FINISHED")


def spoil(directory: Path, what: str) -> None:
    manifest = open_run(directory)
    changes: dict[str, Callable[[], Any]] = {
        "a commit": lambda: lay(directory / "checkpoints" / "step-000001"),
        "a file of somebody": lambda: (directory / "thesis.txt").touch(),
        "a stranger's": lambda: (directory / "manifest.json").write_text(json.dumps(manifest | {"seal": None})),
        "a finished one": lambda: write_manifest(directory, manifest | {"status": "FINISHED"}),
        "a task": lambda: commit_directory(directory / "tasks" / "0123", {}, {"kind": "fit"}),
        "a trial": lambda: lay(directory / "trials" / "a"),
    }
    changes[what]()


@pytest.mark.parametrize(
    "what", ["a commit", "a file of somebody", "a stranger's", "a finished one", "a task", "a trial"]
)
def test_what_is_more_than_a_beginning_is_kept(home: Path, what: str) -> None:
    directory = home.parent / "other"
    run = DdpoRun.create(configured(f"output_dir={directory}"))
    write_manifest(directory, run.manifest | {"status": "KILLED"})
    run._lock.close()
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    spoil(directory, what)
    assert not has_only_begun(directory)
    with pytest.raises(ValueError, match="holds a run already"):
        check_output(str(directory))


@pytest.mark.parametrize("names", [["mlflow.db"], [".lock", "artifacts/"], [".lock", "report.pdf"], ["manifest.json"]])
def test_somebody_elses_directory_is_no_beginning(tmp_path: Path, names: list[str]) -> None:
    assert not has_only_begun(lay(tmp_path / "theirs", *names))


@pytest.mark.parametrize("damage", ["garbled", "altered", "deleted", "another"])
def test_a_damaged_journal_is_named_and_later_steps_reach_it(home: Path, damage: str) -> None:
    run = home.parent / "run"
    first = resume(run)
    first.manifest |= {"committed_step": 3, "resolved": {"micro_batch": 1, "learners": 1, "learner_threads": 1}}
    first.store.commit(3, {"weight": np.zeros(1)}, {})
    for step in range(3):
        recorded(first, step)
    first._lock.close()
    write_manifest(run, first.manifest)
    journal, lines = run / "metrics.jsonl", (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    spoiled = {"garbled": "\x00\x01" + lines[1], "altered": lines[1].replace("0.5", "0.7"), "another": '{"a": 1}\n'}
    journal.unlink() if damage == "deleted" else journal.write_text(lines[0] + spoiled[damage] + lines[2])
    again = resume(run)
    assert [text.split(" ")[0] for text in again.damaged] == ([] if damage == "deleted" else [f"{journal}:2"])
    recorded(again, 3)
    kept = [] if damage == "deleted" else [1, 3]
    assert [line["step"] for line in read_lines(journal)] == [*kept, 4]


def recorded(run: DdpoRun, step: int) -> None:
    """Record a step as the loop does, and write the journal as a commit does."""
    from pipelines.storage.atomic import append_durably, as_lines, with_digest

    run._seconds_before, run.seconds_by_stage["sample"] = dict(run.seconds_by_stage), step + 1.0
    run.record(step, {"reward/mean": 0.5})
    append_durably(run.journal, as_lines(map(with_digest, run._pending)))
    run._pending = []


def test_a_learner_lost_in_the_middle_of_a_commit_leaves_no_line_behind(home: Path) -> None:
    class Lost(dict[str, np.ndarray]):
        """Tensors that are fetched one by one, from a learner that is lost after the first."""

        def __getitem__(self, name: str) -> np.ndarray:
            if name == "b":
                raise ActorLost("the learner was lost")
            return super().__getitem__(name)

    def journalled() -> list[int]:
        return [line["step"] for line in read_lines(run.directory / "metrics.jsonl")]

    run = resume(home.parent / "run")
    run.manifest["resolved"] = {"micro_batch": 1, "learners": 1, "learner_threads": 1}
    delivered: list[int] = []
    run.tracker = SimpleNamespace(metrics=lambda step, *_: delivered.append(step))  # type: ignore[assignment]
    before, tensors = run.step, {"a": np.zeros(1), "b": np.zeros(1)}
    for committed in ([], [before + 1]):  # before the first line, and after one
        finish_a_step(run)
        with pytest.raises(ActorLost) as lost:
            run.commit(LearnerState(Lost(tensors), 1), {}, {})
        assert journalled() == [*committed, run.step]  # the line comes before the commit, as it has to
        run.roll_back(lost.value)
        assert journalled() == committed
        assert run.step == before + len(committed)
        if not committed:
            finish_a_step(run)
            run.commit(LearnerState(tensors, 1), {}, {})
        assert journalled() == [line["step"] for line in run.history] == delivered == [before + 1]


def finish_a_step(run: DdpoRun) -> None:
    run._seconds_before = dict(run.seconds_by_stage)
    run.seconds_by_stage["sample"] = run.seconds_by_stage.get("sample", 0.0) + 1.0
    run.record(run.step, {"reward/mean": 0.5})


def test_a_fork_to_depth_0_learns_from_what_the_present_weights_draw() -> None:
    asked: list[int] = []
    for depth in (0, 1):
        run: Any = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(depth=depth)))
        workers: Any = SimpleNamespace(samplers=SimpleNamespace(policy=SimpleNamespace(version=7)))
        workers.drawing_with = lambda which: __import__("contextlib").nullcontext()
        queue = RolloutQueue(run, workers, prompts=None)  # type: ignore[arg-type]
        queue._ask = lambda step, depth=depth: asked.append(depth)  # type: ignore[method-assign]
        queue.redo(5, drawn_by=6)
    assert asked == [1]


def test_notes_of_two_processes_are_both_kept(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "t", {}, 0)
    trial.note(stopped=3)
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            for repeat in range(25):
                trial.note(**{f"note{number}-{repeat}": 1})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(trial.known()) == 2 + 1 + 100


def test_a_budget_of_queries_counts_earlier_sessions() -> None:
    budget = Budget(BudgetSettings(reward_queries=100), 0.0, {"a": 60})
    assert not budget.stop_all()
    budget("x", {"trial": "a", "images": 60})
    assert not budget.stop_all()
    budget("y", {"trial": "b", "images": 40})
    assert budget.stop_all()


def test_commits_are_found_whatever_lies_beside_them(tmp_path: Path) -> None:
    lay(tmp_path / "checkpoints", "step-000003/", ".step-000004.partial/", "step-x", "notes.txt")
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [3]


def test_an_option_that_is_a_word_is_no_data(home: Path) -> None:
    """ "/" and "." are directories, but nobody means to have them read whole."""
    for word in ("/", ".", ".."):
        assert "reward.options.own_reward:score.words" not in ddpo_inputs(
            configured(f"reward.options={{'own_reward:score': {{words: {word!r}}}}}")
        )


def test_a_sweep_remembers_what_every_point_reads(home: Path) -> None:
    """Its own trials refuse a difference; those that have not begun would not know of it."""
    (home / "others.txt").write_text("c\nd\n")
    space = {"prompts": ["prompts.txt", "others.txt"], "reward.function": ["own_reward:score", "strict"]}
    config = load_config(SweepConfig, None, [f"space={json.dumps(space)}", "config=configs/ddpo/digits.yaml"])
    before = _inputs(config, None)
    assert {"config", "trials.prompts", "trials.prompts others.txt", "code of own_reward"} <= before.keys()
    for name in ("others.txt", "helper_of_reward.py"):
        with (home / name).open("a") as file:
            file.write("# c\n")
    changed = changed_inputs(before, _inputs(config, before))
    assert changed.keys() == {"trials.prompts others.txt", "code of helper_of_reward"}
