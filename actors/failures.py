"""What can go wrong in an actor or a task, in words: the first cause, and the last lines of its log."""

import re
from pathlib import Path
from typing import Any, NoReturn

import ray

from policies.common.user_code import noted
from policies.rl.health import DegenerateBatch, ShortOfMemoryError

_LINES = 10  # of a dead process's log
_GET_SECONDS = 25.0
# In the errors of torch.distributed.
MARKS_OF_A_PEER = ("gloo/transport", "DistBackendError", "DistNetworkError", "DistStoreError")

# A GPU without memory, or one that failed: what ran there can begin anew, on a card that nothing holds yet.
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
    kind, words = _in_words(error)
    raise noted(kind(f"{what}: {words}"), getattr(error, "cause", error)) from error


def _in_words(error: Exception) -> tuple[type[Exception], str]:
    """What an error of Ray's is raised as, and its first cause."""
    lines = [line for line in str(error).splitlines() if line and not line[0].isspace()]  # notes are indented
    said, last = " ".join(str(error).split()), lines[-1] if lines else ""
    if any(mark in said for mark in MARKS_OF_A_PEER):
        return ActorLost, f"another learner is gone or late: {last}"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, DegenerateBatch | ShortOfMemoryError):
            return DegenerateBatch if isinstance(cause, DegenerateBatch) else MicroBatchTooLarge, str(cause)
        if isinstance(cause, ray.exceptions.RayError) and cause is not error:  # what it was to work on is gone
            return ActorLost, f"{type(cause).__name__}: {_short(str(cause))}"
        words = f"{type(cause).__name__}: {cause}"
        return _kind(words), words
    if getattr(error, "actor_init_failed", False):  # it says a traceback
        return _kind(said), last
    pid = re.search(r"\bpid: (\d+)", said, re.IGNORECASE)
    lines = last_lines(int(pid[1])) if pid else []
    return ActorLost, f"{type(error).__name__}: {_short(said)}" + "; its last lines: " * bool(lines) + " | ".join(lines)


def _kind(words: str) -> type[ActorFailure]:
    """A GPU's error is a loss: its work begins anew. Another error would come again."""
    return ActorLost if any(mark in words for mark in _MARKS_OF_A_DEVICE) else ActorFailure


def last_lines(pid: int) -> list[str]:
    """The last lines of the log of a process that has ended, on whichever node it was; none if it said nothing."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tail: Any = ray.remote(_tail)
    places = [NodeAffinitySchedulingStrategy(each["NodeID"], soft=False) for each in ray.nodes() if each["Alive"]]
    asked = [tail.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(pid) for place in places]
    try:
        return [line for lines in ray.get(asked, timeout=_GET_SECONDS) for line in lines]
    except (ray.exceptions.RayError, TimeoutError):  # the cluster is going: the cause itself must still be said
        return []


def _tail(pid: int) -> list[str]:
    """In a worker: what the node's logs hold of a process."""
    node: Any = ray._private.worker._global_node
    paths = sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(":")][-_LINES:]  # ":" begins Ray's own marks


def _short(text: str) -> str:
    """Without Ray's advice on how to read its logs."""
    return text.split(" Some common causes include")[0][:600]
