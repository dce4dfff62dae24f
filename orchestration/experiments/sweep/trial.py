"""One trial of a sweep: a run of its loop in a directory of its own, told to Ray Tune commit by commit.

The directory is named by the point and the seed, so a trial that is asked for again goes on from its last commit, and
one that is done answers from what it left. What a trial tells is what its journal holds, in the same order each time.
"""

import fcntl
import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.metric_names import EVALUATED, MAD
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import known_manifest, read_summary
from orchestration.runs.run import is_free
from pipelines.storage.atomic import DamagedFiles, read_json, read_lines, write_json
from policies.common.search_space import FRESH_SEEDS, Point, exact, short

_PREDECESSOR_SECONDS = 120.0  # a killed trial's processes let go of its directory within this


@dataclass(frozen=True)
class Trial:
    """Where one trial lives. ``name`` is for people, and different for different points and seeds."""

    root: Path
    name: str
    point: Point
    seed: int

    @classmethod
    def of(cls, root: Path, point: Point, seed: int) -> Self:
        """The trial of a point and a seed in a sweep's directory."""
        values = [f"{key.rsplit('.', 1)[-1]}={short(value)}" for key, value in point.items()] or ["unchanged"]
        readable = re.sub(r"[^A-Za-z0-9+=._-]+", "_", "-".join(values))[:100]
        digest = hashlib.sha256(f"{exact(point)} {seed}".encode()).hexdigest()[:12]
        return cls(root, f"{readable}-seed{seed}-{digest}", point, seed)

    @classmethod
    def member(cls, root: Path, number: int, point: Point) -> Self:
        """A member of a population: it keeps its name while its point changes, and goes on from its last one."""
        begun = cls(root, f"member-{number:02d}", point, 0)
        return begun.at(begun.known().get("point", point))

    def at(self, point: Point) -> Self:
        """The same trial, from now on with other settings."""
        return replace(self, point=point)

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.root / "trials" / self.name

    @property
    def record(self) -> Path:
        """What the sweep knows of the trial."""
        return self.root / "records" / f"{self.name}.json"

    def note(self, **what: Any) -> None:
        """Add to the record, which the sweep and the trial's own process both write."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with (self.record.parent / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(self.record, {**self.known(), "point": self.point, "seed": self.seed, **what})

    def known(self) -> dict[str, Any]:
        """The record so far."""
        return read_json(self.record) if self.record.exists() else {}

    def manifest(self) -> dict[str, Any]:
        """The run's manifest; empty before it has begun."""
        return known_manifest(self.directory)

    def over(self) -> bool:
        """Whether there is nothing left to do: it is finished, or a scheduler has stopped it."""
        return self.manifest().get("status") == "FINISHED" or "stopped" in self.known()

    def wait_until_free(self) -> None:
        """Return once no process holds the directory. Raises ConfigError after two minutes."""
        deadline = time.monotonic() + _PREDECESSOR_SECONDS
        while not is_free(self.directory):
            if time.monotonic() > deadline:
                raise ConfigError(f"{self.directory} is still being run by another process: stop it, then go on")
            time.sleep(0.5)


def reports(sweep: SweepConfig, trial: Trial) -> list[dict[str, Any]]:
    """What a trial has to tell so far: the metric at each commit that measured it, with steps and images so far."""
    metric, manifest = metric_of(sweep), trial.manifest()
    if sweep.loop == "mad":
        if manifest.get("status") != "FINISHED":
            return []
        (arm,) = read_summary(trial.directory)["arms"].values()
        values = arm["metrics"][metric]["mean"]
        return [{metric: values[-1], "step": len(values), "images": 0, "trial": trial.name}]
    lines = read_lines(trial.directory / "metrics.jsonl", ["step"])
    committed = [line for line in lines if line["step"] <= manifest.get("committed_step", 0)]
    each = manifest["config"]["training"]["images_per_step"] if lines else 0
    last = manifest["config"]["training"]["steps"] if lines else 0
    due = [line for line in committed if metric in line and (line["step"] % period(sweep) == 0 or line["step"] == last)]
    return [
        {metric: line[metric], "step": line["step"], "images": line["step"] * each, "trial": trial.name} for line in due
    ]


def period(sweep: SweepConfig) -> int:
    """Steps between two reports of a DDPO trial: what it reports is measured and committed."""
    config: DdpoConfig = sweep.example
    measured = config.evaluation.every or config.training.steps
    return math.lcm(config.checkpoint.every, measured if metric_of(sweep).startswith(EVALUATED) else 1)


def metric_of(sweep: SweepConfig) -> str:
    """The metric that a sweep compares."""
    if sweep.metric or sweep.loop == "ddpo":
        return sweep.metric or "evaluator/full"
    return MAD[sweep.example.family][0]


def run_trial(sweep: SweepConfig, trial: Trial, tracking: Mapping[str, Any], changes: bool = False) -> None:
    """In a Tune worker: do what is left of the trial, and tell Tune. Tune ends it inside a report if it wishes."""
    from ray import tune

    trial.wait_until_free()
    copies = sweep.scheduler.kind == "pbt" and trial.seed < FRESH_SEEDS
    found = reports(sweep, trial)
    for report in found[-1:] if copies and trial.over() else [] if copies else found:
        tune.report(report)
    if trial.over():
        return
    trial.note(error=None)
    # A member of a population takes weights from others: its own past is no measure of it.
    own = {"evaluation.patience": 0} if copies and sweep.loop == "ddpo" else {}
    place = {"output_dir": str(trial.directory), "tracking": {**tracking}}
    config = sweep.trial_config(trial.point, trial.seed, own | place)
    try:
        if sweep.loop == "mad":
            from orchestration.experiments.mad.loop import run_mad

            run_mad(config, trusted=True, changes=changes)  # the sweep was typed
        else:
            _run_ddpo(sweep, trial, config, copies, changes)
    except Exception as error:
        trial.note(error=f"{type(error).__name__}: {error}")
        raise
    tune.report(reports(sweep, trial)[-1])


def _run_ddpo(sweep: SweepConfig, trial: Trial, config: DdpoConfig, copies: bool, changes: bool) -> None:
    from ray import tune

    from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo

    def watch(run: DdpoRun) -> None:
        found = reports(sweep, trial)
        if found and found[-1]["step"] == run.step < config.training.steps:  # the last step is told once all is done
            commit = tune.Checkpoint.from_directory(str(run.store.path(run.step))) if copies else None
            tune.report(found[-1], checkpoint=commit)

    if (copied := tune.get_checkpoint()) is not None:
        with copied.as_directory() as source:
            DdpoRun.adopt(config, Path(source))
    if trial.manifest():
        resume_ddpo(trial.directory, trusted=True, changes=changes, watch=watch)
    else:
        run_ddpo(config, watch)


def trials_in(root: Path) -> Iterator[Trial]:
    """Every trial that a sweep's directory knows."""
    for path in sorted((root / "records").glob("*.json")):
        known = read_json(path)
        if not {"point", "seed"} <= known.keys():
            raise DamagedFiles(f"{path} is damaged: it names no point and seed")
        yield Trial(root, path.stem, known["point"], known["seed"])
