"""Ray's worker processes as forks of one that has imported the models' libraries already: seconds less for each.

A worker that is started afresh imports torch, diffusers and transformers, which is most of what a run of tiny models
costs. Where tests start a Ray, in their own process (:func:`preloaded`), by a command (:func:`environment`) or as nodes
(:func:`settings`), its workers come from there instead; all else of Ray is as ever, and so is the command's process.
Some commands are left alone, so that what a person starts is tested whole, too.

Ray starts this file as it would start its own ``setup_worker.py``. What it should become is asked of the process that
serves at ``SOCKET``, which forks; this one stays until the fork has ended, and takes it along. The fork has the
arguments, environment, streams, directory and view of the file system of who asked.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

SOCKET = "OUROBOROS_TESTS_PREFORK"
_LARGEST = 2**20
_NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000}
_OWN = ("orchestration", "actors", "pipelines", "policies", "tests")
_LIBRARIES = ["mlflow", "sentence_transformers", "peft", "scipy.stats", "scipy.optimize", "PIL.Image"]
_LIBRARIES += ["diffusers", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"]
_LIBRARIES += ["diffusers.models.unets.unet_2d", "transformers.models.blip.modeling_blip"]
_LIBRARIES += ["transformers.models.blip.processing_blip", "transformers.models.clip.modeling_clip"]
_LIBRARIES += ["pipelines.rl.policy", "pipelines.rl.learning", "pipelines.captioner", "pipelines.measures.evaluator"]
_LIBRARIES += ["pipelines.rewards.text", "pipelines.rewards.images", "pipelines.rewards.jpeg", "pipelines.mad.tasks"]


def become() -> None:
    """What Ray starts: ask for a fork with these arguments, environment and streams."""
    script, path = sys.argv[1], sys.path[1:]
    options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv if each.startswith("--") and "=" in each)
    context = json.loads(options.get("serialized-runtime-env-context", "{}"))
    environ = os.environ | {name: os.path.expandvars(each) for name, each in context.get("env_vars", {}).items()}
    path = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each and each not in path] + path
    wanted = {"argv": sys.argv[1:], "environ": environ, "path": [os.path.dirname(script), *path], "anew": False}
    wanted["cwd"] = os.getcwd()
    if prefix := context.get("command_prefix"):  # the program is the one that was brought to this node
        _, wanted["cwd"], _ = (shlex.split(each)[0] for each in prefix)
        wanted["anew"] = True
    with _asking() as asked:
        views = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]
        socket.send_fds(asked, [json.dumps(wanted).encode()], [0, 1, 2, *views])
        asked.recv(1)  # until the fork has ended


def forks() -> dict[int, int]:
    """By the process that Ray started, the fork that lives for it."""
    with _asking() as asked:
        asked.send(b"forks")
        return {int(asker): fork for asker, fork in json.loads(asked.recv(_LARGEST)).items()}


def family(process: Any) -> list[Any]:
    """The processes that a ``psutil.Process`` started, those that these started, and so on, their forks among them."""
    import psutil

    found = process.children(recursive=True)
    forked = forks() if SOCKET in os.environ else {}
    for pid in [forked[each.pid] for each in found if each.pid in forked]:
        with contextlib.suppress(psutil.NoSuchProcess):
            fork = psutil.Process(pid)
            found += [fork, *fork.children(recursive=True)]
    return found


def _asking() -> socket.socket:
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked.connect(f"\0{os.environ[SOCKET]}")  # a name that is in no file system, as not all have the same view of one
    return asked


def serve(place: str) -> None:
    """Import the libraries, then fork for everyone who asks, until standard input ends."""
    import gc
    import importlib
    import selectors
    import signal

    for name in _LIBRARIES:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads would not survive a fork"
    gc.collect()
    gc.freeze()
    waiting = selectors.DefaultSelector()
    forks: dict[int, tuple[int, socket.socket]] = {}  # by what is read once a fork has ended: its pid, who asked for it
    credentials = socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(f"\0{place}")
        door.listen(64)
        print("ready", flush=True)
        waiting.register(0, selectors.EVENT_READ)
        waiting.register(door, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in waiting.select()}
            if 0 in ready:
                for pid, _ in forks.values():
                    os.kill(pid, signal.SIGKILL)
                return
            for ended, (pid, asked) in [*forks.items()]:
                if ended in ready:
                    os.waitpid(pid, 0)
                    for each in (ended, asked):
                        waiting.unregister(each)
                    os.close(ended)
                    asked.close()
                    del forks[ended]
                elif asked.fileno() in ready:  # who asked was killed
                    os.kill(pid, signal.SIGKILL)
            if door.fileno() in ready:
                asked, _ = door.accept()
                said, streams, _, _ = socket.recv_fds(asked, _LARGEST, 3 + len(_NAMESPACES))
                if not streams:
                    askers = {
                        struct.unpack("3i", each.getsockopt(*credentials))[0]: pid for pid, each in forks.values()
                    }
                    with contextlib.suppress(OSError):  # who asked is gone
                        asked.send(json.dumps(askers).encode())
                    asked.close()
                    continue
                if (pid := os.fork()) == 0:
                    waiting.close()
                    door.close()
                    for ended, (_, other) in forks.items():
                        os.close(ended)
                        other.close()
                    _run(json.loads(said), streams)
                for stream in streams:
                    os.close(stream)
                ended = os.pidfd_open(pid)
                forks[ended] = pid, asked
                waiting.register(ended, selectors.EVENT_READ)
                waiting.register(asked, selectors.EVENT_READ)


def _run(wanted: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Be, in a fork, the script that was asked for."""
    import importlib
    import runpy
    import traceback

    code = 1
    try:
        os.setpgid(0, 0)  # a raylet kills the group of a worker that has ended
        for view, (kind, flag) in zip(streams[3:], _NAMESPACES.items(), strict=True):
            _enter(view, kind, flag)
        for number, stream in enumerate(streams[:3]):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(wanted["environ"])
        os.chdir(wanted["cwd"])
        sys.path[:] = wanted["path"]
        if wanted["anew"]:
            for name in [each for each in sys.modules if each.partition(".")[0] in _OWN]:
                del sys.modules[name]
            importlib.invalidate_caches()
        sys.argv = [each for each in wanted["argv"] if not each.startswith(("--serialized-runtime-env", "--language"))]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
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
def preloaded() -> Iterator[None]:
    """In this block a Ray that this process starts has its workers forked; what else may, is said above."""
    import secrets
    import subprocess
    from functools import partial

    from ray._private import parameter

    names: dict[str, Any] = vars(parameter)
    place = f"ouroboros-{secrets.token_hex(8)}"
    # The long word is room for the titles that workers give themselves.
    command = [sys.executable, __file__, "serve", place, "-" * 200]
    quiet = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread would not survive a fork
    server: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet)
    whole = names["RayParams"]
    names["RayParams"] = partial(whole, setup_worker_path=__file__)
    os.environ[SOCKET] = place
    try:
        assert server.stdout.readline() == b"ready\n"
        yield
    finally:
        del os.environ[SOCKET]
        names["RayParams"] = whole
        server.stdin.close()
        server.wait()


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """What a command needs so that a Ray that it starts has its workers forked, if this process has; see
    ``preloading/sitecustomize.py``."""
    if SOCKET not in os.environ:
        return dict(before)
    places = [os.path.join(os.path.dirname(__file__), "preloading"), *filter(None, [before.get("PYTHONPATH")])]
    return {**before, SOCKET: os.environ[SOCKET], "PYTHONPATH": os.pathsep.join(places)}


def settings(directory: str) -> dict[str, str]:
    """Ray's for a node with ``directory``, where this file can be found also if the node does not see the checkout."""
    return {"setup_worker_path": shutil.copy(__file__, directory)} if SOCKET in os.environ else {}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        serve(sys.argv[2])
    else:
        become()
