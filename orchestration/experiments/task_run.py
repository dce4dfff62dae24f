"""A run of content-addressed tasks: where it may go, its store, and the way of results to the terminal and to MLflow.

The store is the truth. A rerun reads what is there, in whatever order it was made; MLflow drops points it knows, so
each is there once.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from actors.allocation import check_kind
from actors.failures import ActorLost
from actors.settings import WorkerSettings
from actors.tasks import TaskRunner, Work
from orchestration.cluster.ray_cluster import Machine, connected, find_machine
from orchestration.experiments.settings import TaskRunSettings
from orchestration.runs.display import Row
from orchestration.runs.inputs import Inputs, accept
from orchestration.runs.manifest import has_only_begun, known_manifest, new_manifest, open_run
from orchestration.runs.run import Run, check_output, ending, new_directory
from orchestration.tracking.tracker import FIRST_LOOK, Tracker
from pipelines.figures.style import ARM_COLOURS, PALE
from pipelines.storage.tasks import Task, TaskStore
from policies.common.intervals import Scale, interval, scale_of

MOST_SEED_RUNS = 20  # beyond this many seeds, MLflow gets the arms' means and summary.json the rest
_FLUSH_SECONDS = 2.0

Arms = Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]  # by name: parameters and tags


class TaskRun(Run):
    """An experiment of arms × seeds, new or the one that its directory holds: the directory appears when it is made,
    nothing before.

    ``about`` goes into the manifest, its "loop" and "total_steps" among it; of the metrics ``first`` MLflow shows the
    arms' means up front. ``given`` are ``trusted`` and ``changes``, as in ``run_NAME``.
    """

    def __init__(
        self, config: Any, about: dict[str, Any], inputs: Inputs, rows: Sequence[Row], unit: str, *given: bool
    ) -> None:
        trusted, changes = given
        directory = new_directory(config)
        held = open_run(directory, trusted) if (directory / "manifest.json").exists() else {}
        manifest = new_manifest(config=config, held=held, committed_step=0, **about)
        accept(directory, manifest, held, inputs, changes)
        super().__init__(directory, config, manifest, about["total_steps"], rows=rows, unit=unit)
        self.first = [row.key for row in rows]
        self.store = TaskStore(directory / "tasks")
        self._trackers: dict[tuple[str, int | None], Tracker] = {}  # of arms (None) and of their seeds
        self._unsent: dict[tuple[str, int | None], list[tuple[int, Mapping[str, float], int]]] = defaultdict(list)
        self._flushed_at = time.monotonic()
        self._done = 0
        self._recorded: set[str] = set()  # keys

    def perform(self, work: Work, tasks: Sequence[Task], gpus: int, resources: Mapping[str, Any]) -> None:
        """Do those of ``tasks`` that are not stored yet, and take in the results of all. Workers that are lost cost
        what they were doing. Raises ActorFailure or ActorLost if the run comes no further."""
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

    def open_arms(self, arms: Arms) -> None:
        """Open the runs below this one: an arm each, of its parameters and tags, and below it a seed each if few."""
        known, seeds = self.manifest.setdefault("mlflow_children", {}), self.config.seed_list
        for (name, (parameters, tags)), colour in zip(arms.items(), cycle([*ARM_COLOURS, *PALE]), strict=False):
            parent = self._trackers[name, None] = self.tracker.child(name, known.get(_key(name, None)))
            common = {"loop": self.manifest["loop"], "arm": name, "git_commit": self.manifest["git_commit"], **tags}
            as_in_figures = {"mlflow.runColor": colour}  # MLflow's own choice may be the same for two arms
            parent.describe(parameters, common | as_in_figures)
            for seed in seeds if len(seeds) <= MOST_SEED_RUNS else []:
                child = parent.child(f"{name} · seed {seed}", known.get(_key(name, seed)))
                child.describe({"seed": seed}, {**common, "seed": str(seed)})
                self._trackers[name, seed] = child
        known.update({_key(*key): tracker.run_id for key, tracker in self._trackers.items()})
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
        return self._trackers.get((arm, seed))

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
        if (arm, seed) in self._trackers:
            finite = {name: value for name, value in values.items() if np.isfinite(value)}
            self._unsent[arm, seed].append((step, finite, timestamp_ms))

    def scale(self, metric: str) -> Scale:
        """The scale of a metric's seeds, of which its means and intervals are."""
        return scale_of(metric)

    def note_means(
        self, arm: str, step: int, values: Mapping[str, np.ndarray], timestamp_ms: int, more: Mapping[str, float]
    ) -> None:
        """Keep an arm's means over its seeds of ``values`` (seeds,) each, with their intervals, and what is known
        ``more``."""
        for name, of_seeds in values.items():
            mean, low, high = map(float, interval(of_seeds, self.scale(name)))
            more = {**more, name: mean, f"interval/{name}_low": low, f"interval/{name}_high": high}
            more |= {f"{FIRST_LOOK}/{name}": mean} if name in self.first else {}
        self.note(arm, None, step, more, timestamp_ms)

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


def check_same(loop: str, config: TaskRunSettings, differing: Callable[[dict[str, Any]], list[str]]) -> None:
    """A directory may hold the same experiment, or a smaller one; what is there is never overwritten by another.

    ``differing`` are the keys in which a configuration that is held differs. Raises ValueError.
    """
    directory = Path(config.output_dir or "").expanduser()
    manifest = known_manifest(directory) if config.output_dir else {}
    if not manifest or has_only_begun(directory):
        return check_output(config.output_dir)
    if manifest.get("loop") != loop:
        raise ValueError(f"output_dir {directory} holds a run of another loop: choose another directory")
    if found := ", ".join(dict.fromkeys(differing(manifest["config"]))):
        raise ValueError(
            f"output_dir {directory} holds another experiment (different: {found}); choose another directory. "
            "More generations, seeds or arms may be added to an experiment"
        )


def task_resources(
    workers: WorkerSettings, machine: Machine | None, wants_gpu: bool, divisible: bool
) -> tuple[int, dict[str, Any]]:
    """GPUs of the run, and what a task takes of the ``machine`` (None: what is found), with the longest wait. Raises
    ValueError for what is not there, and for workers that share trainings where none is ``divisible``."""
    machine = machine or find_machine(workers.device)
    if workers.cpus_per_task > machine.cpus:
        raise ValueError(f"workers.cpus_per_task is {workers.cpus_per_task}, there are {machine.cpus} CPUs")
    check_kind("workers.nodes", workers.nodes, machine.offers)
    if workers.device == "cuda" and not machine.gpus:
        raise ValueError("workers.device is cuda, but no GPU was found: set workers.device=auto or cpu")
    on_gpu = machine.gpus > 0 and workers.device != "cpu" and wants_gpu
    taken: dict[str, Any] = {"cpus": workers.cpus_per_task, "gpus": 1 / workers.tasks_per_gpu if on_gpu else 0.0}
    least, most = workers.bounds
    if most > 1 and not divisible:
        raise ValueError("workers.train_workers: nothing here is trained in a way that workers can share: set it to 1")
    room, what = (machine.gpus, "GPUs") if on_gpu else (machine.cpus // workers.cpus_per_task, "times cpus_per_task")
    if least > room:
        raise ValueError(f"workers.train_workers is {least}, there are {room} {what}")
    taken |= {"timeout": workers.timeout_seconds, "nodes": workers.nodes, "train_workers": (least, most)}
    return machine.gpus if on_gpu else 0, taken


def short(kind: str) -> str:
    """A kind of task for people: of an import path, the function."""
    return kind.rpartition(":")[2]


def _key(arm: str, seed: int | None) -> str:
    """What the MLflow run of an arm, or of one of its seeds, is known by in a manifest: no two by the same."""
    return f"{'' if seed is None else seed}/{arm}"
