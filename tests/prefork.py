"""Ray's worker processes as forks of one that has imported the models' libraries already: seconds less for each.

A worker that is started afresh imports torch, diffusers and transformers, which is most of what a run of tiny models
costs. In the Ray that tests start in their own process, workers come from :func:`preloaded` instead; all else of Ray is
as ever. Commands that tests start as a person would are left alone.

Ray starts this file as it would start its own ``setup_worker.py``. What it should become is asked of the process that
serves at ``SOCKET``, which forks; this one stays until the fork has ended, and takes it along.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

SOCKET = "OUROBOROS_TESTS_PREFORK"
_LARGEST = 2**20
_LIBRARIES = ["mlflow", "sentence_transformers", "peft", "scipy.stats", "scipy.optimize", "PIL.Image"]
_LIBRARIES += ["diffusers", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"]
_LIBRARIES += ["diffusers.models.unets.unet_2d", "transformers.models.blip.modeling_blip"]
_LIBRARIES += ["transformers.models.blip.processing_blip", "transformers.models.clip.modeling_clip"]
_LIBRARIES += ["pipelines.rl.policy", "pipelines.rl.learning", "pipelines.captioner", "pipelines.measures.evaluator"]
_LIBRARIES += ["pipelines.rewards.text", "pipelines.rewards.images", "pipelines.rewards.jpeg", "pipelines.mad.tasks"]


def become() -> None:
    """What Ray starts: ask for a fork with these arguments, environment and streams."""
    script = sys.argv[1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        asked.connect(os.environ[SOCKET])
        path = [os.path.dirname(script), *sys.path[1:]]
        wanted = {"argv": sys.argv[1:], "environ": dict(os.environ), "cwd": os.getcwd(), "path": path}
        socket.send_fds(asked, [json.dumps(wanted).encode()], [0, 1, 2])
        asked.recv(1)  # until the fork has ended


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(place)
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
                said, streams, _, _ = socket.recv_fds(asked, _LARGEST, 3)
                if not said:
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
    import runpy
    import traceback

    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        options = dict(each.removeprefix("--").split("=", 1) for each in wanted["argv"] if "=" in each)
        context = json.loads(options.get("serialized-runtime-env-context", "{}"))
        os.environ.clear()
        os.environ.update(wanted["environ"] | context.get("env_vars", {}))
        os.chdir(wanted["cwd"])
        sys.path[:] = wanted["path"]
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


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """In this block a Ray that this process starts has its workers forked."""
    import subprocess
    import tempfile
    from functools import partial

    from ray._private import parameter

    names: dict[str, Any] = vars(parameter)
    with tempfile.TemporaryDirectory() as directory:
        place = f"{directory}/door"
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


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        serve(sys.argv[2])
    else:
        become()
