"""Jobs on a real head that asks for a token: submitted, followed, stopped, resumed, listed, refused."""

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import chdir as working_directory
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.job_submission import JobDetails

from orchestration.cli import main as cli
from orchestration.cluster import jobs
from orchestration.cluster.jobs import packed
from orchestration.cluster.package import excludes
from orchestration.runs.config import ConfigError
from pipelines.storage.locations import CHECKOUT
from tests import prefork
from tests.network import Tunnel, free_port, listeners
from tests.processes import wait_until
from tests.test_config import command

TOKEN, PASSWORD = secrets.token_hex(32), secrets.token_hex(8)
GAUSSIAN = ["mad", "family=gaussian", "rule=fully_synthetic", "tracking.system_metrics=false", "n_ini=50"]
LONG = ["dimension=40", "n_synthetic=50", "seeds=500", "generations=40"]


@dataclass(frozen=True)
class Head:
    """A head as docs/jobs.md starts one, on ports of its own; ``runs`` is where its jobs put theirs."""

    process: psutil.Process
    port: int
    environment: dict[str, str]
    session: Path
    runs: Path

    def start(self, log: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """The command, as a client of this head."""
        address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.port}"}
        return subprocess.Popen(
            prefork.command("-m", "orchestration.cli", *words),
            env={**self.environment, **address, **environment},
            cwd=CHECKOUT,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """The command's exit code and output."""
        log = self.runs / "command.log"
        return self.start(log, *words, **environment).wait(300), log.read_text()

    def manifest(self, run: str) -> dict[str, Any]:
        return json.loads((self.runs / run / "manifest.json").read_text())

    def mlflow_status(self, run: str) -> str:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.runs / run / 'mlflow.db'}")
        return client.get_run(self.manifest(run)["mlflow_run_id"]).info.status


@pytest.fixture(scope="module")
def head(preloaded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    directory = tmp_path_factory.mktemp("head")
    (directory / "runs").mkdir()
    (directory / "token").write_text(TOKEN)
    python = directory / "python"  # a job's driver is a fork as well
    python.write_text(f'#!/bin/sh\nexec {shlex.join(prefork.command())} "$@"\n')
    python.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "MLFLOW_TRACKING_USERNAME": "somebody",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PATH": f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = {name: free_port() for name in names}
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # the path of a socket has 107 characters at most
        process = psutil.Popen(
            [
                *prefork.command("-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
                *(f"--{name}={port}" for name, port in ports.items()),
                f"--temp-dir={short}",
            ],
            env={**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            stdout=(directory / "head.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        found = Head(process, ports["dashboard-port"], environment, Path(short), directory / "runs")
        try:
            wait_until(lambda: found.run("jobs", "list") == (0, "no jobs\n"), 240, "the head answers")
            yield found
        finally:
            for member in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()


def test_a_job_is_followed_through_a_lost_connection(head: Head, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--output-root", str(head.runs), "--", *GAUSSIAN, "n_synthetic=50", "generations=5", "seeds=2"]
    tunnel = Tunnel(head.port)
    with tunnel:
        address = f"http://127.0.0.1:{tunnel.port}"
        follower = head.start(log, "submit", *words, RAY_API_SERVER_ADDRESS=address)
        wait_until(
            lambda: "Running entrypoint" in log.read_text() or follower.poll() is not None, 240, "the job starts"
        )
    wait_until(lambda: "trying again" in log.read_text(), 10, "the loss is told")
    with tunnel:
        assert follower.wait(300) == 0
    text = log.read_text()
    assert re.fullmatch(r"package: \d+ files, [\d.]+ MB", text.splitlines()[0])
    assert "connected again" in text
    assert [int(step) for step in re.findall(r"^generation (\d+)/5", text, re.MULTILINE)] == [1, 2, 3, 4, 5]
    (run,) = re.findall(r"^job (mad-mad-\d{8}-\d{6}), its run in ", text, re.MULTILINE)
    assert head.manifest(run)["status"] == "FINISHED"


def test_a_configuration_that_the_cluster_cannot_run_is_told_by_the_exit_code(head: Head) -> None:
    arguments = ["mad", "family=gan", "n_ini=20", "n_synthetic=20", "data.source=/no/such/images"]
    code, text = head.run("submit", "--id", "wrong", "--output-root", str(head.runs), "--", *arguments)
    assert code == 2
    assert text.splitlines()[-1].startswith("ouroboros: /no/such/images: no images")
    assert not (head.runs / "wrong").exists()


def test_stop_closes_the_run_and_resume_ends_it(head: Head, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--id", "long", "--output-root", str(head.runs), "--", *GAUSSIAN, *LONG]
    follower = head.start(log, "submit", *words)
    wait_until(lambda: "generation  2/" in log.read_text() or follower.poll() is not None, 240, "two generations")
    code, text = head.run("jobs", "stop", "long")
    assert (code, text) == (0, "long is stopped; go on with: ouroboros jobs resume long\n")
    assert follower.wait(30) == jobs.INTERRUPTED
    killed = head.manifest("long")
    assert killed["status"] == head.mlflow_status("long") == "KILLED"
    assert 2 <= killed["committed_step"] < killed["total_steps"]

    code, text = head.run("jobs", "resume", "long", "--id", "longer")
    assert code == 0, text
    finished = head.manifest("long")
    assert finished["status"] == head.mlflow_status("long") == "FINISHED"
    assert finished["mlflow_run_id"] == killed["mlflow_run_id"]
    listed = [job for job in json.loads(head.run("jobs", "list", "--json")[1]) if job["job"].startswith("long")]
    assert [(job["job"], job["status"]) for job in listed] == [("longer", "SUCCEEDED"), ("long", "STOPPED")]
    assert {job["run"] for job in listed} == {str(head.runs / "long")}
    assert all(0 < job["seconds"] < 1000 and job["started"] < job["ended"] for job in listed)
    assert head.run("jobs", "logs", "long")[1] in log.read_text()


def test_nobody_else_is_let_in_or_told(head: Head, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("another-token-0123456789")
    (tmp_path / "none").write_text("")
    for words, environment, told in (
        (("list",), {"RAY_AUTH_MODE": "disabled"}, "asks for a token: set RAY_AUTH_MODE=token"),
        (("list",), {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, "refuses this token"),
        (("list",), {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "there is no token here"),
        (("list", "--address", "http://127.0.0.1:9"), {}, "does not answer"),
        (("logs", "nobody"), {}, "nobody does not exist; see 'ouroboros jobs list'"),
        (("resume", "nobody"), {}, "nobody does not exist"),
    ):
        code, text = head.run("jobs", *words, **environment)
        assert code in (1, 2)
        assert told in text
        assert len(text.splitlines()) == 1
    code, text = head.run("doctor", "--address", f"http://127.0.0.1:{head.port}")
    assert f"ok   Ray at http://127.0.0.1:{head.port} takes this token" in text.splitlines()
    assert {address for address, _ in listeners(head.process)} == {"127.0.0.1"}


def test_no_secret_is_written_down(head: Head) -> None:
    """After all of the above: neither what Ray logs nor what the runs leave has the token or MLflow's password."""
    written = [path for root in (head.session, head.runs) for path in root.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-") for path in written)
    assert any(path.name == "mlflow.db" for path in written)
    kept = (TOKEN.encode(), PASSWORD.encode())
    assert [path for path in written if any(secret in path.read_bytes() for secret in kept)] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mad", "n_inni=3"], "unknown key 'n_inni'; did you mean 'n_ini'?"),
        (["ddpo", "training.steps=0"], r"training\.steps: "),
        (["sweep", "search=everything"], "search: "),
        (["generate", "models/digits"], "a job runs ddpo, mad, study, sweep or resume, not 'generate'"),
        (["resume", "runs/one"], "RUN 'runs/one' would lie in the directory that Ray removes"),
        (["ddpo", "output_dir=runs/one"], "output_dir 'runs/one' would lie"),
        (["ddpo", "tracking.uri=sqlite:///mlflow.db"], r"tracking\.uri 'mlflow\.db' would lie"),
        (["mad", "tracking.uri=http://me:secret@host:5000"], "MLFLOW_TRACKING_PASSWORD"),
        (["ddpo", "--config", "/dev/null"], "/dev/null is not a file that a job gets"),
    ],
)
def test_what_can_be_known_here_is_refused_here(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    with pytest.raises(ConfigError, match=told) as refusal:
        cli.submit(words, address="http://127.0.0.1:9")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("job", ["../version", "..", "x" * 300, "a b", "a/b", "", "ø" * 101, "a\x1b[2J"])
@pytest.mark.parametrize("words", [["logs"], ["stop"], ["resume"], ["resume", "one", "--id"], ["submit", "--id"]])
def test_what_is_no_id_reaches_no_server(
    words: list[str], job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "connect", lambda address: pytest.fail("it was asked"))
    whole = [*words, job, "--", "mad"] if words[0] == "submit" else ["jobs", *words, "--", job]
    if "--id" in words and words[0] != "submit":
        whole = ["jobs", *words, job]
    assert command(whole, monkeypatch) == 2
    message = capsys.readouterr().err
    assert "is no job's id" in message
    assert "\x1b" not in message


def test_what_ray_would_wait_for_or_follow_is_named_and_left_out(tmp_path: Path) -> None:
    from ray._private.runtime_env import packaging

    tree = tmp_path / "tree"
    (tree / "orchestration" / "cli").mkdir(parents=True)
    (tree / "orchestration" / "cli" / "main.py").write_text("cli")
    (tmp_path / "secret").write_text("of another place")
    os.mkfifo(tree / "pipe")
    os.mkfifo(tree / "ignored")
    (tree / ".gitignore").write_text("/ignored\n")
    with socket.socket(socket.AF_UNIX) as listener, working_directory(tree):
        listener.bind("a socket")
    for name, target in {
        "loop": ".",
        "up": "../..",
        "folder [1]": "orchestration",
        "out": "../secret",
        "to itself": "to itself",
        "nothing": "gone",
        "line\nbreak": "../secret",
        "inside": "orchestration/cli/main.py",
    }.items():
        (tree / name).symlink_to(target)
    (tree / os.fsdecode(b"caf\xe9")).write_text("not UTF-8")
    files, left_out = packed(tree)
    assert {str(path) for path in files} == {".gitignore", "inside", "orchestration/cli/main.py"}
    assert {os.fsencode(path): reason for path, reason in left_out.items()} == {
        b"pipe": "neither a file nor a directory",
        b"a socket": "neither a file nor a directory",
        b"loop": "a link to a directory",
        b"up": "a link to a directory",
        b"folder [1]": "a link to a directory",
        b"out": "a link out of the tree",
        b"to itself": "a link to nothing",
        b"nothing": "a link to nothing",
        b"line\nbreak": "a link out of the tree",
        b"caf\xe9": "its name is not UTF-8",
    }
    target = tmp_path / "package.zip"
    packaging.get_uri_for_directory(str(tree), include_gitignore=True, excludes=excludes(left_out))
    packaging._zip_files(str(tree), excludes(left_out), str(target), include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        assert set(package.namelist()) == {".gitignore", "inside", "orchestration/cli/main.py"}


def test_jobs_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def job(name: str, status: str, **times: int) -> JobDetails:
        about: Any = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": name, "status": status, **times}
        return JobDetails(**about, metadata={"run": f"/runs/{'long-' * 50}{name}"})

    known = [job("one", "SUCCEEDED", start_time=1_700_000_000_125, end_time=1_700_000_090_250), job("two", "PENDING")]
    monkeypatch.setattr(jobs, "connect", lambda _: SimpleNamespace(list_jobs=lambda: known))
    assert command(["jobs", "list", "--json"], monkeypatch) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["job"], first["status"], first["seconds"]) == ("one", "SUCCEEDED", 90.125)
    assert datetime.fromisoformat(first["started"]).timestamp() == 1_700_000_000.125
    assert (second["started"], second["seconds"]) == (None, None)
    assert command(["jobs", "list"], monkeypatch) == 0
    _, row, waiting = capsys.readouterr().out.splitlines()
    assert row.split()[:2] + row.split()[4:] == ["one", "SUCCEEDED", "1m30s", f"/runs/{'long-' * 50}one"]
    assert waiting.split()[:4] == ["two", "PENDING", "–", "–"]


def test_an_address_is_no_place_for_a_password() -> None:
    with pytest.raises(ConfigError, match="may hold no user and password") as refusal:
        jobs.connect("http://me:secret@127.0.0.1:9")
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match="is not the address of a job server, such as http"):
        jobs.connect("127.0.0.1:6379")


def test_a_package_is_the_working_tree_without_what_git_ignores_and_junk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    kept = ["configs/one.yaml", "orchestration/cli/main.py", "policies/runs/one.py", "pyproject.toml"]
    left_out = [
        "data/big",
        "runs/one/mlflow.db",
        ".venv/bin/python",
        ".git/HEAD",
        ".env",
        "__pycache__/one.pyc",
    ]
    for name in [*kept, *left_out]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / ".gitignore").write_text("data/\n")
    files, left_out_and_said = packed(tree)
    assert not left_out_and_said
    assert {str(path): size for path, size in files.items()} == {".gitignore": 6} | {name: len(name) for name in kept}

    monkeypatch.setattr(jobs, "_LIMIT", 50)
    with pytest.raises(
        ConfigError, match=r"has 0\.0 MB, .* the largest parts: orchestration 0\.0 MB, policies .*\.gitignore"
    ):
        packed(tree)
    with pytest.raises(ConfigError, match="is no checkout"):
        packed(tree / "policies")
