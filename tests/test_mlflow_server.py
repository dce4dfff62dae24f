"""``ouroboros mlflow``: a real server over its port, ended with its children; no password in an address."""

import importlib.util
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pydantic import ValidationError

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.planning.doctor import Finding, examine
from orchestration.runs.config import ConfigError, load_config
from orchestration.tracking.server import serve
from orchestration.tracking.store import TrackingError, check_server
from orchestration.tracking.tracker import Tracker, TrackingSettings
from tests.network import free_port, listeners
from tests.processes import start, wait_until

pytestmark = pytest.mark.usefixtures("preloaded")  # psutil has to see forks at their place


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    address: str
    directory: Path
    log: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("mlflow")
    port, log = free_port(), directory / "log"
    process = start(["mlflow", "--directory", str(directory / "store"), "--port", str(port)], log)
    found = Served(process, f"http://127.0.0.1:{port}", directory / "store", log)
    try:
        wait_until(lambda: answers(found.address) or process.poll() is not None, 90, "the server answers")
        assert f"MLflow at {found.address}, in {found.directory}" in log.read_text()
        yield found
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    with suppress(TrackingError):
        check_server(address, seconds=2)
        return True
    return False


def test_it_takes_artifacts_for_clients_that_share_no_disk(served: Served, tmp_path: Path) -> None:
    settings = TrackingSettings(uri=served.address, experiment="served", system_metrics=False)
    tracker = Tracker(tmp_path / "run", settings, "first")
    (tmp_path / "run" / "source.py").write_text("code")
    tracker.artifact(tmp_path / "run" / "source.py", "source")
    tracker.finish("FINISHED")
    from mlflow import MlflowClient

    run = MlflowClient(served.address).get_run(tracker.run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    (stored,) = (served.directory / "artifacts").rglob("source/*")
    assert stored.read_text() == "code"
    assert served.directory.stat().st_mode & 0o077 == 0  # whoever shares the machine does not read it


def test_it_is_for_this_machine(served: Served) -> None:
    process = psutil.Process(served.process.pid)
    assert {place for place, _ in listeners(process)} == {"127.0.0.1"}
    assert len(process.children(recursive=True)) <= 3  # one worker, and nothing that runs jobs
    stranger = urllib.request.Request(f"{served.address}/api/2.0/mlflow/experiments/search?max_results=1")
    stranger.add_header("Host", "elsewhere.example")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(stranger, timeout=10)


def test_the_doctor_writes_to_it_and_cleans_up(served: Served) -> None:
    assert Finding(f"MLflow at {served.address} takes runs and artifacts") in list(examine(None, served.address, None))
    from mlflow import MlflowClient

    client = MlflowClient(served.address)
    experiment = client.get_experiment_by_name("ouroboros-doctor")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []


def test_what_cannot_be_served_is_refused(served: Served, tmp_path: Path) -> None:
    def refusal(host: str, port: int) -> str:
        with pytest.raises(ConfigError) as caught:
            serve(tmp_path / "other", host, port, None, None, basic_auth=False)
        return str(caught.value)

    assert refusal("127.0.0.1", int(served.address.rsplit(":", 1)[1])).endswith(
        "Address already in use; choose another"
    )
    assert refusal("0.0.0.0", free_port()) == "--host 0.0.0.0 lets the whole network read and write: add --basic-auth"
    assert "choose another" in refusal("203.0.113.1", free_port())
    assert not (tmp_path / "other").exists()


def test_no_public_password_guards_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "auth.ini"

    def refusal(admin_password: str | None, configured: str | None) -> str:
        for name, value in (("ADMIN_PASSWORD", admin_password), ("CONFIG_PATH", configured and str(settings))):
            monkeypatch.setenv(f"MLFLOW_AUTH_{name}", value or "")
        settings.write_text(f"[mlflow]\nadmin_password = {configured}\n")
        with pytest.raises(ConfigError) as caught:
            serve(tmp_path / "other", "127.0.0.1", free_port(), None, None, basic_auth=True)
        return str(caught.value)

    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it would have started"))
    assert "set MLFLOW_AUTH_ADMIN_PASSWORD" in refusal(None, None)
    assert "set MLFLOW_AUTH_ADMIN_PASSWORD" in refusal("password1234", None)
    assert "is public" in refusal("my own", "password1234")
    settings.unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    (tmp_path / "server" / "auth").mkdir(parents=True)
    (tmp_path / "server" / "auth" / "basic_auth.ini").write_text("[mlflow]\nadmin_password = password1234\n")
    assert "install a newer MLflow" in refusal("my own", None)
    assert not (tmp_path / "other").exists()


def test_a_stores_password_is_in_no_list_of_processes(tmp_path: Path) -> None:
    store = {"MLFLOW_BACKEND_STORE_URI": "unknown://somebody:secret@127.0.0.1/mlflow"}
    words = ["mlflow", "--directory", str(tmp_path), "--port", str(free_port())]
    process, seen = start(words, tmp_path / "log", {**os.environ, **store}), set[str]()

    def is_over() -> bool:
        with suppress(psutil.Error):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            seen.update(word for member in family for word in member.cmdline())
        return process.poll() is not None

    wait_until(is_over, 90, "it gives up")
    assert process.returncode
    assert "unknown" in (tmp_path / "log").read_text()
    assert "server" in seen
    assert "secret" not in " ".join(seen)


def test_it_ends_with_its_children(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert family
    served.process.send_signal(signal.SIGINT)
    served.process.wait(20)
    assert psutil.wait_procs(family, timeout=5)[1] == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(served.address.rsplit(":", 1)[1])), timeout=5)


@pytest.mark.parametrize("uri", ["http://me:secret@127.0.0.1:5000", "postgresql://me:secret@127.0.0.1/mlflow"])
def test_a_password_in_a_tracking_address_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refusal:
        load_config(DdpoConfig, None, [f"tracking.uri={uri}"])
    assert "secret" not in str(refusal.value)
    with pytest.raises(ValidationError) as error:
        TrackingSettings(uri=uri)
    assert "secret" not in str(error.value)
