"""The command in a process of its own, to be interrupted and killed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.locations import CHECKOUT


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """``ouroboros`` in a process group of its own, as a shell would start it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
        cwd=CHECKOUT,
    )


def wait_until(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
