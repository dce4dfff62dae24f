"""The Ray a run lives on: the one it was started in, the one ``RAY_ADDRESS`` names, or its own on this machine."""

import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any, cast

import psutil

from actors.allocation import Offer
from orchestration.cluster import forks
from orchestration.cluster.forks import ACTORS
from orchestration.cluster.package import excludes, shipped_files
from pipelines.limits import cpu_limit
from pipelines.storage.locations import CHECKOUT

_QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # of Ray Tune
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # nobody keeps what they write, and TensorBoard's writer imports torch
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_SHUTDOWN_SECONDS = 2.0
_PARTS = {
    "ray/gcs/gcs_server": "head",
    "ray/raylet/raylet": "raylet",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "environment agent",
}
_GRACE_SECONDS = 15.0  # in which a run whose Ray has no head any more may still end by itself
_ANSWER_SECONDS = 10.0  # in which a cluster's head takes a connection
_LATE_SECONDS = 9.0  # after which it is said that Ray has not started yet
_LOOK_SECONDS, _LOOKS_APART = 0.5, 5.0  # between two looks at Ray's parts, some of which begin late
_NOWHERE = "127.0.0.1:9"  # where nothing listens
_CURSOR = "\033[?25h"  # shows it
_LONGEST_SOCKET = 107  # bytes of the name of a Unix socket
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # what Ray adds


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
    check_scratch()
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return Machine(cpu_limit(), 0)
    import torch

    return Machine(cpu_limit(), torch.cuda.device_count())


def _own_share() -> tuple[Offer, ...]:
    """The bundles of the placement group that this process was put into (a sweep's trial); none outside of any."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return tuple(group.bundle_specs) if group else ()


@contextlib.contextmanager
def connected(gpus: int, remedy: str = "") -> Iterator[None]:
    """Be connected to Ray. A Ray started here is ended here; one that was there before is left as it was, and so is the
    environment.

    ``remedy``: what to say can be done where Ray, or a part of it, ends and takes this process along. Raises ValueError
    if there is no Ray to join, or none can be started.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    address = external_address()
    # A Ray of one's own has a secret of its own, which no other process on this machine knows.
    secret = {} if address else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with environment({name: os.environ.get(name, value) for name, value in (_QUIET | ACTORS).items()} | secret):
        import ray

        with contextlib.ExitStack() as stack:
            if address:
                check_answers(address)
                stack.callback(ray.shutdown)
                _init(runtime_env=_for_workers())
            else:
                check_scratch()
                stack.callback(forks.end)
                stack.enter_context(_own_ray_ended())
                _start_private(gpus)
            stack.enter_context(watched(remedy))
            yield


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """In this block the environment holds ``values``, and Ray has read them."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    _read_again()
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)
        _read_again()


def _read_again() -> None:
    """Let a Ray that was imported before read the environment anew."""
    if "ray" in sys.modules:
        inner: Any = sys.modules["ray"]._raylet
        inner.Config.initialize("")
        inner.AuthenticationTokenLoader.instance().reset_cache()


def check_answers(address: str) -> None:
    """Raise ValueError unless something that could be Ray's head answers at ``RAY_ADDRESS``: Ray would try for minutes
    without a word, and hear no Ctrl-C."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", "local": Ray looks for these on this machine
        return
    try:
        _greet(host, int(port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS names the cluster {address}, but nothing answers there ({error}): start it, correct the "
            "address, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def check_scratch() -> None:
    """Raise ValueError unless a Ray of one's own can make its sockets where the environment wants temporary files."""
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), None)
    place = os.environ[name] if name else "/tmp"
    remedy = f"set {name or 'RAY_TMPDIR'} to a directory such as /tmp" if place != "/tmp" else "set RAY_TMPDIR"
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{name or 'the temporary directory'} {place}: no directory to write to; {remedy}")
    most = _LONGEST_SOCKET - len(_SOCKET)
    if len(os.fsencode(os.path.abspath(place))) > most:
        raise ValueError(f"{name} {place} is too long for Ray's sockets (at most {most} bytes): {remedy}")


def _for_workers() -> dict[str, Any]:
    """What workers on other nodes need: this checkout, unless a Ray job brought it or it came with the installation."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not (CHECKOUT / "pyproject.toml").exists():
        return {"env_vars": ACTORS}
    _, left_out = shipped_files(CHECKOUT)
    return {"env_vars": ACTORS, "working_dir": str(CHECKOUT), "excludes": excludes(left_out)}


def _start_private(gpus: int) -> None:
    """A Ray that serves this process alone: on loopback, and with the token that the environment holds."""
    from unittest.mock import patch

    import ray
    from ray._private import node, parameter, ray_constants, services

    # Meant for systems whose firewall asks the user. The variable behind it is read when Ray is imported: too early.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Three helpers have nothing to do, and would take a third of a start's processor time: nothing scales a Ray on one
    # machine, no driver shows what workers print, and the dashboard's server, which shows no dashboard, would report
    # usage. ``ray.init`` has no names for them. A signal to this process's group, as ``timeout`` sends it, is not for
    # Ray, which is ended in order: without its head that takes a minute, and what is being run is not closed.
    with forks.worker_setup() as setup:
        changes: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False, **setup}
        # Whatever port is free: for its usual one an agent waits more than three seconds where another Ray has it.
        changes["dashboard_agent_listen_port"] = 0
        helpers = partial(parameter.RayParams, **changes)
        with (
            patch.object(services, "ConsolePopen", partial(services.ConsolePopen, process_group=0)),
            patch.object(parameter, "RayParams", helpers),
            patch.object(node.Node, "start_api_server", _start_no_dashboard),
            _interrupted_afterwards(),
        ):
            _init("local", num_cpus=cpu_limit(), num_gpus=gpus, include_dashboard=False)
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        raise RuntimeError(f"Ray {ray.__version__} listens beyond this machine; start a cluster and set RAY_ADDRESS")


def _start_no_dashboard(node: Any, **_: Any) -> None:
    """In place of what starts a dashboard on Ray's head. Agents want to know where it is, or say so every second."""
    from ray._private import ray_constants as names

    node._webui_url = None
    place = names.DASHBOARD_ADDRESS.encode(), _NOWHERE.encode(), True
    node.get_gcs_client().internal_kv_put(*place, namespace=names.KV_NAMESPACE_DASHBOARD)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """In this block, of seconds, a first SIGINT waits for its end: Ray's libraries, left in the middle of their start,
    would abort the process, and nothing would be closed."""
    meaning, asked = signal.getsignal(signal.SIGINT), list[Any]()

    def wait(*signalled: Any) -> None:
        signal.signal(signal.SIGINT, meaning)
        asked.append(signalled)

    hears = threading.current_thread() is threading.main_thread() and callable(meaning)
    if hears:
        signal.signal(signal.SIGINT, wait)
    try:
        yield
    except Exception as error:  # what the signal ended may be a part of Ray
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        if hears:
            signal.signal(signal.SIGINT, meaning)
    if asked and callable(meaning):
        meaning(*asked[0])


def _init(*address: str, **options: Any) -> None:
    """``ray.init``, quietly. SIGTERM goes on to mean what it meant: Ray would have it end the process unclosed."""
    import ray

    meaning = signal.getsignal(signal.SIGTERM)
    late = threading.Timer(_LATE_SECONDS, lambda: _tell(f"still waiting for Ray {external_address() or 'to start'}"))
    late.start()
    try:
        ray.init(*address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except SystemExit as stopped:  # SIGTERM while Ray was starting
        raise KeyboardInterrupt from stopped
    finally:
        late.cancel()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, meaning)


@contextlib.contextmanager
def _own_ray_ended() -> Iterator[None]:
    """End the Ray that is started in this block, and every process of it; what else was started meanwhile goes on.

    Ray's own shutdown forgets helpers that were still starting when it was interrupted; they would stay for minutes.
    """
    import ray

    this = psutil.Process()
    before = set(this.children())
    try:
        yield
    finally:
        family = [child for child in this.children() if child not in before and _is_rays(child)]
        for child in list(family):
            with contextlib.suppress(psutil.Error):
                family += child.children(recursive=True)
        ray.shutdown()
        for survivor in psutil.wait_procs(family, timeout=_SHUTDOWN_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()


def _is_rays(process: psutil.Process) -> bool:
    """Whether a process runs a program of the installed Ray's."""
    import ray

    with contextlib.suppress(psutil.Error):
        for _ in range(100):
            if words := process.cmdline():
                return any(word.startswith(os.path.dirname(ray.__file__) + os.sep) for word in words)
            time.sleep(0.01)  # in the moment that a program takes to replace another, it has no command line
    return False


@contextlib.contextmanager
def watched(remedy: str) -> Iterator[None]:
    """While in this block, say so at once if what this process cannot do without is gone, and what can be done then.

    Ray itself ends the process then: in silence where an agent or the raylet is gone, after a minute where the head is.
    """
    import ray

    over, end = os.pipe()
    head = ray.get_runtime_context().gcs_address
    watch = partial(_watch_head, head) if external_address() else _watch_parts
    thread = threading.Thread(target=watch, args=(over, remedy), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(over)


def _watch_head(head: str, over: int, remedy: str) -> None:
    """Until ``over`` is closed at its other end: see whether the ``head`` of a joined Ray answers."""
    answers = True
    while not wait([over], _LOOKS_APART):
        before, answers = answers, _answers(head)
        if before and not answers:
            _tell(f"the head of the Ray cluster, {head}, does not answer; if this ends in a minute{_then(remedy)}")


def _watch_parts(over: int, remedy: str) -> None:
    """Until ``over`` is closed at its other end: see whether the parts of a Ray of one's own live."""
    parts: dict[int, tuple[psutil.Process, str]] = {}  # by a descriptor that can be waited for
    this, pause, lost = psutil.Process(), _LOOK_SECONDS, False
    try:
        while True:
            for process, name in ({} if lost else _parts(this)).items():
                if (process, name) not in parts.values():
                    with contextlib.suppress(OSError):
                        parts[os.pidfd_open(process.pid)] = process, name
            # Where one has ended, all but the head follow it.
            ended = wait([over, *(each for each, (_, name) in parts.items() if name == "head" or not lost)], pause)
            pause = min(2 * pause, _LOOKS_APART)
            if over in ended:
                return
            if ended:
                lost, (process, name) = True, parts[cast(int, ended[0])]
                what = f"Ray's {name} (process {process.pid}) has ended"
                _tell(f"{what}; if the run does not go on by itself{_then(remedy)}")
                if name == "head":  # Ray would wait for a minute, in vain; a signal to all may have ended this one, too
                    if wait([over], _GRACE_SECONDS):
                        return
                    for part in _parts(this):
                        with contextlib.suppress(psutil.Error):
                            part.kill()
                    os._exit(1)
    finally:
        for descriptor in parts:
            os.close(descriptor)


def _parts(this: psutil.Process) -> dict[psutil.Process, str]:
    """The processes of a Ray of one's own without which it ends, and what they are called."""
    found: dict[psutil.Process, str] = {}
    for child in this.children():
        with contextlib.suppress(psutil.Error):  # another child may have a Ray, too
            agents = child.children() if _name_of(child) == "raylet" else []
            found |= {each: name for each in (child, *agents) if (name := _name_of(each))}
    return found


def _name_of(process: psutil.Process) -> str | None:
    """What a part of Ray is called; None for what Ray can do without or replaces."""
    with contextlib.suppress(psutil.Error):
        program = " ".join(process.cmdline()[:3])  # a raylet's other words name its agents' programs
        return next((name for mark, name in _PARTS.items() if mark in program), None)
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        _greet(host, int(port))
        return True
    return False


def _greet(host: str, port: int) -> None:
    """Raise OSError unless a server answers as those of gRPC do, which Ray's head is: with its HTTP/2 settings."""
    with socket.create_connection((host.strip("[]"), port), timeout=_ANSWER_SECONDS) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        if connection.recv(9)[3:4] != bytes([4]):
            raise ConnectionError("what listens there is no head of a Ray cluster")


def _then(remedy: str) -> str:
    return f", go on with: {remedy}" if remedy else ", begin it again"


def _tell(text: str) -> None:
    """A line on standard error, past whatever this process is in the middle of; a hidden cursor comes back."""
    with contextlib.suppress(OSError):
        os.write(2, f"{_CURSOR if os.isatty(2) else ''}ouroboros: {text}\n".encode())
