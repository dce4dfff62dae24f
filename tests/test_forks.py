"""Workers as forks of a process that has the libraries."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestration.cluster import forks
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.runs.config import load_config
from pipelines.storage.locations import CHECKOUT
from tests.processes import wait_until

# In a process of its own: the server is one a process, and this one has none.
_DRIVER = """
import json, os, subprocess, sys
from orchestration.cluster import forks
forks.begin(["numpy", "fractions", "a_module_that_nobody_has"])
with forks.worker_setup() as setup:
    environment = dict(os.environ)
print(json.dumps([setup, environment, forks._Forks.process.pid]), flush=True)
sys.stdin.read()
forks.end()
"""
_WORKER = """
import os, sys
print(sys.modules["numpy"].random.randint(2**40), end=" ")
print("fractions" in sys.modules, os.environ["OF_THE_WORKER"], sys.argv[1:], os.getpid(), os.getppid(), flush=True)
sys.stdin.readline()
sys.exit(7)
"""


def test_a_stand_in_is_what_it_asked_for(tmp_path: Path) -> None:
    (script := tmp_path / "worker.py").write_text(_WORKER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    alone = {name: value for name, value in os.environ.items() if name not in (forks.SWITCH, "RAY_ADDRESS")}
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER], env=alone, **pipes)  # type: ignore[call-overload]
    setup, environment, server = json.loads(driver.stdout.readline())
    words = [sys.executable, setup["setup_worker_path"], str(script), "--language=PYTHON", "an argument"]

    def start() -> subprocess.Popen[str]:
        started: subprocess.Popen[str] = subprocess.Popen(words, env=environment | {"OF_THE_WORKER": "seen"}, **pipes)  # type: ignore[call-overload]
        return started

    if os.getuid() == 0:  # another user is sent away: a fork would do what that one wants with the rights of this one
        if (other := os.fork()) == 0:
            code = 1
            try:
                os.setuid(65534)
                asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                asked.settimeout(20)
                asked.connect(f"\0{environment[forks.SWITCH]}")
                code = int(asked.recv(100) != b"")
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0

    workers = [start() for _ in range(3)]
    lines = [worker.stdout.readline().split(maxsplit=1) for worker in workers if worker.stdout]
    assert len({drawn for drawn, _ in lines}) == 3  # by code that gives no seed
    said = [line.rsplit(maxsplit=2) for _, line in lines]
    assert {what for what, _, _ in said} == {"True seen ['an argument']"}
    assert {int(parent) for _, _, parent in said} == {server}
    own = [psutil.Process(int(pid)) for _, pid, _ in said]
    assert not {each.pid for each in own} & {worker.pid for worker in workers}

    workers[0].communicate("\n")
    assert workers[0].returncode == 7
    own[1].kill()
    assert workers[1].wait(timeout=20) == -signal.SIGKILL
    workers[2].kill()
    wait_until(lambda: not own[2].is_running(), 20, "the end of a fork whose stand-in was killed")
    last = start()
    assert last.stdout is not None
    fork = psutil.Process(int(last.stdout.readline().split()[-2]))
    driver.communicate()
    assert driver.returncode == 0
    wait_until(lambda: not fork.is_running() and not psutil.pid_exists(server), 20, "the end of the server's forks")
    last.wait(timeout=20)

    # Without a server a stand-in is what it stands for: Ray's own program, which knows no such language.
    words[3] = "--language=KLINGON"
    orphan = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "setup_worker.py" in orphan.stderr
    assert "KLINGON" in orphan.stderr


_ALIKE = """
import importlib, sys
from orchestration.cluster import forks
for name in sys.argv[1:]:
    importlib.import_module(name)
print(forks.forks_differ())
"""


def imports(experiment: str) -> list[str]:
    """What the workers of a ready-made configuration are to have."""
    known = EXPERIMENTS[experiment]
    config = {"ddpo": "ddpo/digits", "mad": "mad/joined_loops", "sweep": "sweeps/digits_phase"}[experiment]
    return [*known.imports(load_config(known.schema, CHECKOUT / f"configs/{config}.yaml", []))]


@pytest.mark.parametrize("experiment", ["ddpo", "mad", "sweep", None])
def test_forks_that_would_give_objects_the_same_names_are_found_out(experiment: str | None) -> None:
    """Ray makes random names as Tune is imported; from there on all forks would make the same ones."""
    modules = imports(experiment) if experiment else ["ray.tune"]
    words = [sys.executable, "-W", "ignore", "-c", _ALIKE, "ray._private.workers.default_worker", *modules]
    environment = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    told = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.split() == [str(experiment is not None)]
