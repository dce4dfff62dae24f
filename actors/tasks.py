"""A graph of content-addressed tasks on Ray: each is submitted once, reads its inputs by reference, is stored once.

Workers hold no state and need no shared disk: a task gets its inputs' files and returns its own. Ray repeats a task
whose worker died; the driver alone writes, so a result is in the store whole or not at all.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray import ObjectRef

from actors.allocation import mark
from actors.failures import ActorLost, result
from actors.pool import POLL_SECONDS
from actors.stuck_workers import StuckWorkerMonitor
from actors.worker import end_if_lost
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import Task, TaskStore, in_order

WINDOW = 256  # tasks given to Ray at once; the rest wait here
COMMIT_SECONDS = 60.0  # between two commits of a training that several workers share
_RETRIES = 3  # of a task whose worker died; a task that raises is not repeated

Result = tuple[str, Files]  # a task's key, and what it made: a task is given nothing but what it asked for
Work = Callable[[str, dict[str, Any], list[Files], str], Files]  # (kind, parameters, inputs, device) → files


class TaskRunner:
    """Runs tasks that are not in ``store`` yet, as many at once as the cluster has room for."""

    def __init__(
        self,
        work: Work,
        store: TaskStore,
        cpus: float,
        gpus: float,
        timeout: float,
        nodes: str | None = None,
        train_workers: tuple[int, int] = (1, 1),
    ) -> None:
        self._store, self._timeout = store, timeout
        self.monitor = StuckWorkerMonitor()  # called by the driver while it waits
        self._device = "cuda" if gpus else "cpu"
        remote: Any = ray.remote(perform)
        taken = {"num_cpus": cpus, "num_gpus": gpus, "resources": mark(nodes)}
        often = {"max_retries": _RETRIES, "num_returns": 2}
        self._remote: Any = remote.options(**taken, **often)
        self._divided: Any = self._remote
        if train_workers[1] > 1:
            from actors.train_group import TrainGroup, divided

            at = store.directory.parent / "training"
            each = {"CPU": cpus, **mark(nodes)}
            group = TrainGroup(train_workers, each, bool(gpus), timeout, str(at), COMMIT_SECONDS, _RETRIES)
            self._divided = divided(group, **often)
        self._work = ray.put(work)
        self._references: dict[str, ObjectRef] = {}
        self._pending: dict[ObjectRef, Task] = {}

    def run(self, tasks: Iterable[Task], meanwhile: Callable[[], None] = lambda: None) -> Iterator[Task]:
        """Yields every task of the graph once its result is stored.

        Raises ActorFailure naming the task that failed, ActorLost if none finishes for ``timeout`` seconds or a worker
        died too often. What is stored by then stays, and another runner goes on from it.
        """
        order = list(in_order(tasks))
        to_do = self._store.to_do(order)
        self._consumers = Counter(each.key for task in order for each in task.inputs)
        for task in order:
            if task.key not in to_do:
                self._release(task)
                yield task
                continue
            while len(self._pending) >= WINDOW:
                yield from self._finished(meanwhile)
            given = dict(task.parameters), self._device, [each.key for each in task.inputs]
            inputs = map(self._reference, task.inputs)
            remote = self._divided if task.divisible else self._remote
            about, self._references[task.key] = remote.remote(self._work, task.key, task.kind, *given, *inputs)
            self._pending[about] = task
        while self._pending:
            yield from self._finished(meanwhile)

    def activity(self) -> dict[str, str]:
        """How many tasks of each kind can run or are running, and how many wait for others."""
        tasks = self._pending.values()
        known = {task.key for task in tasks}
        waiting = Counter(task.kind for task in tasks if any(each.key in known for each in task.inputs))
        total = Counter(task.kind for task in tasks)
        return {
            kind: f"{total[kind] - waiting[kind]} running or ready, {waiting[kind]} waiting" for kind in sorted(total)
        }

    def _reference(self, task: Task) -> ObjectRef:
        """The files of a task that is under way, or that was done before."""
        if task.key not in self._references:
            self._references[task.key] = ray.put((task.key, self._store.load(task.key)))
        return self._references[task.key]

    def _release(self, task: Task) -> None:
        """Note that a task needs its inputs no longer, and let go of what no other will ask for."""
        for each in task.inputs:
            self._consumers[each.key] -= 1
            self._let_go(each)

    def _let_go(self, task: Task) -> None:
        # One that is done again, and what was made of it was seen first, goes when its own turn comes.
        done = all(each.key != task.key for each in self._pending.values()) and task.key in self._store
        if done and not self._consumers[task.key]:
            self._references.pop(task.key, None)
            if not task.kept and not self._store.about(task.key).get("forgotten"):
                self._store.forget(task.key)

    def _finished(self, meanwhile: Callable[[], None]) -> Iterator[Task]:
        """Wait for some tasks, and commit them."""
        deadline = time.monotonic() + self._timeout
        done: list[ObjectRef] = []
        while not done:
            if time.monotonic() > deadline:
                first = next(iter(self._pending.values())).label
                for reference in self._pending:  # a task that hangs would hold its place
                    ray.cancel(reference, force=True)
                raise ActorLost(f"{first}: nothing finished within {self._timeout:g} s (workers.timeout_seconds)")
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=POLL_SECONDS)
            meanwhile()
        more, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        for reference in more:
            task = self._pending.pop(reference)
            about, found = result(reference, task.label), result(self._references[task.key], task.label)
            self._store.commit(task, _files_of(task.key, found), about | {"finished_at_ms": int(time.time() * 1000)})
            yield task
            self._release(task)
            self._let_go(task)


def _files_of(key: str, found: Result) -> Files:
    """What the task of ``key`` made. Raises RuntimeError if it is another's: objects that processes gave one name."""
    if found[0] != key:
        raise RuntimeError(f"asked for the result of task {key}, Ray gave that of {found[0]}")
    return found[1]


def perform(
    work: Work, key: str, kind: str, parameters: dict[str, Any], device: str, asked: list[str], *inputs: Result
) -> tuple[dict[str, Any], Result]:
    """In a worker: do one task, and note what it took."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        files = work(kind, parameters, list(map(_files_of, asked, inputs)), device)
    except Exception as error:
        end_if_lost(error)
        raise
    spent = {"wall_seconds": round(time.monotonic() - wall, 4), "cpu_seconds": round(time.process_time() - cpu, 4)}
    return {**spent, "device": device}, (key, files)
