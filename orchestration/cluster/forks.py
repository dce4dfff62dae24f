"""Workers of a Ray on this machine as forks of one process that has imported the libraries: once, not each for itself.

Importing torch, diffusers and transformers is most of what a small run's start costs. :func:`begin` starts a server
that imports what an experiment's workers will need while the driver prepares the run, and :func:`worker_setup` has Ray
start this file in place of a worker. Such a stand-in asks the server for a fork with its arguments, environment and
streams, and lives as long as that does. Where the server cannot help, the stand-in becomes an ordinary worker.

Not where there are GPUs: what a library may have done to CUDA does not survive a fork. ``OUROBOROS_FORKS=0`` does
without. Light to import, and on its own: a stand-in is to cost nothing.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NoReturn

SWITCH = "OUROBOROS_FORKS"  # in the environment: 0, or the name of the server's socket for a driver's workers
# OpenMP threads that wait by spinning take the core from what they wait for: on two busy cores a learner of two
# threads was 4 times slower than one of one thread. Spinning briefly keeps the gain on idle cores and loses little on
# busy ones: see benchmarks/learner_threads.py.
ACTORS = {"GOMP_SPINCOUNT": "1000", "HF_HUB_DISABLE_TELEMETRY": "1"}
_LARGEST = 2**20
_SECONDS_TO_END = 10.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TITLE = "-" * 200  # room in the server's command line for the titles that workers give themselves
_AFTER_RAY = ("ray.", "actors.", "orchestration.")  # what imports Ray waits until it is known what Ray is to read
_ALONE = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # threads do not survive a fork


class _Forks:
    """The server that this process began, if it did."""

    process: Any = None
    place, has_forks = "", False


def begin(libraries: Iterable[str]) -> None:
    """Start to import ``libraries`` for the workers of a Ray that this process may start. Done once in a process."""
    import atexit
    import secrets
    import shutil
    import subprocess

    joins = "RAY_ADDRESS" in os.environ or ("ray" in sys.modules and sys.modules["ray"].is_initialized())
    if _Forks.process or joins or os.environ.get(SWITCH) or shutil.which("nvidia-smi") or sys.platform != "linux":
        return
    _Forks.has_forks, _Forks.place = False, f"ouroboros-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(f"\0{_Forks.place}")
        door.listen(64)
        words = [sys.executable, __file__, "serve", str(door.fileno()), json.dumps([sys.path, *libraries]), _TITLE]
        environment = ACTORS | os.environ | _ALONE
        _Forks.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, env=environment, pass_fds=[door.fileno()], start_new_session=True
        )
    atexit.register(end)


def end() -> None:
    """End the server, and every fork of it."""
    import subprocess

    process, _Forks.process = _Forks.process, None
    if process is not None:
        if not _Forks.has_forks:  # it may still be importing
            process.kill()
        process.stdin.close()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # somebody has stopped it
            process.kill()
            process.wait()


@contextlib.contextmanager
def worker_setup() -> Iterator[dict[str, str]]:
    """In this block Ray is started: what it is to be given so that its workers are forks; nothing if none was begun."""
    if _Forks.process is None:
        yield {}
        return
    # Workers that are started before it is known for which job would differ from the others in Ray's environment.
    settings = {SWITCH: _Forks.place, "RAY_prestart_worker_first_driver": "0"}
    os.environ.update(settings)
    _Forks.has_forks = True
    try:
        yield {"setup_worker_path": __file__}
    finally:
        for name in settings:
            del os.environ[name]


def stand_in() -> None:
    """What Ray starts: ask for a fork with these arguments, environment and streams, and end as it does."""
    options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv if each.startswith("--") and "=" in each)
    context = json.loads(options.get("serialized-runtime-env-context", "{}"))
    try:
        if context.get("command_prefix") or sys.argv[1].startswith("-"):
            raise OSError("a worker in an environment of its own")
        asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked.connect(f"\0{os.environ[SWITCH]}")  # a name in no file system
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it is known to whom they go
        environ = {name: each for name, each in os.environ.items() if name != SWITCH} | context.get("env_vars", {})
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            first = file.read()
        wanted = {"argv": sys.argv[1:], "environ": environ, "cwd": os.getcwd(), "oom_score_adj": first}
        wanted |= {"path": [os.path.dirname(sys.argv[1]), *sys.path[1:]], "nice": os.getpriority(os.PRIO_PROCESS, 0)}
        socket.send_fds(asked, [json.dumps(wanted).encode()], [0, 1, 2])
        fork = int(asked.recv(_LARGEST))
    except (OSError, ValueError, KeyError):  # there is no server, or it is not for workers like this one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.environ.pop(SWITCH, None)
        from ray._private.workers import __file__ as place

        whole = os.path.join(os.path.dirname(place), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, whole, *sys.argv[1:]])

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(fork, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    code = int(asked.recv(_LARGEST) or -signal.SIGKILL)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other meaning
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


class _Server:
    """Who forks, until standard input ends: the driver is gone then."""

    def __init__(self, door: socket.socket, libraries: Iterable[str]) -> None:
        self._door, self._waiting = door, DefaultSelector()
        self._forks: dict[int, tuple[int, socket.socket]] = {}  # by what is read once it ended: its pid, who asked
        self._ray: dict[str, str] | None = None  # the environment that Ray was imported in
        self._can_fork = False
        for each in (0, door):
            self._waiting.register(each, EVENT_READ)
        self._late = [name for name in libraries if name.startswith(_AFTER_RAY)]
        self._load(name for name in libraries if name not in self._late)

    def _load(self, libraries: Iterable[str]) -> None:
        """Import what there is of ``libraries``."""
        import gc
        import importlib
        import warnings

        gc.disable()  # what is imported is there to stay
        for name in libraries:
            with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
                importlib.import_module(name)
            if any(key.fd == 0 for key, _ in self._waiting.select(timeout=0)):
                sys.exit()
        gc.enable()
        gc.freeze()

    def run(self) -> NoReturn:
        """Fork for all who ask."""
        while True:
            ready = {key.fd for key, _ in self._waiting.select()}
            if 0 in ready:
                for pid, _ in self._forks.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            for ended, (pid, asked) in [*self._forks.items()]:
                if ended in ready:
                    self._bury(ended)
                elif asked.fileno() in ready:  # the stand-in was killed
                    os.kill(pid, signal.SIGKILL)
            if self._door.fileno() in ready:
                self._answer()

    def _bury(self, ended: int) -> None:
        pid, asked = self._forks.pop(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # the stand-in is gone
            asked.send(str(code).encode())
        for each in (ended, asked):
            self._waiting.unregister(each)
        os.close(ended)
        asked.close()

    def _answer(self) -> None:
        """Fork for the stand-in at the door, or send it away."""
        asked, _ = self._door.accept()
        # The socket's name is in no file system, so no permissions guard it, and every user of the machine can read it.
        credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            return asked.close()
        said, streams, _, _ = socket.recv_fds(asked, _LARGEST, 3)
        wanted = json.loads(said or "{}")
        if len(streams) == 3 and self._is_for(wanted["environ"]):
            if (pid := os.fork()) == 0:
                self._waiting.close()
                self._door.close()
                _become(wanted, streams)
            with contextlib.suppress(OSError):
                asked.send(str(pid).encode())
            ended = os.pidfd_open(pid)
            self._forks[ended] = pid, asked
            for each in (ended, asked):
                self._waiting.register(each, EVENT_READ)
        else:
            asked.close()
        for stream in streams:
            os.close(stream)
        return None

    def _is_for(self, environ: Mapping[str, str]) -> bool:
        """Whether a fork can be a worker with this environment: Ray reads its part of it once, when it is imported."""
        rays = {name: each for name, each in environ.items() if name.startswith("RAY_")}
        if self._ray is None and "ray" not in sys.modules:
            self._ray = rays
            os.environ.update(rays)
            self._load(["ray._private.workers.default_worker", *self._late])
            self._can_fork = forks_differ()
        return rays == self._ray and self._can_fork and len(os.listdir("/proc/self/task")) == 1


def forks_differ() -> bool:
    """Whether forks of this process would name Ray's objects differently. Where Ray has made a random name before, as
    some of its modules do when they are imported (``ray.tune``), all forks go on with the same ones: then Ray gives the
    objects of one process to another, without a word."""
    import ray

    names = set()
    for _ in range(2):
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writing, ray.ObjectRef.from_random().binary())
            os._exit(0)
        os.close(writing)
        names.add(os.read(reading, 100))
        os.close(reading)
        os.waitpid(pid, 0)
    return len(names) == 2


def _become(wanted: Mapping[str, Any], streams: Iterable[int]) -> NoReturn:
    """In a fork: be the worker that was asked for."""
    import runpy
    import tempfile
    import traceback

    code = 1
    try:
        os.setsid()  # Ray ends the group of a worker that has ended
        os.setpriority(os.PRIO_PROCESS, 0, wanted["nice"])
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(wanted["oom_score_adj"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for text in (sys.stdout, sys.stderr):
            text.reconfigure(write_through=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(wanted["environ"])
        os.chdir(wanted["cwd"])
        sys.path[:], tempfile.tempdir = wanted["path"], None
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # else all forks would draw the same where somebody's code gives no seed
        sys.argv = [each for each in wanted["argv"] if not each.startswith(("--serialized-runtime-env", "--language"))]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End this process as Python does, but for taking apart all that was imported: of libraries as large as these that
    takes seconds, and under Ray's threads it may crash."""
    import atexit
    import threading

    try:
        ends: Any = threading
        ends._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads it any more
                code = code or 1
    finally:
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[:], *names = json.loads(sys.argv[3])
        _Server(socket.socket(fileno=int(sys.argv[2])), names).run()
    stand_in()
