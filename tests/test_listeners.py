"""Who can reach a run: nothing that a Ray of its own starts listens beyond loopback."""

import ipaddress
import signal
import time
from pathlib import Path

import psutil

from tests.network import listeners
from tests.processes import start


def beyond(process: psutil.Process) -> set[tuple[str, int]]:
    return {(place, port) for place, port in listeners(process) if not ipaddress.ip_address(place).is_loopback}


def test_a_default_run_listens_on_loopback_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = start(["mad", "n_ini=20", "n_synthetic=20", "generations=3", f"output_dir={tmp_path / 'run'}"], log)
    seen: set[tuple[str, int]] = set()
    try:
        process = psutil.Process(run.pid)
        deadline = time.monotonic() + 90
        while run.poll() is None and time.monotonic() < deadline:
            seen |= listeners(process)
            assert not beyond(process)
            time.sleep(0.1)
        assert run.poll() == 0, log.read_text()
    finally:
        run.kill()
    assert len(seen) > 5  # Ray's servers and workers were looked at


def test_a_ray_of_ones_own_does_too_and_leaves_sigterm_alone(ray_session: None) -> None:
    """In this process Ray was imported long before anybody knew that it would be a private one."""
    assert len(listeners(psutil.Process())) > 5
    assert not beyond(psutil.Process())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
