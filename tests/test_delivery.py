"""What is delivered, and what never is: a stranger's outbox, artifacts that cannot go, a server that fails."""

import datetime
import ipaddress
import json
import math
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestration.tracking import outbox
from orchestration.tracking import tracker as tracking
from orchestration.tracking.outbox import Content
from orchestration.tracking.store import TrackingError, check_server
from orchestration.tracking.tracker import Tracker, TrackingSettings, deliver_rest
from tests.scripted_mlflow import Answer, ScriptedMlflow, scripted_mlflow

QUIET = TrackingSettings(system_metrics=False)


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> Path:
    """The directory of a run."""
    (tmp_path / "run").mkdir()
    shutil.copy(empty_store, tmp_path / "run" / "mlflow.db")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(tracking, "_GOODBYE_SECONDS", 20.0)  # of a busy machine
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def client(directory: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")


def refusals(directory: Path) -> list[Content]:
    with closing(sqlite3.connect(directory / "outbox" / "records.db")) as database:
        found = database.execute("SELECT content, why FROM records WHERE state = 'refused' ORDER BY number").fetchall()
    return [json.loads(content) | {"why": why} for content, why in found]


def slip_in(directory: Path, *records: Content) -> None:
    """Put records into an outbox as a stranger could."""
    with closing(sqlite3.connect(directory / "outbox" / "records.db")) as database, database:
        rows = [(json.dumps(each), each["kind"] in ("image", "artifact")) for each in records]
        database.executemany("INSERT INTO records (content, has_files) VALUES (?, ?)", rows)


def stored(directory: Path) -> set[str]:
    """Artifacts in the run's own store, by their paths in MLflow's run."""
    files = [path for path in (directory / "artifacts").rglob("*") if path.is_file()]
    return {path.relative_to(directory / "artifacts").as_posix().split("/", 2)[2] for path in files}


@pytest.fixture
def stranger(run: Path, tmp_path: Path) -> tuple[Path, str]:
    """A stranger's run and its id in MLflow. Links lie about in it, and beside it a private file."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.png").write_text("private")
    tracker = Tracker(run, QUIET, "first")
    tracker.finish("KILLED")
    for name in ("link", "outbox/link.png"):
        (run / name).symlink_to(tmp_path / "secret" / "key.png")
    (run / "linked").symlink_to(tmp_path / "secret")
    (run / "itself").symlink_to(run)
    for folder, target in (("of_files", "key.png"), ("of_folders", ".")):
        (run / folder / "deep").mkdir(parents=True)
        (run / folder / "deep" / "x").symlink_to(tmp_path / "secret" / target)
    os.mkfifo(run / "pipe")
    (run / "fine").write_text("fine")
    return run, tracker.run_id


def artifact(path: str, under: str = "") -> Content:
    return {"kind": "artifact", "path": path, "under": under}


@pytest.mark.parametrize(
    "record",
    [
        *map(
            artifact, ["link", "linked", "linked/key.png", "of_files", "of_folders", "pipe", "itself", ".", "missing"]
        ),
        *map(artifact, ["/etc/passwd", "../secret/key.png", "fine/../../secret", "", "itself/../secret/key.png"]),
        artifact("fine", "../elsewhere"),
        artifact("fine", "/tmp"),
        {"kind": "image", "files": ["link.png"]},
        {"kind": "image", "files": ["../fine.png"]},
        {"kind": "image", "files": ["../../secret/key.png"]},
        {"kind": "image", "files": ["records.db"]},
        {"kind": "uri"},
        {"kind": "client", "path": "x"},
        {"kind": "log", "entities": []},
    ],
    ids=str,
)
def test_a_strangers_outbox_sends_and_removes_nothing_of_ours(
    stranger: tuple[Path, str], tmp_path: Path, record: Content
) -> None:
    directory, mine = stranger
    slip_in(directory, {"run": mine, **record}, {"run": mine, **artifact("fine")})
    said: list[str] = []
    assert deliver_rest(directory, QUIET, said.append, mine) == 1
    assert stored(directory) == {"fine"}
    assert [path.name for path in (tmp_path / "secret").iterdir()] == ["key.png"]
    assert (directory / "outbox" / "link.png").is_symlink()
    (refused,) = refusals(directory)
    assert refused["kind"] == record["kind"]
    assert refused["why"] in said[0]


def test_only_the_run_and_those_below_it_are_written_to(run: Path) -> None:
    other = Tracker(run, QUIET, "another's")
    other.finish("FINISHED")
    first = Tracker(run, QUIET, "first")
    below = first.child("below").child("below that")
    first.finish("KILLED")
    slip_in(run, *({"run": each.run_id, "kind": "tags", "tags": {"written": "yes"}} for each in (other, below, first)))
    said: list[str] = []
    assert deliver_rest(run, QUIET, said.append, first.run_id) == 1
    written = [each for each in (other, below, first) if "written" in client(run).get_run(each.run_id).data.tags]
    assert written == [below, first]
    assert f"the run {other.run_id} is not the one of {run}, nor below it" in said[0]


def test_a_strangers_database_cannot_say_where_artifacts_go(run: Path, tmp_path: Path) -> None:
    tracker = Tracker(run, QUIET, "first")
    tracker.finish("KILLED")
    with sqlite3.connect(run / "mlflow.db") as store:
        store.execute("UPDATE runs SET artifact_uri = ?", ((tmp_path / "home").as_uri(),))
        store.execute("UPDATE experiments SET artifact_location = 's3://theirs/bucket'")
    (run / "authorized_keys").write_text("theirs")
    again = Tracker(run, QUIET, "first", tracker.run_id)
    again.artifact(run / "authorized_keys")
    again.finish("FINISHED")
    assert not (tmp_path / "home").exists()
    assert stored(run) == {"authorized_keys"}


@pytest.mark.parametrize("place", ["artifacts", "mlflow.db"])
def test_a_store_behind_a_link_is_refused(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "mine").mkdir()
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(tmp_path / "mine")
    with pytest.raises(TrackingError, match=f"{place} is a link"):
        Tracker(run, QUIET, "first")
    assert not list((tmp_path / "mine").iterdir())


def test_a_database_that_is_none_is_named(run: Path) -> None:
    (run / "mlflow.db").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db cannot be used: file is not a database"):
        Tracker(run, QUIET, "first")


def test_a_moved_run_takes_its_artifacts_along(run: Path, tmp_path: Path) -> None:
    import numpy as np

    (run / "pipeline").mkdir()
    (run / "pipeline" / "weights").write_text("w")
    first = Tracker(run, QUIET, "first")
    first.artifact(run / "pipeline")
    first.drain()
    version = tracking.open_store(run, QUIET).register("model", first.run_id, "pipeline", "best", {})
    first.finish("KILLED")
    moved = tmp_path / "else where"
    run.rename(moved)
    second = Tracker(moved, QUIET, "first", first.run_id)
    second.image("samples", np.zeros((8, 8, 3), np.uint8), 1)
    (moved / "late").write_text("late")
    second.artifact(moved / "late")
    second.finish("FINISHED")
    assert not run.exists()
    assert {name for name in stored(moved) if not name.startswith("images")} == {"pipeline/weights", "late"}
    assert f"sqlite:///{moved}/mlflow.db" in second.open_command().replace("'", "")
    uri = client(moved).get_model_version_download_uri("model", version.rpartition("/")[2])
    assert uri == f"{moved.as_uri()}/artifacts/{first.run_id}/artifacts/pipeline"
    shown = [found.path for found in client(moved).list_artifacts(first.run_id)]
    assert shown == ["images", "late", "pipeline"]
    moved.rename(run)
    assert deliver_rest(run, QUIET, print, first.run_id) == 0  # as 'ouroboros sync' does
    assert client(run).get_run(first.run_id).info.artifact_uri == f"{run.as_uri()}/artifacts/{first.run_id}/artifacts"


def test_an_artifact_that_cannot_go_holds_up_no_number(run: Path) -> None:
    (run / "artifacts").write_text("in the way")
    said: list[str] = []
    tracker = Tracker(run, QUIET, "first", say=said.append)
    (run / "page.html").write_text("page")
    for step in range(1, 4):
        tracker.metrics(step, {"reward": step / 10}, step)
        tracker.artifact(run / "page.html", str(step))
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 10
    found = client(run).get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert [point.step for point in client(run).get_metric_history(tracker.run_id, "reward")] == [1, 2, 3]
    assert [each["under"] for each in refusals(run)] == ["1", "2", "3"]
    assert "artifact failed" in said[0]
    assert said[-1] == f"3 records could not be delivered; again: ouroboros sync {run}"
    (run / "artifacts").unlink()
    assert deliver_rest(run, QUIET, said.append, tracker.run_id) == 0
    assert stored(run) == {"1/page.html", "2/page.html", "3/page.html"}


def test_a_run_that_is_deleted_meanwhile_is_said_once(run: Path) -> None:
    said: list[str] = []
    tracker = Tracker(run, QUIET, "first", say=said.append)
    assert tracker.drain()
    client(run).delete_run(tracker.run_id)
    tracker.many_metrics([(step, {"a": 1.0, "b": 2.0}, step) for step in range(300)])
    tracker.describe({"a": 1}, {})
    tracker.finish("FINISHED")
    assert len(refusals(run)) == 302
    assert f"the run {tracker.run_id} was deleted" in said[0]
    assert said[1:] == [f"302 records could not be delivered; again: ouroboros sync {run}"]


def test_of_a_description_only_what_mlflow_refuses_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    log = MlflowClient.log_batch

    def picky(self: Any, run_id: str, **content: Any) -> None:
        if any(entity.key == "bad" for entities in content.values() for entity in entities):
            raise MlflowException.invalid_parameter_value("bad name")
        log(self, run_id, **content)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracker = Tracker(run, QUIET, "first")
    tracker.describe({"good": 1, "bad": 2, "better": 3}, {"tag": "t", "bad": "x"})
    tracker.metrics(1, {"fine": 1.0, "bad": 2.0, "finer": 3.0}, 1)
    tracker.metrics(2, {"fine": 2.0}, 2)
    tracker.finish("FINISHED")
    data = client(run).get_run(tracker.run_id).data
    assert data.params == {"good": "1", "better": "3"}
    assert data.tags["tag"] == "t"
    assert data.metrics == {"fine": 2.0, "finer": 3.0}
    assert [each["kind"] for each in refusals(run)] == ["describe", "metrics"]


def test_names_and_numbers_that_mlflow_knows_none_of(run: Path) -> None:
    names = ["a//b", "../a", "/a", "a/..", ".", "", "é", "é é", "A", "a", "a?b", "a*b", "x" * 300, "x" * 299 + "y"]
    tracker = Tracker(run, QUIET, "first")
    tracker.describe({name: number for number, name in enumerate(names)}, dict.fromkeys(names, "\ud800\x01"))
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "tiny": 5e-324, "large": 1.7e308}
    tracker.metrics(-(2**63), values, 0)
    tracker.metrics(2**63 - 1, values, 2**62)
    tracker.metrics(2**63, values, 1)
    tracker.finish("FINISHED")
    data = client(run).get_run(tracker.run_id).data
    assert sorted(int(value) for value in data.params.values()) == list(range(len(names)))
    assert len({key.casefold() for key in data.params}) == len(names)
    assert set(data.metrics) == set(values)
    assert math.isnan(data.metrics["nan"])
    assert [each["step"] for each in refusals(run)] == [2**63]


@pytest.fixture
def fake() -> Iterator[ScriptedMlflow]:
    with scripted_mlflow() as server:
        yield server


@pytest.fixture
def served(fake: ScriptedMlflow) -> TrackingSettings:
    return TrackingSettings(uri=fake.uri, system_metrics=False)


def once(*answers: Answer, of: str) -> Callable[[str, Any], Answer | None]:
    left = list(answers)
    return lambda path, content: left.pop(0) if path.endswith(of) and left else None


HTML, DROPPED = (502, b"<html>bad gateway</html>"), (0, b"")


@pytest.mark.parametrize(
    "answer", [DROPPED, HTML, (200, b"<html>log in</html>"), (429, b"slow down"), (503, b"")], ids=str
)
@pytest.mark.parametrize("call", ["/health", "experiments/get-by-name", "runs/create", "runs/get"])
def test_a_start_outlives_an_answer_that_does_not_come(
    fake: ScriptedMlflow, served: TrackingSettings, tmp_path: Path, answer: Answer, call: str
) -> None:
    said: list[str] = []
    fake.spoil = once(answer, of=call)
    tracker = Tracker(tmp_path / "run", served, "first", say=said.append)
    tracker.finish("FINISHED")
    assert list(fake.runs) == [tracker.run_id]
    assert fake.status(tracker.run_id) == "FINISHED"
    passes = call == "runs/get" or (call == "/health" and answer[0] in (200, 429))
    # Once it has started, its deliveries may say that they were not answered.
    assert sum("trying again for 20 seconds" in text for text in said) == (0 if passes else 1)


def test_a_run_that_was_made_though_the_answer_was_lost_is_not_made_again(
    fake: ScriptedMlflow, served: TrackingSettings, tmp_path: Path
) -> None:
    def lose(path: str, content: Any) -> Answer | None:
        if path != "runs/create" or fake.runs:
            return None
        fake.answer("POST", "/mlflow/runs/create", content)
        return DROPPED

    fake.spoil = lose
    tracker = Tracker(tmp_path / "run", served, "first")
    tracker.finish("FINISHED")
    assert list(fake.runs) == [tracker.run_id]


@pytest.mark.parametrize(
    ("answer", "waits"),
    [
        ((413, b"<html>too large</html>"), False),
        ((400, json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}).encode()), False),
        ((500, json.dumps({"error_code": "INTERNAL_ERROR", "message": "oh"}).encode()), False),
        ((200, b"<html>log in</html>"), False),
        (DROPPED, False),
        ((401, b"who are you?"), True),
        ((403, b"not you"), True),
        ((429, b"slow down"), True),
    ],
    ids=str,
)
def test_a_server_that_fails_at_one_record_or_for_a_while(
    fake: ScriptedMlflow, served: TrackingSettings, tmp_path: Path, answer: Answer, waits: bool
) -> None:
    """What is answered to one record alone sets it aside; what is answered to all, for a while, loses nothing."""
    said: list[str] = []
    tracker = Tracker(tmp_path / "run", served, "first", say=said.append)
    until = time.monotonic() + 0.5

    def spoil(path: str, content: Any) -> Answer | None:
        steps = [point["step"] for point in content.get("metrics", [])] if path == "runs/log-batch" else []
        return answer if (time.monotonic() < until if waits else 7 in steps) else None

    fake.spoil = spoil
    tracker.many_metrics([(step, {"reward": step / 10}, step) for step in range(20)])
    tracker.finish("FINISHED")
    told = sorted({step for _, step, _ in fake.metrics[tracker.run_id]})
    assert told == [step for step in range(20) if waits or step != 7]
    assert [each["step"] for each in refusals(tmp_path / "run")] == ([] if waits else [7])
    assert fake.status(tracker.run_id) == "FINISHED"
    assert len(said) == len(set(said)) <= 4


def test_artifacts_that_a_server_cannot_store_wait_and_numbers_go_on(
    fake: ScriptedMlflow, served: TrackingSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    tracker = Tracker(tmp_path / "run", served, "first", say=said.append)
    fake.spoil = lambda path, content: (500, b"disk full") if "mlflow-artifacts" in path else None
    (tmp_path / "run" / "page.html").write_text("page")
    tracker.artifact(tmp_path / "run" / "page.html")
    tracker.metrics(1, {"reward": 0.5}, 1)
    tracker.finish("FINISHED")
    assert fake.metrics[tracker.run_id] == [("reward", 1, 0.5)]
    assert fake.status(tracker.run_id) == "FINISHED"
    assert said[-1] == f"1 records wait for MLflow; deliver: ouroboros sync {tmp_path / 'run'}"
    fake.spoil = lambda path, content: None
    assert deliver_rest(tmp_path / "run", served, said.append, tracker.run_id) == 0
    assert [name.rpartition("/")[2] for name in fake.files] == ["page.html"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private certificate of 127.0.0.1, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = (
        builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(1)).add_extension(alternative, False)
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS"])
@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_a_server_is_reached_as_mlflows_own_client_reaches_it(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with scripted_mlflow(certificate) as fake:
        with pytest.raises(TrackingError, match=r"certificate verify failed.*MLFLOW_TRACKING_SERVER_CERT_PATH"):
            check_server(fake.uri)
        monkeypatch.setenv(name, str(certificate) if name.endswith("PATH") else "true")
        tracker = Tracker(tmp_path / "run", TrackingSettings(uri=fake.uri, system_metrics=False), "first")
        tracker.finish("FINISHED")
        assert fake.status(tracker.run_id) == "FINISHED"


def test_a_proxy_in_the_way_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"through the proxy 127\.0\.0\.1:9 of the environment") as error:
        check_server("http://tracking.example:5000")
    assert "secret" not in str(error.value)


def test_addresses_are_the_configurations(fake: ScriptedMlflow, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule: neither variable of MLflow's takes a run or a model elsewhere."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fake.uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", fake.uri)
    tracker = Tracker(run, QUIET, "first")
    (run / "pipeline").write_text("p")
    tracker.artifact(run / "pipeline")
    tracker.finish("FINISHED")
    tracking.open_store(run, QUIET).register("model", tracker.run_id, "", "best", {})
    assert fake.calls == []
