"""What can go wrong in an actor or a task, in words: the first cause, and the last lines of its log."""

import re
from pathlib import Path
from typing import Any, NoReturn

import ray

from policies.rl.health import DegenerateBatch, ShortOfMemoryError

_LINES = 10  # of a dead process's log
_GET_SECONDS = 25.0
# In the errors of torch.distributed.
MARKS_OF_A_PEER = ("gloo/transport", "DistBackendError", "DistNetworkError", "DistStoreError")

# A GPU without memory, or one that failed: what ran there can begin anew, on a card that nobody holds yet.
_MARKS_OF_A_DEVICE = ("OutOfMemoryError", "AcceleratorError", "CUDA error")


class ActorFailure(RuntimeError):  # noqa: N818
    """Work that an actor could not do: the role, the first cause, and what to do."""


class ActorLost(ActorFailure):
    """An actor, or what it made, is gone for good: its process, its node, too many restarts, its answer."""


class MicroBatchTooLarge(ActorLost):
    """Learners that cannot go on as they are: the run begins anew from its last commit, with half of it."""


def result(reference: Any, what: str) -> Any:
    """The value of a reference that is ready. Raises ActorFailure if the work failed, ActorLost if its worker did."""
    try:
        return ray.get(reference, timeout=_GET_SECONDS)
    except ray.exceptions.RayError as error:
        _explain(error, what)


def _explain(error: Exception, what: str) -> NoReturn:
    if any(mark in str(error) for mark in MARKS_OF_A_PEER):
        raise ActorLost(f"{what}: another learner is gone or late: {str(error).strip().splitlines()[-1]}") from error
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, DegenerateBatch):
            raise DegenerateBatch(f"{what}: {cause}") from error
        if isinstance(cause, ShortOfMemoryError):
            raise MicroBatchTooLarge(f"{what}: {cause}") from error
        if isinstance(cause, ray.exceptions.RayError) and cause is not error:  # what it was to work on is gone
            raise ActorLost(f"{what}: {type(cause).__name__}: {_short(str(cause))}") from error
        kind = (
            ActorLost
            if any(mark in f"{type(cause).__name__}: {cause}" for mark in _MARKS_OF_A_DEVICE)
            else ActorFailure
        )
        raise kind(f"{what}: {type(cause).__name__}: {cause}") from error
    said = " ".join(str(error).split())
    if getattr(error, "actor_init_failed", False):  # a traceback
        raise _kind(said)(f"{what}: {str(error).strip().splitlines()[-1]}") from error
    pid = re.search(r"\bpid: (\d+)|Worker PID: (\d+)", said)
    words = last_words(int(pid[1] or pid[2])) if pid else []
    told = "; its last lines: " + " | ".join(words) if words else ""
    raise ActorLost(f"{what}: {type(error).__name__}: {_short(said)}{told}") from error


def _kind(said: str) -> type[ActorFailure]:
    """What an error that says so is: a GPU's is a loss, whose work begins anew, where another would come again."""
    return ActorLost if any(mark in said for mark in _MARKS_OF_A_DEVICE) else ActorFailure


def last_words(pid: int) -> list[str]:
    """The last lines of the log of a process that has ended, on whichever node it was; none if it said nothing."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tail: Any = ray.remote(_tail)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    asked = [tail.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(pid) for place in places]
    try:
        return [line for lines in ray.get(asked, timeout=_GET_SECONDS) for line in lines]
    except (ray.exceptions.RayError, TimeoutError):  # the cluster is going: the cause itself must still be told
        return []


def _tail(pid: int) -> list[str]:
    """In a worker: what the node's logs hold of a process."""
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path())
    lines = [
        line
        for path in sorted(logs.glob(f"worker-*-{pid}.err"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line.strip() and not line.startswith(":")][-_LINES:]  # ":" begins Ray's own marks


def _short(text: str) -> str:
    """Without Ray's advice on how to read its logs."""
    return text.split(" Some common causes include")[0][:600]
