"""The command in a process of its own, to be interrupted and killed."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestration.cluster.forks import SWITCH
from pipelines.storage.locations import CHECKOUT
from tests import prefork


def start(
    arguments: list[str], log: Path, environment: Mapping[str, str] | None = None, afresh: bool = False
) -> subprocess.Popen[bytes]:
    """``ouroboros`` in a process group of its own, as a shell would start it; with a Ray of its own, unless
    ``environment`` says otherwise. ``afresh``: no fork, though others may be, and its
    workers are forks of its own."""
    if environment is None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if afresh:
        environment = {name: value for name, value in environment.items() if name != SWITCH}
    words = ["-m", "orchestration.cli", *arguments]
    return subprocess.Popen(
        [sys.executable, *words] if afresh else prefork.command(*words),
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        cwd=CHECKOUT,
    )


def wait_until(condition: Any, seconds: float, what: str, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(pause)
