"""Who can reach a run, and what it reports: nothing that a Ray of its own starts listens or calls beyond loopback."""

import contextlib
import ctypes
import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

from pipelines.storage.locations import CHECKOUT
from tests.network import family, listeners, ports
from tests.processes import start

REPORTS = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}


def beyond(process: psutil.Process) -> set[tuple[str, int]]:
    return {(place, port) for place, port in listeners(process) if not ipaddress.ip_address(place).is_loopback}


def test_a_default_run_listens_on_loopback_alone_and_reports_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", *REPORTS}}
    words = ["mad", "n_ini=20", "n_synthetic=20", "generations=3", f"output_dir={tmp_path / 'run'}"]
    run = start(words, log, environment, afresh=True)
    seen: set[tuple[str, int]] = set()
    reports: set[tuple[str | None, ...]] = set()
    try:
        process = psutil.Process(run.pid)
        deadline = time.monotonic() + 90
        while run.poll() is None and time.monotonic() < deadline:
            taken, called = ports(parts := family(process))
            seen |= taken
            assert all(ipaddress.ip_address(place).is_loopback for place in called | {place for place, _ in taken})
            for part in parts[1:]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if "RAY_AUTH_TOKEN" in (held := part.environ()):
                        reports.add(tuple(map(held.get, REPORTS)))
            time.sleep(0.1)
        assert run.poll() == 0, log.read_text()
    finally:
        run.kill()
    assert len(seen) > 5  # Ray's servers and workers were looked at
    # For its own agent's usual port a second Ray would wait.
    assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT not in {port for _, port in seen}
    assert reports == {tuple(REPORTS.values())}


def test_a_ray_of_ones_own_does_too_and_leaves_sigterm_alone(ray_session: None) -> None:
    """In this process Ray was imported long before anybody knew that it would be a private one."""
    assert len(listeners(psutil.Process())) > 5
    assert not beyond(psutil.Process())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_ray_of_ones_own_has_a_token_of_its_own_and_ends_only_itself(tmp_path: Path) -> None:
    """Its token is in no file; a process that was started meanwhile goes on; a part of it that is lost is named."""
    program = """
import os, subprocess, sys, time, psutil
from orchestration.cluster import ray_cluster as cluster
from orchestration.cluster.ray_cluster import _name_of, _parts, connected
cluster._GRACE_SECONDS = 1
with connected(0):
    import ray
    seen = ray.get(ray.remote(lambda: (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"])).remote())
    assert seen == ("token", os.environ["RAY_AUTH_TOKEN"]) and len(seen[1]) == 64
    guest = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN
assert "RAY_AUTH_TOKEN" not in os.environ and guest.poll() is None
with connected(0, "ouroboros resume RUN"):
    while "dashboard agent" not in (names := {_name_of(part): part for part in _parts(psutil.Process())}):
        time.sleep(0.1)
    assert os.getpgrp() not in {os.getpgid(part.pid) for part in names.values()}  # a signal to all is not for Ray
    time.sleep(6)
    guest.kill()
    names["dashboard agent"].kill()
    time.sleep(3)
    names["head"].kill()
    time.sleep(60)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")} | {"HOME": str(tmp_path)}
    options: dict[str, Any] = {"env": environment, "cwd": CHECKOUT, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], timeout=400, **options)
    assert done.returncode == 1
    assert "Ray's dashboard agent (process" in done.stderr, done.stderr
    assert "go on with: ouroboros resume RUN" in done.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()


def test_rays_threads_do_not_see_what_a_test_changes(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_TEST", "seen")
    assert os.environ["OUROBOROS_TEST"] == "seen"
    assert ctypes.CDLL(None).getenv(b"OUROBOROS_TEST") == 0
