"""The Ray a run lives on: the one it was started in, the one ``RAY_ADDRESS`` names, or its own on this machine."""

import contextlib
import ipaddress
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.allocation import Offer
from orchestration.package import excludes, shipped_files
from pipelines.locations import CHECKOUT

# OpenMP threads that wait by spinning take the core from whom they wait for: on two busy cores a learner of two
# threads was 4 times slower than one of one thread. Spinning briefly keeps the gain on idle cores and loses little on
# busy ones: see benchmarks/learner_threads.py.
ACTORS = {"GOMP_SPINCOUNT": "1000"}
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_SHUTDOWN_SECONDS = 2.0


def external_address() -> str | None:
    """The address of a cluster to join, if the environment names one (Ray sets it inside jobs)."""
    return os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True)
class Machine:
    """What actors can be given."""

    cpus: int
    gpus: int
    offers: tuple[Offer, ...] = ()  # what each node has of these and of other resources; none: it is one node


def imagine_machine(gpus: int) -> Machine:
    """One that a plan can be made for though it is not there: nodes of up to 8 GPUs, 12 CPUs with each GPU."""
    nodes = [min(8, gpus - first) for first in range(0, gpus, 8)]
    return Machine(12 * gpus, gpus, tuple({"CPU": 12 * node, "GPU": node} for node in nodes))


def find_machine(device: str) -> Machine:
    """The cluster that would be joined, or this machine. Starts nothing; torch is asked only if there is a driver."""
    if external_address() or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        with connected(gpus=0):
            import ray

            offers = _own_share() or tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
        cpus, gpus = (int(sum(offer.get(name, 0) for offer in offers)) for name in ("CPU", "GPU"))
        return Machine(cpus, gpus, offers)
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return Machine(available_cpus(), 0)
    import torch

    return Machine(available_cpus(), torch.cuda.device_count())


def _own_share() -> tuple[Offer, ...]:
    """The bundles of the placement group that this process was put into (a sweep's trial); none outside of any."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return tuple(group.bundle_specs) if group else ()


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextlib.contextmanager
def connected(gpus: int) -> Iterator[None]:
    """Be connected to Ray. A Ray started here is ended here; one that was there before is left as it was."""
    for name, value in (_QUIET | ACTORS).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
    elif external_address():
        _init(runtime_env=_for_workers())
        try:
            yield
        finally:
            ray.shutdown()
    else:
        with _own_children_ended():
            _start_private(gpus)
            yield


def _for_workers() -> dict[str, Any]:
    """What workers on other nodes need: this checkout, unless a Ray job brought it or it came with the installation."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not (CHECKOUT / "pyproject.toml").exists():
        return {"env_vars": ACTORS}
    _, left_out = shipped_files(CHECKOUT)
    return {"env_vars": ACTORS, "working_dir": str(CHECKOUT), "excludes": excludes(left_out)}


def _start_private(gpus: int) -> None:
    """A Ray that serves this process alone: on loopback, and with no token (a file in the home) unless one is set."""
    import ray
    from ray._private import parameter, ray_constants

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Meant for systems whose firewall asks the user. The variable behind it is read when Ray is imported: too early.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Two helpers have nothing to do, and would take a fifth of a start's processor time: nothing scales a Ray on one
    # machine, and no driver is told what workers print. ``ray.init`` has no names for them.
    names: dict[str, Any] = vars(parameter)
    whole = names["RayParams"]
    names["RayParams"] = partial(whole, no_monitor=True, include_log_monitor=False)
    try:
        _init("local", num_cpus=available_cpus(), num_gpus=gpus, include_dashboard=False)
    finally:
        names["RayParams"] = whole
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        raise RuntimeError(f"Ray {ray.__version__} listens beyond this machine; start a cluster and set RAY_ADDRESS")


def _init(*address: str, **options: Any) -> None:
    """``ray.init``, quietly. SIGTERM goes on to mean what it meant: Ray would have it end the process unclosed."""
    import ray

    meaning = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(*address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except SystemExit as stopped:  # SIGTERM while Ray was starting
        raise KeyboardInterrupt from stopped
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, meaning)


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
