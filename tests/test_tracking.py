"""Tracking: one MLflow run before and after a resume, nothing twice or lost in silence, no endless wait."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from orchestration.tracking import tracker as tracking
from orchestration.tracking.store import MlflowStore
from orchestration.tracking.tracker import Tracker, TrackingError, TrackingSettings, deliver_rest, flatten, open_store
from tests.servers import Gate, mlflow_server

QUIET = TrackingSettings(system_metrics=False)


@pytest.fixture
def directory(tmp_path: Path, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def client_of(tracker: Tracker) -> Any:
    """A client of its store, once everything was delivered."""
    from mlflow import MlflowClient

    assert tracker.drain()
    return MlflowClient(tracking_uri=tracker.uri)


def points_of(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(tracker).get_metric_history(tracker.run_id, name)]


def test_a_run_is_described(directory: Path) -> None:
    tracker = Tracker(directory, QUIET, "first")
    many = {f"key{number}": number for number in range(150)}
    tracker.describe(
        {
            "model": {"path": "x", "rank": None},
            "many": many,
            "long": "é" * 7000,
            "targets": ("a", "b"),
            "odd<key>": True,
        },
        {"git_commit": "abc", "long": "y" * 9000},
    )
    tracker.dataset("prompts", "0123abc", "prompts.txt", {"prompts": 2})
    run = client_of(tracker).get_run(tracker.run_id)
    assert run.info.run_name == "first"
    assert run.data.params["model.path"] == "x"
    assert run.data.params["model.rank"] == "null"
    assert run.data.params["targets"] == '["a", "b"]'
    assert run.data.params["odd_key_"] == "true"
    assert run.data.params["many.key149"] == "149"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("…")
    assert run.data.tags["git_commit"] == "abc"
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "prompts"
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    assert (entry.dataset.source, entry.dataset.profile) == ("prompts.txt", '{"prompts": 2}')


def test_artifacts_lie_beside_the_database(directory: Path) -> None:
    tracker = Tracker(directory, QUIET, "first")
    (directory / "model").mkdir()
    (directory / "model" / "weights.bin").write_text("weights")
    (directory / "curves.png").write_text("picture")
    tracker.artifact(directory / "model", "final")
    tracker.artifact(directory / "curves.png")
    assert tracker.drain()
    stored = {
        path.relative_to(directory / "artifacts" / tracker.run_id / "artifacts").as_posix()
        for path in (directory / "artifacts").rglob("*")
        if path.is_file()
    }
    assert stored == {"final/model/weights.bin", "curves.png"}


def test_a_resume_continues_the_run_and_adds_nothing_twice(directory: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    first = Tracker(directory, QUIET, "first")
    first.describe({"threads": 1, "steps": 5, "output_dir": "where it was"}, {})
    first.dataset("prompts", "0123abc", "prompts.txt", {})
    first.metrics(1, {"reward/mean": 0.5, "ratio": float("nan")}, 1000)
    first.metrics(2, {"reward/mean": 0.6}, 2000)
    first.image("samples/fixed", picture, 2)
    first.finish("KILLED")
    assert client_of(first).get_run(first.run_id).info.status == "KILLED"

    second = Tracker(directory, QUIET, "ignored", run_id=first.run_id)
    assert second.run_id == first.run_id
    assert client_of(second).get_run(second.run_id).info.status == "RUNNING"
    second.describe({"threads": 2, "steps": 5, "output_dir": "where it was moved to"}, {})
    second.dataset("prompts", "0123abc", "prompts.txt", {})
    second.metrics(1, {"reward/mean": 0.5, "ratio": float("nan")}, 1000)
    second.metrics(2, {"reward/mean": 0.6}, 2000)
    second.metrics(3, {"reward/mean": 0.7}, 3000)
    for step in (2, 2, 3):
        second.image("samples/fixed", picture, step)
    second.finish("FINISHED")

    assert points_of(second, "reward/mean") == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert len(points_of(second, "ratio")) == 1
    run = client_of(second).get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["threads"] == "1"
    assert run.data.tags["changed/threads"] == "2"
    assert not {"changed/steps", "changed/output_dir"} & run.data.tags.keys()
    assert len(run.inputs.dataset_inputs) == 1
    images = [
        file.path for file in client_of(second).list_artifacts(second.run_id, "images") if file.path.endswith("png")
    ]
    assert sorted(path.split("timestamp")[0] for path in images) == [
        "images/samples~fixed+step+2+",
        "images/samples~fixed+step+3+",
    ]


def test_only_the_first_finish_counts(directory: Path) -> None:
    tracker = Tracker(directory, QUIET, "first")
    tracker.finish("KILLED")
    tracker.finish("FINISHED")
    assert client_of(tracker).get_run(tracker.run_id).info.status == "KILLED"


def test_two_runs_in_one_process_do_not_meet(directory: Path) -> None:
    shared = QUIET.model_copy(update={"uri": f"sqlite:///{directory / 'mlflow.db'}"})
    one, two = (Tracker(directory / name, shared, name) for name in ("one", "two"))
    one.metrics(1, {"reward": 1.0}, 1)
    two.metrics(1, {"reward": 2.0}, 1)
    one.finish("FINISHED")
    two.finish("FAILED")
    assert one.run_id != two.run_id
    assert (points_of(one, "reward"), points_of(two, "reward")) == ([(1, 1.0)], [(1, 2.0)])
    assert client_of(two).get_run(two.run_id).info.status == "FAILED"


def test_system_metrics_are_recorded_and_stop(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker(directory, TrackingSettings(), "first")
    deadline = time.monotonic() + 20
    while not points_of(tracker, "system/cpu_utilization_percentage") and time.monotonic() < deadline:
        time.sleep(0.1)
    tracker.finish("FINISHED")
    assert points_of(tracker, "system/cpu_utilization_percentage")
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetrics"]


def test_nothing_is_printed_and_nothing_lies_outside_the_run_directory(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    program = (
        "from pathlib import Path; from orchestration.tracking.tracker import *; import sys;"
        f"tracker = Tracker(Path({str(run)!r}), TrackingSettings(), 'name');"
        "tracker.describe({'a': 1}, {}); tracker.metrics(1, {'m': 1.0}, 1); tracker.finish('FINISHED')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(elsewhere.iterdir()) == []
    assert "mlflow.db" in {path.name for path in run.iterdir()}


def test_the_command_that_opens_the_store(directory: Path) -> None:
    tracker = Tracker(directory, QUIET, "first")
    command, page = tracker.open_command().split("\n")
    where = f"--backend-store-uri sqlite:///{directory}/mlflow.db --workers 1 --host 127.0.0.1 --port 5000"
    assert command.endswith(f"mlflow ui {where}")
    place = f"/{tracker.page}?workflowType=machine_learning"
    assert page.strip() == f"then http://127.0.0.1:5000{place}"
    assert tracker.page.endswith(f"/runs/{tracker.run_id}")


@pytest.mark.parametrize("how", ["deleted", "purged"])
def test_a_run_that_was_deleted_goes_on_in_a_new_one(directory: Path, how: str) -> None:
    first = Tracker(directory, QUIET, "first")
    below = first.child("below")
    first.metrics(1, {"reward": 0.5}, 1000)
    first.finish("KILLED")
    client_of(first).delete_run(first.run_id)
    if how == "purged":
        with closing(sqlite3.connect(directory / "mlflow.db")) as store, store:
            store.execute("DELETE FROM metrics")
            store.execute("DELETE FROM latest_metrics")
            for table in ("tags", "runs"):
                store.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (first.run_id,))
    said: list[str] = []
    second = Tracker(directory, QUIET, "first", run_id=first.run_id, say=said.append)
    assert second.run_id != first.run_id
    assert said == [
        f"warning: MLflow at {second.uri} has no run {first.run_id} any longer: going on in a new one, {second.run_id}"
    ]
    child = second.child("below", below.run_id)
    second.metrics(1, {"reward": 0.5}, 1000)  # of the journal
    assert points_of(second, "reward") == [(1, 0.5)]
    assert client_of(second).get_run(child.run_id).data.tags["mlflow.parentRunId"] == second.run_id
    second.finish("FINISHED")
    assert client_of(second).get_run(second.run_id).info.status == "FINISHED"


def test_a_refused_call_is_an_error_with_a_name(directory: Path) -> None:
    tracker = Tracker(directory, QUIET, "first")
    with pytest.raises(TrackingError, match=r"artifact missing\.png failed: .*missing\.png"):
        tracker.artifact(directory / "missing.png")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_NEW_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_is_told_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 cannot be reached: .*refused"):
        Tracker(tmp_path, TrackingSettings(uri="http://127.0.0.1:9"), "first")
    assert time.monotonic() - started < 15


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_answer_is_told_in_time(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(TrackingError, match=r"cannot be reached: .*timed out"):
            Tracker(tmp_path, TrackingSettings(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), "first")
        assert time.monotonic() - started < 15


@pytest.mark.parametrize("uri", ["mlruns", "file:///runs", "http://", "sqlite:///", "localhost:5000"])
def test_a_uri_of_no_known_kind_is_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match="neither a server"):
        TrackingSettings(uri=uri)


def test_a_trials_store_is_its_sweeps_wherever_that_is(tmp_path: Path, empty_store: Path) -> None:
    trial, settings = tmp_path / "trials" / "a-seed0", TrackingSettings(parent="0" * 32)
    for directory in (trial, tmp_path / "records"):
        directory.mkdir(parents=True)
    for directory in (trial, tmp_path):
        shutil.copy(empty_store, directory / "mlflow.db")
    assert open_store(trial, settings).uri == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "records").rmdir()  # it stands alone
    assert open_store(trial, settings).uri == f"sqlite:///{trial}/mlflow.db"


def test_a_relative_database_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrackingSettings(uri="sqlite:///all.db")
    assert settings.uri == f"sqlite:///{tmp_path}/all.db"
    assert TrackingSettings.model_validate(settings.model_dump()) == settings


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2], "e": {}}


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Gate]:
    """The way to a server, which need not make its tables."""
    shutil.copy(empty_store, tmp_path / "server.db")
    with mlflow_server(tmp_path) as started:
        yield Gate(started).open()


def test_a_run_on_a_server_that_goes_away_and_comes_back(server: Gate, tmp_path: Path) -> None:
    settings = TrackingSettings(uri=server.uri, experiment="served")
    first = Tracker(tmp_path / "run", settings, "first")
    first.describe({"seed": 1}, {"kind": "test"})
    first.metrics(1, {"reward/mean": 0.1 + 0.2}, 1000)
    first.image("fixed", np.full((8, 8, 3), 200, np.uint8), 1)
    (tmp_path / "run" / "source.py").write_text("code")
    first.artifact(tmp_path / "run" / "source.py", "source")
    first.finish("KILLED")
    assert client_of(first).get_run(first.run_id).info.status == "KILLED"

    second = Tracker(tmp_path / "run", settings, "first", run_id=first.run_id)
    second.metrics(1, {"reward/mean": 0.1 + 0.2}, 1000)
    second.metrics(2, {"reward/mean": 0.4}, 2000)
    second.image("fixed", np.full((8, 8, 3), 200, np.uint8), 1)
    assert second.run_id == first.run_id
    assert points_of(second, "reward/mean") == [(1, 0.1 + 0.2), (2, 0.4)]
    assert len(client_of(second).list_artifacts(second.run_id, "images")) == 2  # the picture and its small copy
    assert [file.path for file in client_of(second).list_artifacts(second.run_id, "source")] == ["source/source.py"]
    assert second.open_command().startswith(f"{server.uri}/#/experiments/")

    second.finish("KILLED")
    server.shut()
    said: list[str] = []
    away = Tracker(tmp_path / "run", settings, "first", run_id=first.run_id, say=said.append)
    started = time.monotonic()
    away.metrics(3, {"reward/mean": 0.5}, 3000)
    away.image("fixed", np.full((8, 8, 3), 100, np.uint8), 3)
    assert time.monotonic() - started < 1
    away.finish("KILLED")
    assert time.monotonic() - started < 9
    assert f"MLflow at {server.uri} cannot be reached" in said[0]
    assert said[-1].endswith(f"deliver: ouroboros sync {tmp_path / 'run'}")

    server.open()
    for _ in range(2):
        assert deliver_rest(tmp_path / "run", settings, said.append, first.run_id) == 0
        assert points_of(first, "reward/mean") == [(1, 0.1 + 0.2), (2, 0.4), (3, 0.5)]
        assert len(client_of(first).list_artifacts(first.run_id, "images")) == 4
        assert client_of(first).get_run(first.run_id).info.status == "KILLED"


def test_a_new_database_begins_with_tables_that_were_made_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same as one that MLflow makes, also in what it says of places; a damaged template does no harm."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = []
    for name in ("north-of-here", "south-of-here"):
        (home := tmp_path / name).mkdir()
        monkeypatch.chdir(home)
        MlflowStore(f"sqlite:///{home / 'mlflow.db'}")
        with closing(sqlite3.connect(home / "mlflow.db")) as database:
            content.append([line.replace(name, "there") for line in database.iterdump()])
        assert [path.name for path in home.iterdir()] == ["mlflow.db"]
    (template,) = (tmp_path / "cache" / "ouroboros").iterdir()
    assert content[0] == content[1]
    template.write_bytes(b"damaged")
    store = MlflowStore(f"sqlite:///{tmp_path / 'third.db'}")
    assert [each.name for each in store.client.search_experiments()] == ["Default"]
