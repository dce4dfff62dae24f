"""Runs whose tasks are done here, one after the other: what is looked at afterwards needs no Ray to be made."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from pipelines.storage.tasks import Task, in_order


@contextmanager
def one_by_one() -> Iterator[None]:
    """Within it runs of tasks do without workers."""
    from orchestration.experiments.task_run import TaskRun

    def perform(run: TaskRun, work: Any, tasks: Sequence[Task], gpus: int, resources: Mapping[str, Any]) -> None:
        for each in in_order(tasks):
            if each.key not in run.store:  # real data are
                files = work(each.kind, each.parameters, [run.store.load(one.key) for one in each.inputs], "cpu")
                run.store.commit(each, files, {"finished_at_ms": int(time.time() * 1000), "cpu_seconds": 0.1})
            run.record(each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskRun, "perform", perform)
        yield
