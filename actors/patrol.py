"""Worker processes that were stopped are ended, so that Ray replaces them.

Ray notices a process that died, but waits without end for one that was stopped (SIGSTOP, a debugger that let go of it).
So every node looks after its own: a task that finds a stopped worker of this job, and still finds it stopped a moment
later, kills it. Nodes themselves are watched by Ray.
"""

import contextlib
import os
import time
from typing import Any

import psutil
import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ROUND_SECONDS = 2.0
_MOMENT_SECONDS = 0.5  # a process that is stopped on purpose for less is left alone
_LATE_SECONDS = 5.0  # a round that is not back by then was itself stopped: the next one finds it


class Patrol:
    """Called again and again by whoever waits, it sends a round to every node every two seconds."""

    def __init__(self) -> None:
        self._under_way: dict[str, tuple[ObjectRef, float]] = {}
        self._next = 0.0

    def __call__(self) -> list[str]:
        """What was ended since the last call, in words."""
        now, ended = time.monotonic(), []
        for node, (reference, since) in list(self._under_way.items()):
            if ray.wait([reference], timeout=0)[0] or now - since > _LATE_SECONDS:
                del self._under_way[node]
                ended += _result(reference)
        if now >= self._next:
            self._next = now + ROUND_SECONDS
            here: Any = ray.remote(_end_stopped)
            for node in (each["NodeID"] for each in ray.nodes() if each["Alive"]):
                if node not in self._under_way:
                    place = NodeAffinitySchedulingStrategy(node, soft=False)
                    round_there = here.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote()
                    self._under_way[node] = round_there, now
        return ended


def _end_stopped() -> list[str]:
    """In a worker of some node: end this job's stopped processes there. Returns what they were."""
    found = _stopped()
    if found:
        time.sleep(_MOMENT_SECONDS)
        found = {process: name for process, name in _stopped().items() if process in found}
    for process in found:
        process.kill()
    return [f"{name.removeprefix('ray::')} (process {process.pid})" for process, name in found.items()]


def _stopped() -> dict[psutil.Process, str]:
    """This job's stopped processes among the children of this node's raylet, and what they are called."""
    job, raylet = os.environ.get("RAY_JOB_ID"), psutil.Process().parent()
    found = {}
    for process in raylet.children() if raylet else []:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or is somebody else's
            if process.status() == psutil.STATUS_STOPPED and process.environ().get("RAY_JOB_ID") == job:
                found[process] = process.name()
    return found


def _result(reference: ObjectRef) -> list[str]:
    try:
        return list(ray.get(reference, timeout=0))
    except (ray.exceptions.RayError, TimeoutError):  # its node or its worker is gone: the next round will see
        return []
