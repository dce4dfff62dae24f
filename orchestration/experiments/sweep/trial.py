"""One trial of a sweep: a run of its loop in a directory of its own, reported to Ray Tune commit by commit.

The directory is named by the point and the seed, so a trial that is asked for again goes on from its last commit, and
one that is done answers from what it left. What a trial reports is what its journal holds, in the same order each time.
"""

import contextlib
import fcntl
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from orchestration.experiments.sweep.config import SweepConfig
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import known_manifest
from orchestration.runs.run import Run, is_free
from pipelines.storage.atomic import DamagedFiles, read_json, write_json
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
    """What a trial has to report so far: the metric, steps and images at each commit that measured it."""
    manifest = trial.manifest()
    found = sweep.experiment.reports(trial.directory, manifest, sweep.compared)
    due = [each for each in found if each["step"] % sweep.period == 0 or each["step"] == manifest["total_steps"]]
    return [{**each, "trial": trial.name} for each in due]


def run_trial(sweep: SweepConfig, trial: Trial, tracking: Mapping[str, Any], changes: bool = False) -> None:
    """In a Tune worker: do what is left of the trial, and report to Tune. Tune ends it inside a report if it wishes."""
    from ray import tune

    trial.wait_until_free()
    # A member of a population takes weights from others: its own past is no measure of it.
    copies = sweep.scheduler.kind == "pbt" and trial.seed < FRESH_SEEDS
    found, over = reports(sweep, trial), trial.over()
    for report in found if not copies else found[-1:] if over else []:
        tune.report(report)
    if over:
        return
    trial.note(error=None)
    Run.begins_now()  # the process may have done another trial before
    place: dict[str, Any] = {"output_dir": str(trial.directory), "tracking": {**tracking}}
    config = sweep.trial_config(trial.point, trial.seed, place | ({"evaluation.patience": 0} if copies else {}))

    def committed(step: int, commit: Path) -> None:
        found = reports(sweep, trial)
        if found and found[-1]["step"] == step:
            tune.report(found[-1], checkpoint=tune.Checkpoint.from_directory(str(commit)) if copies else None)

    try:
        with contextlib.ExitStack() as stack:
            given = tune.get_checkpoint()
            copied = Path(stack.enter_context(given.as_directory())) if given else None
            sweep.experiment.run_trial(config, bool(trial.manifest()), changes, committed, copied)
    except Exception as error:
        trial.note(error=f"{type(error).__name__}: {error}")
        raise
    tune.report(reports(sweep, trial)[-1])


def trials_in(root: Path) -> Iterator[Trial]:
    """Every trial that a sweep's directory knows."""
    for path in sorted((root / "records").glob("*.json")):
        known = read_json(path)
        if not {"point", "seed"} <= known.keys():
            raise DamagedFiles(f"{path} is damaged: it names no point and seed")
        yield Trial(root, path.stem, known["point"], known["seed"])
