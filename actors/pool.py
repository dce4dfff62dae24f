"""Actors of one role, and waiting for them: every wait has a bound, and says what it waits for."""

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.allocation import mark
from actors.failures import ActorLost, result
from actors.placement import Placed
from actors.worker import ACTIVITIES

POLL_SECONDS = 0.25


class Pool:
    """The members of one role. Any member may do any piece of work; the least busy gets it.

    A member whose process ends is started again by Ray, ``RESTARTS`` times at most, and its unfinished work is done
    again: what a member makes has to follow from what it is given, whichever member it is and however often it began.
    """

    RESTARTS: ClassVar[int] = 20

    def __init__(self, placed: Placed, worker: type, *arguments: Any, own: Sequence[Any] = ()) -> None:
        """Every member is a ``worker`` made of ``arguments``, its device, its threads, and what is its ``own``."""
        self.role = role = placed.role
        options = {"num_cpus": role.cpus, "num_gpus": role.gpus, "resources": mark(role.node)}
        # Without a bound of their own, as Ray tries again and again before it knows that a node is gone.
        options |= {"max_restarts": self.RESTARTS, "max_task_retries": -1 if self.RESTARTS else 0}
        actor: Any = ray.remote(worker)
        given = *arguments, role.device, role.threads
        self.members: list[ActorHandle] = [
            actor.options(**options, scheduling_strategy=place).remote(*given, *own[number : number + 1])
            for number, place in enumerate(placed.places)
        ]
        self._pending: list[dict[ObjectRef, str]] = [{} for _ in self.members]

    def submit(self, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Give one call to the least busy member. Returns its reference, or a list of ``returns`` references."""
        self._forget_finished()
        least_busy = min(range(len(self.members)), key=lambda member: len(self._pending[member]))
        return self._call(least_busy, method, arguments, returns)

    def everyone(self, method: str, *arguments: Any, returns: int = 1) -> list[Any]:
        """The same call to every member. Returns what :meth:`submit` does, for each."""
        return [self._call(member, method, arguments, returns) for member in range(len(self.members))]

    def _call(self, member: int, method: str, arguments: Sequence[Any], returns: int) -> Any:
        references = getattr(self.members[member], method).options(num_returns=returns).remote(*arguments)
        self._pending[member][references if returns == 1 else references[0]] = method
        return references

    def activity(self) -> dict[str, str]:
        """What each member does now."""
        self._forget_finished()
        return {name: _describe([*pending.values()]) for name, pending in zip(self.names, self._pending, strict=True)}

    @property
    def names(self) -> list[str]:
        """What each member is called."""
        role = self.role
        return [role.name if role.count == 1 else f"{role.name} {number}" for number in range(role.count)]

    def _forget_finished(self) -> None:
        for pending in self._pending:
            if pending:
                for reference in ray.wait(list(pending), num_returns=len(pending), timeout=0)[0]:
                    del pending[reference]


def _describe(methods: list[str]) -> str:
    """The call at the head of a queue, and how many wait behind it."""
    if not methods:
        return "idle"
    behind = f", {len(methods) - 1} more" if len(methods) > 1 else ""
    return ACTIVITIES.get(methods[0], methods[0]) + behind


def wait_for(
    references: Sequence[ObjectRef], what: str, timeout: float, meanwhile: Callable[[], None] = lambda: None
) -> list[Any]:
    """The values of ``references``, in order. ``meanwhile`` is called a few times a second.

    Raises ActorFailure or ActorLost with the first cause as soon as one fails, and ActorLost after ``timeout`` seconds
    in which none finished: what hangs in its work will not come back from it.
    """
    pending, deadline = list(references), time.monotonic() + timeout
    while pending:
        finished, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
        for reference in finished:
            result(reference, what)
        if finished:
            deadline = time.monotonic() + timeout
        elif time.monotonic() > deadline:
            raise ActorLost(f"{what}: nothing finished within {timeout:g} s (actors.timeout_seconds)")
        meanwhile()
    return [result(reference, what) for reference in references]
