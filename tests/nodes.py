"""A Ray cluster of several nodes on this machine: each has its raylet and its working directory, and can be lost."""

import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import psutil

from tests import prefork

# One node, as ``ray start`` and Ray's own test cluster make them, but on loopback alone. It ends with its input.
_NODE = """
import json, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
settings = json.loads(sys.argv[1])
node = Node(RayParams(**settings), head="gcs_address" not in settings, shutdown_at_exit=True, spawn_reaper=True)
print(node.gcs_address, flush=True)
sys.stdin.read()
"""
_COMMON = {"node_ip_address": "127.0.0.1", "num_cpus": 2, "object_store_memory": 200 * 2**20}
_COMMON |= {"min_worker_port": 0, "max_worker_port": 0, "include_log_monitor": False}
_TOKEN = secrets.token_hex(32)


def environment(address: str | None) -> dict[str, str]:
    """What a process needs that is, or joins, the cluster at ``address``."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # 127.0.0.1 is not taken for the name of an outer interface
    return kept | guarded | loopback | ({"RAY_ADDRESS": address} if address else {})


class Nodes:
    """Nodes of two CPUs, each with a resource of its own name. ``apart``: a command to start each with, which is given
    the node's directory and then the node's own command."""

    def __init__(self, apart: Sequence[str] = ()) -> None:
        self._apart = apart
        self._stack = ExitStack()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.address = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, name: str) -> None:
        """Add a node; the first is the head."""
        if self.address:
            role: dict[str, Any] = {"gcs_address": self.address, "node_manager_port": 0}
            role |= {"dashboard_agent_listen_port": None}
        else:
            role = {"include_dashboard": False, "no_monitor": True}
        # The path of a Unix socket has to be short, and pytest's own are long.
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp"))
        settings = {**_COMMON, **role, "temp_dir": directory, "resources": {name: 1}}
        command = [*self._apart, *([directory] if self._apart else []), *prefork.node(_NODE, directory)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, json.dumps(settings)], env=environment(None), **pipes)
        self._processes[name] = self._stack.enter_context(process)
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address, f"node {name} did not begin"
        self.address = self.address or address

    def family(self, name: str) -> list[psutil.Process]:
        """Every process of a node but the one that started it: its raylet, agents and workers."""
        return psutil.Process(self._processes[name].pid).children(recursive=True)

    def lose(self, name: str) -> None:
        """SIGKILL for a node's raylet: what lived by it ends as it does when a machine is gone."""
        for process in self.family(name):
            if process.name() == "raylet":
                process.kill()

    def end(self, name: str) -> None:
        """Clear away what is left of a node."""
        process = self._processes.pop(name)
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=60)
