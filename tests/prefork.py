"""Python processes as forks of one that has imported the libraries already: seconds less for each.

A process that is started afresh imports torch, diffusers, transformers, Ray and MLflow, which is most of what a run of
tiny models costs. Where tests start a Ray, in their own process (:func:`preloaded`), by a command (:func:`command`) or
as nodes (:func:`node`), its workers and agents come from there instead, and so does the command; all else is as ever.
Some commands are left alone, so that what a person starts is tested whole, too.

This file is started in place of the script, with the script as its first word. What it should become is asked of the
process that serves at ``SOCKET``, which forks; this one stays until the fork has ended, takes it along, passes signals
on to it and ends as it did. The fork has the arguments, environment, streams, directory and view of the file system of
who asked, and psutil shows it at that one's place.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NoReturn

SOCKET, STORE = "OUROBOROS_TESTS_PREFORK", "OUROBOROS_TESTS_STORE"  # in the environment of who has forks
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LARGEST = 2**20
_NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000}
_OWN = ("orchestration", "actors", "pipelines", "policies", "tests")
_LIBRARIES = ["mlflow", "sentence_transformers", "peft", "scipy.stats", "scipy.optimize", "PIL.Image"]
_LIBRARIES += ["diffusers", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"]
_LIBRARIES += ["diffusers.models.unets.unet_2d", "transformers.models.blip.modeling_blip"]
_LIBRARIES += ["transformers.models.blip.processing_blip", "transformers.models.clip.modeling_clip"]
_LIBRARIES += ["pipelines.rl.policy", "pipelines.rl.learning", "pipelines.captioner", "pipelines.measures.evaluator"]
_LIBRARIES += ["pipelines.rewards.text", "pipelines.rewards.images", "pipelines.rewards.jpeg", "pipelines.mad.tasks"]
_LIBRARIES += ["orchestration.cli.main", "orchestration.tracking.tracker", "orchestration.runs.html_report"]
_LIBRARIES += [
    "mlflow.store.tracking.sqlalchemy_store",
    "matplotlib.figure",
    "aiohttp.web",
    "uvicorn.main",
    "mlflow.server.fastapi_app",
    "grpc.aio",
    "unittest.mock",
]
_RAY = ["ray.dashboard.dashboard", "ray.dashboard.modules.usage_stats.usage_stats_head", "ray.dashboard.agent"]
_RAY += ["ray.dashboard.modules.job.job_agent", "ray.dashboard.modules.reporter.reporter_agent"]
_RAY += ["ray._private.runtime_env.agent.main", "ray._private.runtime_env.agent.runtime_env_agent"]
_RAY += ["ray._private.workers.default_worker"]
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)


def become() -> None:
    """What is started: ask for a fork with these arguments, environment and streams, and end as it does."""
    path = sys.path[1:]
    options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv if each.startswith("--") and "=" in each)
    context = json.loads(options.get("serialized-runtime-env-context", "{}"))
    environ = os.environ | {name: os.path.expandvars(each) for name, each in context.get("env_vars", {}).items()}
    path = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each and each not in path] + path
    first = os.getcwd() if sys.argv[1] == "-m" else os.path.dirname(sys.argv[1])
    wanted = {"argv": sys.argv[1:], "environ": environ, "path": [first, *path], "file": sys.argv[0], "cwd": os.getcwd()}
    wanted["anew"] = sys.argv[1] == "-m" and os.getcwd() != _CHECKOUT  # it may be of a copy of the checkout
    if prefix := context.get("command_prefix"):  # the program is the one that was brought to this node
        _, wanted["cwd"], _ = (shlex.split(each)[0] for each in prefix)
        wanted["anew"] = True
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it is known to whom
    with _asking() as asked:
        views = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]
        socket.send_fds(asked, [json.dumps(wanted).encode()], [0, 1, 2, *views])
        fork = int(asked.recv(_LARGEST))
        for number in _PASSED_ON:
            signal.signal(number, lambda received, _: _send(fork, received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        code = int(asked.recv(_LARGEST) or -signal.SIGKILL)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other meaning
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _send(fork: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(fork, number)


def _forks() -> dict[int, int]:
    """By the process that was started, the fork that lives for it."""
    with _asking() as asked:
        asked.send(b"forks")
        return {int(asker): fork for asker, fork in json.loads(asked.recv(_LARGEST)).items()}


def _asking() -> socket.socket:
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked.connect(f"\0{os.environ[SOCKET]}")  # a name that is in no file system, as not all have the same view of one
    return asked


def serve(door: socket.socket) -> None:
    """Import the libraries, then fork for everyone who asks, until standard input ends."""
    assert "ray" not in sys.modules, "Ray reads the environment once, which is not this process's"
    _Server(door, _LIBRARIES).run()


class _Server:
    """Who forks: the first, which has no Ray, and one with Ray for every environment that Ray may have read, to which
    the first hands what is Ray's."""

    def __init__(self, door: socket.socket, libraries: Sequence[str]) -> None:
        import gc
        import importlib
        import warnings

        gc.disable()  # what is imported is there to stay
        with warnings.catch_warnings(action="ignore"):
            for name in libraries:
                importlib.import_module(name)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads would not survive a fork"
        if "ray" in sys.modules:
            from orchestration.cluster.forks import forks_differ

            assert forks_differ(), "objects of two forks would have one name"
        gc.freeze()
        gc.enable()
        self._door, self._waiting = door, DefaultSelector()
        self._forks: dict[int, tuple[int, socket.socket]] = {}  # by what is read once it ended: its pid, who asked
        self._with_ray: dict[str, socket.socket] = {}

    def run(self) -> None:
        for each in (0, self._door):
            self._waiting.register(each, EVENT_READ)
        while True:
            ready = {key.fd for key, _ in self._waiting.select()}
            if 0 in ready:
                for pid, _ in self._forks.values():
                    os.kill(pid, signal.SIGKILL)
                return
            for ended, (pid, asked) in [*self._forks.items()]:
                if ended in ready:
                    self._bury(ended)
                elif asked.fileno() in ready:  # who asked was killed
                    os.kill(pid, signal.SIGKILL)
            if self._door.fileno() in ready:
                self._answer()

    def _bury(self, ended: int) -> None:
        pid, asked = self._forks.pop(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # who asked is gone
            asked.send(str(code).encode())
        for each in (ended, asked):
            self._waiting.unregister(each)
        os.close(ended)
        asked.close()

    def _answer(self) -> None:
        """Whoever is at the door, for the first server an asker, for another what the first hands on: one that wants a
        fork, with streams and views, or to know the forks, with nothing."""
        many = 4 + len(_NAMESPACES)
        if self._door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            asked, _ = self._door.accept()
            said, given, _, _ = socket.recv_fds(asked, _LARGEST, many)
        else:
            said, given, _, _ = socket.recv_fds(self._door, _LARGEST, many)
            asked = socket.socket(fileno=given.pop(0)) if given else self._door
        if not given:
            with contextlib.suppress(OSError):
                asked.send(json.dumps(self._askers()).encode())
        elif asked is not self._door and (server := self._of_ray(json.loads(said))):
            socket.send_fds(server, [said], [asked.fileno(), *given])
        else:
            return self._fork(asked, json.loads(said), given)
        for each in given:
            os.close(each)
        if asked is not self._door:
            asked.close()
        return None

    def _askers(self) -> dict[int, int]:
        credentials = socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        found = {struct.unpack("3i", each.getsockopt(*credentials))[0]: pid for pid, each in self._forks.values()}
        for server in self._with_ray.values():
            server.send(b"forks")
            found |= {int(asker): pid for asker, pid in json.loads(server.recv(_LARGEST)).items()}
        return found

    def _of_ray(self, wanted: dict[str, Any]) -> socket.socket | None:
        """For a program of Ray's, the way to the server that has Ray, as read in this environment."""
        if "ray" in sys.modules or f"{os.sep}ray{os.sep}" not in wanted["argv"][0]:
            return None
        key = json.dumps(sorted(each for each in wanted["environ"].items() if each[0].startswith("RAY_")))
        if key not in self._with_ray:
            self._with_ray[key], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                self._alone()
                os.environ.clear()
                os.environ.update(wanted["environ"])
                _Server(theirs, _RAY).run()
                os._exit(0)
            theirs.close()
        return self._with_ray[key]

    def _alone(self) -> None:
        """In a fork: let go of what is the server's."""
        self._waiting.close()
        self._door.close()
        for each in self._with_ray.values():
            each.close()
        for ended, (_, asked) in self._forks.items():
            os.close(ended)
            asked.close()

    def _fork(self, asked: socket.socket, wanted: dict[str, Any], streams: Sequence[int]) -> None:
        if (pid := os.fork()) == 0:
            self._alone()
            _run(wanted, streams)
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):
            asked.send(str(pid).encode())
        ended = os.pidfd_open(pid)
        self._forks[ended] = pid, asked
        self._waiting.register(ended, EVENT_READ)
        self._waiting.register(asked, EVENT_READ)


def _run(wanted: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Be, in a fork, the script or module that was asked for."""
    import atexit
    import importlib
    import runpy
    import tempfile
    import threading
    import traceback

    code = 1
    try:
        os.setsid()  # a raylet kills the group of a worker that has ended
        for view, (kind, flag) in zip(streams[3:], _NAMESPACES.items(), strict=True):
            _enter(view, kind, flag)
        for number, stream in enumerate(streams[:3]):
            os.dup2(stream, number)
            os.close(stream)
        for text in (sys.stdout, sys.stderr):
            text.reconfigure(write_through=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(wanted["environ"])
        os.chdir(wanted["cwd"])
        sys.path[:], tempfile.tempdir = wanted["path"], None
        if wanted["anew"]:
            for name in [each for each in sys.modules if each.partition(".")[0] in _OWN]:
                del sys.modules[name]
            importlib.invalidate_caches()
        sys.argv = [each for each in wanted["argv"] if not each.startswith(("--serialized-runtime-env", "--language"))]
        with _changed(wanted["file"]):
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        ends: Any = threading
        ends._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(view: int, kind: str, flag: int) -> None:
    """Have the namespace of who asked, if it is another."""
    import ctypes

    if os.fstat(view).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino and ctypes.CDLL(None).setns(view, flag):
        raise OSError(f"the {kind} namespace of who asked cannot be entered")
    os.close(view)


@contextlib.contextmanager
def _changed(file: str) -> Iterator[None]:
    """In this block a Ray that this process starts has its workers and agents forked by ``file``, this one or a copy;
    psutil shows forks at the place of those that they live for; and a new MLflow store is a copy of the first, as its
    tables take seconds to create."""
    from functools import partial
    from unittest.mock import patch

    import psutil
    from mlflow.store.db import utils
    from ray._private import parameter, services

    program = "_build_python_executable_command_memory_profileable"
    whole_program: Any = getattr(services, program)
    whole_children, whole_parent, whole_tables = (
        psutil.Process.children,
        psutil.Process.parent,
        utils._initialize_tables,
    )

    class Fork(psutil.Process):
        def __init__(self, pid: int, asker: int) -> None:
            super().__init__(pid)
            self._asker = psutil.Process(asker)

        def environ(self) -> dict[str, str]:
            return self._asker.environ()

    def children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        forked = _forks()
        found: dict[int, psutil.Process] = {}  # what a fork started is found by it and by the server of forks
        for each in [process, *whole_children(process, recursive)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [Fork(forked[each.pid], each.pid)] if each.pid in forked else []
                family += children(family[0], recursive) if family and recursive else []
                found |= {member.pid: member for member in family or [each]}
        return [each for pid, each in found.items() if pid != process.pid]

    def parent(process: psutil.Process) -> psutil.Process | None:
        asker = next((asker for asker, fork in _forks().items() if fork == process.pid), None)
        return whole_parent(psutil.Process(asker) if asker else process)

    def tables(engine: Any) -> None:
        template, path = os.environ.get(STORE, ""), engine.url.database
        if engine.dialect.name != "sqlite" or not os.path.isdir(os.path.dirname(template)):
            whole_tables(engine)
        elif os.path.exists(template):
            _copy_store(template, path)
        else:
            whole_tables(engine)
            _copy_store(path, f"{template}.{os.getpid()}")
            os.replace(f"{template}.{os.getpid()}", template)

    with (
        patch.object(parameter, "RayParams", partial(parameter.RayParams, setup_worker_path=file)),
        patch.object(services, program, lambda *words, **more: [*whole_program(*words, **more), file]),
        patch.object(psutil.Process, "children", children),
        patch.object(psutil.Process, "parent", parent),
        patch.object(utils, "_initialize_tables", tables),
    ):
        yield


def _copy_store(source: str, target: str) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(target)) as other:
        one.backup(other)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """In this block there is a server of forks, also for what is started in it. Nobody need wait for it."""
    import secrets
    import subprocess
    import tempfile

    place = f"ouroboros-{secrets.token_hex(8)}"
    quiet = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread would not survive a fork
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(f"\0{place}")
        door.listen(64)
        # The long word is room for the titles that workers give themselves.
        words = [sys.executable, __file__, "serve", str(door.fileno()), "-" * 200]
        server: Any = subprocess.Popen(words, stdin=subprocess.PIPE, env=quiet, pass_fds=[door.fileno()])
    try:
        with tempfile.TemporaryDirectory() as directory:
            os.environ.update({SOCKET: place, STORE: f"{directory}/store.db"})
            yield
    finally:
        for name in (SOCKET, STORE):
            os.environ.pop(name, None)
        server.stdin.close()
        server.wait()


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """In this block a Ray that this process starts has its workers forked; what else may, is said above."""
    with contextlib.nullcontext() if SOCKET in os.environ else serving(), _changed(__file__):
        yield


def command(*words: str) -> list[str]:
    """A command in Python, of a script or ``-m`` and a module, as a fork if this process has some."""
    return [sys.executable, *([__file__] if SOCKET in os.environ else []), *words]


def node(script: str, directory: str) -> list[str]:
    """The same for ``script``, the text of a program, where nothing but ``directory`` may be seen of the checkout."""
    if SOCKET not in os.environ:
        return [sys.executable, "-c", script]
    place = os.path.join(directory, "node.py")
    with open(place, "w") as file:
        file.write(script)
    return [sys.executable, shutil.copy(__file__, directory), place]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = _CHECKOUT
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        become()
