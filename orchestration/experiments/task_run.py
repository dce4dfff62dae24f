"""A run of content-addressed tasks: its store, and the way of what comes in to the terminal and to MLflow.

The store is the truth. A rerun reads what is there, in whatever order it was made; MLflow drops points it knows, so
each is there once.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from actors.failures import ActorLost
from actors.tasks import TaskRunner, Work
from orchestration.cluster.ray_cluster import connected
from orchestration.runs.run import Run, ending
from orchestration.tracking.tracker import Tracker
from pipelines.figures.mad import ARM_COLOURS
from pipelines.storage.tasks import Task, TaskStore

MOST_SEED_RUNS = 20  # beyond this many seeds, MLflow gets the arms' means and summary.json the rest
_FLUSH_SECONDS = 2.0


class TaskRun(Run):
    """An experiment, new or the one that its directory holds: the directory appears when it is made, nothing before."""

    def __init__(self, directory: Path, config: Any, manifest: dict[str, Any], total: int, **shown: Any) -> None:
        super().__init__(directory, config, manifest, total, **shown)
        self.store = TaskStore(directory / "tasks")
        self._trackers: dict[str, Tracker] = {}  # of arms and of their seeds
        self._unsent: dict[str, list[tuple[int, Mapping[str, float], int]]] = defaultdict(list)  # by tracker
        self._flushed_at = time.monotonic()
        self._done = 0
        self._recorded: set[str] = set()  # keys

    def perform(self, work: Work, tasks: Sequence[Task], gpus: int, resources: Mapping[str, Any]) -> None:
        """Do what of ``tasks`` is not stored yet, and take in the results of all. Workers that are lost cost what they
        were doing. Raises ActorFailure or ActorLost if the run comes no further."""
        while True:
            try:
                with connected(gpus, self.display.remedy):
                    runner = TaskRunner(work, self.store, **resources)
                    for task in runner.run(tasks, lambda runner=runner: self.watch(runner)):  # type: ignore[misc]
                        self.record(task)
                    return
            except ActorLost as lost:
                self.withstand(lost, at=len(self._recorded))
                self.display.say(f"{lost}; going on with what is stored")

    def open_arms(self, arms: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]], seeds: Sequence[int]) -> None:
        """Open the runs below this one: an arm each, of its parameters and tags, and below it a seed each if few."""
        known = self.manifest.setdefault("mlflow_children", {})
        for (name, (parameters, tags)), colour in zip(arms.items(), cycle(ARM_COLOURS), strict=False):
            parent = self._trackers[_key(name)] = self.tracker.child(name, known.get(_key(name)))
            common = {"loop": self.manifest["loop"], "arm": name, "git_commit": self.manifest["git_commit"], **tags}
            as_in_figures = {"mlflow.runColor": colour}  # MLflow's own choice may be the same for two arms
            parent.describe(parameters, common | as_in_figures)
            for seed in seeds if len(seeds) <= MOST_SEED_RUNS else []:
                key = _key(name, seed)
                child = self._trackers[key] = parent.child(f"{name} · seed {seed}", known.get(key))
                child.describe({"seed": seed}, {**common, "seed": str(seed)})
        known.update({key: tracker.run_id for key, tracker in self._trackers.items()})
        self._status("RUNNING")

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:  # else the next session sends everything, and this one has to end now
                self.flush()
            for tracker in self._trackers.values():
                tracker.finish(ending(error[0]))
        finally:
            super().__exit__(*error)

    def tracker_of(self, arm: str, seed: int | None = None) -> Tracker | None:
        """The MLflow run of an arm, or of one of its seeds; None where seeds are too many to have their own."""
        return self._trackers.get(_key(arm, seed))

    def watch(self, runner: TaskRunner) -> None:
        """Called while tasks run: show what runs, and send what has come in."""
        self.display.activity({short(kind): state for kind, state in runner.activity().items()})
        for ended in runner.monitor():
            self.display.say(f"{ended} had stopped: it was ended, to be replaced")
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def record(self, task: Task) -> None:
        """Take in the result of a task, once: show it, and note it for MLflow."""
        if task.key in self._recorded:
            return
        self._recorded.add(task.key)
        about = self.store.about(task.key)
        for name in ("wall", "cpu"):
            self.seconds_by_stage[f"{short(task.kind)}/{name}"] += about.get(f"{name}_seconds", 0.0)
        self.taken(task, about.get("finished_at_ms", 0))  # real data came from no task

    def taken(self, task: Task, timestamp_ms: int) -> None:
        """What an experiment does with a result, once."""
        raise NotImplementedError

    def note(self, arm: str, seed: int | None, step: int, values: Mapping[str, float], timestamp_ms: int) -> None:
        """Keep a point of an arm, or of one of its seeds, for the next flush; what is no number is left out."""
        if (key := _key(arm, seed)) in self._trackers:
            finite = {name: value for name, value in values.items() if np.isfinite(value)}
            self._unsent[key].append((step, finite, timestamp_ms))

    def advance(self, metrics: Mapping[str, float], note: str) -> None:
        """One more of the run's steps is done, and shown."""
        self._done += 1
        self.manifest["committed_step"] = self._done
        self.display.step(self._done, metrics, note=note)

    def flush(self) -> None:
        """Send what has come in to MLflow, and note in the manifest how far the run is."""
        for key, steps in self._unsent.items():
            self._trackers[key].many_metrics(steps)
        self._unsent.clear()
        self._status("RUNNING")
        self._flushed_at = time.monotonic()


def short(kind: str) -> str:
    """A kind of task for people: of an import path, the function."""
    return kind.rpartition(":")[2]


def _key(arm: str, seed: int | None = None) -> str:
    """What the MLflow run of an arm, or of one of its seeds, is known by here: no two by the same."""
    return f"{'' if seed is None else seed}/{arm}"
