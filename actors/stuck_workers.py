"""Worker processes that were stopped are ended, so that Ray replaces them.

Ray notices a process that died, but waits without end for one that was stopped (SIGSTOP, a debugger that let go of it).
So a watchman on every node looks after its neighbours, and the driver after the watchmen. Nodes themselves are Ray's
business.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_DELAY_SECONDS = 15.0  # a run that is over by then does without
_ASK_SECONDS = 2.0
_SILENT_SECONDS = 20.0  # a watchman that does not answer for so long was stopped itself
_NO_JOB, _MARK = "ffffffff", ":job_id:"


class Watchman:
    """The actor: it ends workers of this job, children of what started this one, that are stopped at two looks."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()
        self._job = ray.get_runtime_context().get_job_id()
        node: Any = ray._private.worker._global_node
        self._logs = Path(node.get_logs_dir_path())

    def look(self) -> list[str]:
        """End what is stopped and was at the last look. Returns what was ended, in words."""
        now, ended = self._stopped(), []
        for process in self._before & now.keys():
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.append(f"{now.pop(process).removeprefix('ray::')} (process {process.pid})")
        self._before = set(now)  # without what was killed, which may take a moment to be gone
        return ended

    def _stopped(self) -> dict[psutil.Process, str]:
        """Stopped workers, and what they are called."""
        parent, found = psutil.Process().parent(), {}
        for process in parent.children() if parent else []:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if process.status() == psutil.STATUS_STOPPED and self._works_here(process):
                    found[process] = process.name()
        return found

    def _works_here(self, process: psutil.Process) -> bool:
        """Whether a worker is this job's. One that was started before it was known for which job says so in its log."""
        job = process.environ().get("RAY_JOB_ID", _NO_JOB)  # none where it is a fork
        if job == _NO_JOB:
            logs = [path.read_text(errors="replace") for path in self._logs.glob(f"worker-*-{process.pid}.err")]
            job = next((line.removeprefix(_MARK) for log in logs for line in log.splitlines() if _MARK in line), None)
        return job == self._job


class StuckWorkerMonitor:
    """The driver's watchmen, one on every node. It is called again and again while the driver waits."""

    def __init__(self) -> None:
        # Of each node its watchman, the answer that is waited for, and since when.
        self._watchmen: dict[str, tuple[Any, Any, float]] = {}
        self._next = time.monotonic() + _DELAY_SECONDS

    def __call__(self) -> list[str]:
        """What was ended since the last call, in words."""
        now, ended = time.monotonic(), []
        if now < self._next:
            return []
        late = now - self._next > _ASK_SECONDS  # this process was itself held up: no watchman is silent because of that
        self._next = now + _ASK_SECONDS
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in self._watchmen.keys() - alive:
            del self._watchmen[node]
        for node in alive - self._watchmen.keys():
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            actor: Any = ray.remote(Watchman)
            watchman = actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=place).remote()
            self._watchmen[node] = watchman, watchman.look.remote(), now
        for node, (watchman, answer, since) in self._watchmen.items():
            if ray.wait([answer], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):  # it died: Ray starts another
                    ended += ray.get(answer)
            elif late or now - since <= _SILENT_SECONDS:
                self._watchmen[node] = watchman, answer, now if late else since
                continue
            else:
                ray.kill(watchman, no_restart=False)
            self._watchmen[node] = watchman, watchman.look.remote(), now
        return ended

    def end(self) -> None:
        """Send the watchmen home."""
        for watchman, *_ in self._watchmen.values():
            with contextlib.suppress(Exception):
                ray.kill(watchman)
