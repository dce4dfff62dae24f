"""The Ray that a run lives on: what is checked before it is started or joined, and what is ended with it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from orchestration.cluster import ray_cluster as cluster
from orchestration.cluster.ray_cluster import (
    _interrupted_afterwards,
    _is_rays,
    check_answers,
    environment,
    find_machine,
)
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import ConfigError, load_config


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_an_address_of_nobody_is_said_at_once_by_its_variables_name(monkeypatch: pytest.MonkeyPatch, mute: int) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.5)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"127.0.0.1:{mute}", "no.such.host.invalid:6379", "127.0.0.1:99999"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=rf"RAY_ADDRESS names the cluster {address}, but nothing answers there"):
            preflight_ddpo(load_config(DdpoConfig, None, []))


def test_what_is_no_head_of_ray_is_refused() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="what listens there is no head of a Ray cluster"):
            check_answers(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_that_ray_cannot_use_is_said_by_its_variables_name(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 60)
    long.mkdir()
    for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for place, message in ((long, "is too long for Ray's sockets"), (tmp_path / "missing", "no directory to write to")):
        monkeypatch.setenv(variable, str(place))
        with pytest.raises(ValueError, match=rf"{variable} {place}.* {message}|{variable} {place}: {message}"):
            find_machine("cpu")


def test_only_rays_processes_are_rays() -> None:
    import ray

    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(program) as stranger,
        subprocess.Popen([*program, f"{os.path.dirname(ray.__file__)}/core/src/ray/raylet/raylet"]) as rays,
    ):
        try:
            assert [_is_rays(psutil.Process(each.pid)) for each in (stranger, rays)] == [False, True]
        finally:
            stranger.kill()
            rays.kill()


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_USER", "theirs")
    with environment({"OF_THE_USER": "ours", "OF_OURS": "ours"}):
        assert (os.environ["OF_THE_USER"], os.environ["OF_OURS"]) == ("ours", "ours")
    assert os.environ["OF_THE_USER"] == "theirs"
    assert "OF_OURS" not in os.environ


def start_interrupted(times: int, done: list[str], ends: Exception | None = None) -> None:
    with _interrupted_afterwards():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        if ends:
            raise ends
        done.append("the rest of the start")


def test_a_first_interrupt_waits_for_rays_start_and_a_second_does_not() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        start_interrupted(1, done)
    assert done == ["the rest of the start"]
    with pytest.raises(KeyboardInterrupt) as stopped:
        start_interrupted(1, done, ConnectionError("a part of Ray ended with it"))
    assert isinstance(stopped.value.__cause__, ConnectionError)
    with pytest.raises(KeyboardInterrupt):
        start_interrupted(2, done)
    with pytest.raises(ConnectionError):
        start_interrupted(0, done, ConnectionError("Ray's own"))
    assert len(done) == 1
    start_interrupted(0, done)
    assert len(done) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
