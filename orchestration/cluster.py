"""The Ray a run lives on: the one it was started in, the one ``RAY_ADDRESS`` names, or its own on this machine."""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# OpenMP threads that wait by spinning take the core from whom they wait for: on two busy cores a learner of two
# threads was 4 times slower than one of one thread. Spinning briefly keeps the gain on idle cores and loses little on
# busy ones: see benchmarks/learner_threads.py.
_ACTORS = {"GOMP_SPINCOUNT": "1000"}
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_SHUTDOWN_SECONDS = 2.0
# A Ray of one's own serves this process alone: every listener on loopback, and no token file in the home directory.
_PRIVATE = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def external_address() -> str | None:
    """The address of a cluster to join, if the environment names one (Ray sets it inside jobs)."""
    return os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True)
class Machine:
    """What actors can be given."""

    cpus: int
    gpus: int


def find_machine(device: str) -> Machine:
    """The cluster that would be joined, or this machine. Starts nothing; torch is asked only if there is a driver."""
    if external_address() or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        with connected(gpus=0):
            import ray

            resources = ray.cluster_resources()
        return Machine(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return Machine(available_cpus(), 0)
    import torch

    return Machine(available_cpus(), torch.cuda.device_count())


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextlib.contextmanager
def connected(gpus: int) -> Iterator[None]:
    """Be connected to Ray. A Ray started here is ended here; one that was there before is left as it was."""
    for name, value in (_QUIET | _ACTORS).items():
        os.environ.setdefault(name, value)
    if external_address() is None:
        os.environ.update(_PRIVATE)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if external_address():
        ray.init(**quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _own_children_ended():
        ray.init("local", num_cpus=available_cpus(), num_gpus=gpus, include_dashboard=False, **quiet)
        yield


@contextlib.contextmanager
def _own_children_ended() -> Iterator[None]:
    """End the Ray that is started in this block, and every process of it.

    Ray's own shutdown forgets helpers that were still starting when it was interrupted; they would stay for minutes.
    """
    import psutil
    import ray

    this = psutil.Process()
    strangers = set(this.children(recursive=True))
    try:
        yield
    finally:
        family = [child for child in this.children(recursive=True) if child not in strangers]
        ray.shutdown()
        for survivor in psutil.wait_procs(family, timeout=_SHUTDOWN_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
