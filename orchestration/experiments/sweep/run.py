"""A sweep's run: its directory and MLflow run, what it may spend, and what it shows while trials come and go."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ray.tune import Stopper

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.sweep.config import BudgetSettings, SweepConfig
from orchestration.experiments.sweep.trial import Trial, reports, trials_in
from orchestration.runs.config import ConfigError
from orchestration.runs.display import Row
from orchestration.runs.inputs import Inputs, accept, code_of, fingerprints
from orchestration.runs.manifest import new_manifest, open_run
from orchestration.runs.run import Run, ending, new_directory, sync
from orchestration.tracking.outbox import undelivered
from pipelines.storage.locations import find
from policies.common.search_space import corner_points

_FIRST_REPORT_SECONDS = 30.0  # a sweep that is over sooner shows what it found at its end
_DECIDES = ("loop", "config", "fixed", "space", "search", "seed", "scheduler", "metric", "mode")  # what trials are


class Budget(Stopper):
    """Stops every trial once the sweep has spent what it may. A trial that it stops can be continued."""

    def __init__(self, settings: BudgetSettings, seconds_before: float, images_before: dict[str, int]) -> None:
        self._settings = settings
        self._started = time.monotonic() - seconds_before
        self._images = images_before  # by the trial's name
        self.spent = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note what a trial has used."""
        if "trial" in result:  # not in the last word of one that had nothing to report
            self._images[result["trial"]] = result["images"]
        return False

    def stop_all(self) -> bool:
        """Whether a limit is reached."""
        hours, queries = self._settings.hours, self._settings.reward_queries
        late = hours is not None and time.monotonic() - self._started > 3600 * hours
        self.spent = self.spent or late or (queries is not None and sum(self._images.values()) >= queries)
        return self.spent


class SweepRun(Run):
    """One sweep, new or the one that ``output_dir`` holds: its directory appears when this is made, and nothing before.

    Trials keep their own state; leaving it closes those that Tune left open.
    """

    config: SweepConfig

    def __init__(self, config: SweepConfig, machine: Machine, trusted: bool = False, changes: bool = False) -> None:
        directory = new_directory(config)
        held = open_run(directory, trusted) if (directory / "manifest.json").exists() else {}
        if held and (other := held.get("loop")) != "sweep":
            raise ConfigError(f"output_dir {directory} holds a {other} run: choose another output_dir")
        self._trusted, self.changes = trusted, changes
        manifest = new_manifest("sweep", config, held)
        for key in _DECIDES if held else ():
            if held["config"].get(key) != manifest["config"][key]:
                known = f"output_dir {directory} holds a sweep with another {key}, {held['config'].get(key)!r}"
                raise ConfigError(f"{known}: choose another output_dir, or go on with 'ouroboros resume {directory}'")
        accept(directory, manifest, held, _inputs(config, held.get("inputs")), changes)
        self.metric = config.compared
        label = self.metric.replace("_", " ")
        row = Row(self.metric, label, f"{label} {{}}", colour="green")
        total = len(config.points or range(config.trials)) * config.seeds + 2 * config.confirm_seeds
        begun = list(trials_in(directory))
        self._done = {trial.name for trial in begun if trial.over()}
        super().__init__(directory, config, manifest, total, len(self._done), rows=[row], unit="trial")
        self.machine = machine
        self.cpus_per_trial = config.cpus_per_trial or machine.cpus
        used = {trial.name: found[-1]["images"] for trial in begun if (found := reports(config, trial))}
        self.next_report = time.monotonic() + _FIRST_REPORT_SECONDS
        self.budget = Budget(config.budget, self._wall_before, used)

    def on_start(self) -> None:
        """Tell MLflow what is swept."""
        about = {"loop": self.config.loop, "sweep": self.config.name, "metric": self.metric}
        self.log_params(self.manifest["config"], about, f"**{self.config.name}**: no point has finished yet.")

    def __exit__(self, *error: Any) -> None:
        from orchestration.experiments.sweep.report import publish

        try:
            self.settle()
            if error[0] is not None and any(trial.over() for trial in self.trials()):
                with contextlib.suppress(OSError, ConfigError):  # what is there shall not hide why the sweep ended
                    publish(self, ending(error[0]))
        finally:
            super().__exit__(*error)

    def progress(self) -> str:
        """How many trials are over."""
        return f"{sum(trial.over() for trial in self.trials())} trials are done"

    def trials(self) -> Iterator[Trial]:
        """Every trial that has begun."""
        return trials_in(self.directory)

    def trial_tracking(self) -> dict[str, Any]:
        """The tracking settings of a trial: the sweep's own store, below the sweep's run."""
        store = {"uri": self.config.tracking.uri, "experiment": self.config.tracking.experiment or "sweep"}
        return {**store, "system_metrics": False, "parent": self.tracker.run_id}

    def ended(self, trial: Trial, step: int | None) -> None:
        """Note and show how a trial ended: done, stopped by the scheduler after ``step`` steps, failed, or put off."""
        known, found = trial.known(), reports(self.config, trial)
        if not trial.over() and step is not None and not known.get("error") and not self.budget.spent:
            trial.note(stopped=step)
        if trial.name in self._done:
            return
        self._done.add(trial.name)
        stopped = f", stopped after step {step}" if "stopped" in trial.known() else ""
        note = f"{trial.name}{stopped}" + (f", FAILED: {known['error']}" if known.get("error") else "")
        values = {self.metric: found[-1][self.metric]} if found else {}
        self.display.step(len(self._done), values, note=note)
        # A trial that failed may end again: the same place in MLflow twice would keep what was there first.
        self.manifest |= {"committed_step": len(self._done), "ends": self.manifest.get("ends", 0) + 1}
        self.log_metrics(values)
        self._status("RUNNING")

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Record numbers in MLflow, over how many trials have ended."""
        self.tracker.metrics(self.manifest.get("ends", 0), values, int(time.time() * 1000))

    def settle(self) -> None:
        """Close what trials left open in MLflow: Tune ends a trial's process without asking."""
        for trial in self.trials():
            known, status = trial.known(), trial.manifest().get("status")
            unsaid = "stopped" in known and not known.get("told")
            if unsaid or status == "RUNNING" or undelivered(trial.directory / "outbox"):
                trial.wait_until_free()
                why = {"stopped_by": f"{self.config.scheduler.kind} after step {known['stopped']}"} if unsaid else None
                sync(trial.directory, self.display.say, why, self._trusted)
                if unsaid:
                    trial.note(told=True)


def _inputs(config: SweepConfig, held: Inputs | None) -> Inputs:
    """What the trials read, those of every listed value: whichever of them begins later reads the same."""
    read, code = {"config": config.config}, set[str]()
    for point in corner_points(config.dimensions):
        paths, own = config.experiment.reads(config.trial_config(point, 0))
        for key, path in paths.items():
            name = f"trials.{key}"
            read[name if read.get(name, path) == path else f"{name} {path}"] = path
        code |= own
    found = {key: path for key, path in read.items() if find(path)}
    return fingerprints(found, held) | code_of(sorted(code))
