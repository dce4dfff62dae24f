"""What a sweep leaves to look at: a table of its points, pictures, the best point's confirmation, and summary.json."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from orchestration.experiments.sweep.run import SweepRun
from orchestration.experiments.sweep.trial import Trial, reports
from orchestration.runs.config import ConfigError
from orchestration.runs.display import plain_table
from orchestration.runs.html_report import conclude, write_note, write_report
from orchestration.runs.run import register
from orchestration.runs.tables import INTERVAL, POINTS, best_of, point_of, tables
from orchestration.tracking.tracker import FIRST_LOOK
from pipelines.storage.locations import find
from policies.common.intervals import interval, paired, scale_of
from policies.common.search_space import FRESH_SEEDS, Point, PointResult, common_points, exact
from policies.loops.verdicts import plain

_MOST_TAGS = 10  # points that MLflow's page of a sweep lists


@dataclass(frozen=True)
class Outcome:
    """What came of one trial: the metric at its last report, and how it ended."""

    name: str
    point: Point
    seed: int
    status: str  # FINISHED, STOPPED (by the scheduler), KILLED or FAILED
    value: float | None
    step: int
    images: int
    error: str | None
    mlflow_run_id: str | None

    @classmethod
    def of(cls, run: SweepRun, trial: Trial) -> Self:
        """Read from the trial's directory."""
        known, manifest, found = trial.known(), trial.manifest(), reports(run.config, trial)
        last: dict[str, Any] = found[-1] if found else {run.metric: None, "step": 0, "images": 0}
        status = "STOPPED" if "stopped" in known else manifest.get("status", "FAILED")
        value = last[run.metric]
        value = value if value is not None and math.isfinite(value) else None  # not a number: nothing to compare
        ends = status, value, last["step"], last["images"], known.get("error")
        return cls(trial.name, trial.point, trial.seed, *ends, manifest.get("mlflow_run_id"))


class Table:
    """All outcomes of a sweep, and its points from best to worst."""

    def __init__(self, run: SweepRun) -> None:
        self._metric, self._better = run.metric, 1 if run.config.direction == "max" else -1
        self.outcomes = [Outcome.of(run, trial) for trial in run.trials()]
        sought = [each for each in self.outcomes if each.seed < FRESH_SEEDS]
        self.points = self._ranked(sought, run.config.seeds)
        self.fresh = self._ranked([each for each in self.outcomes if each.seed >= FRESH_SEEDS], 1)
        self.best = next((point for point in self.points if point.complete), None)

    def _ranked(self, outcomes: list[Outcome], seeds: int) -> list[PointResult]:
        found = []
        for point in common_points([each.point for each in outcomes]):
            tried = [each for each in outcomes if exact(each.point) == exact(point)]
            values = [each.value for each in tried if each.value is not None]
            ends = map(float, interval(np.array(values), scale_of(self._metric))) if values else ()
            done = [each for each in tried if each.status == "FINISHED" and each.value is not None]
            found.append(PointResult(point, len(done) == len(tried) >= seeds, values, *ends))
        # A point that was stopped early is not compared with one that was not.
        return sorted(found, key=lambda p: (p.complete, self._better * p.mean if p.values else -np.inf), reverse=True)

    def first(self, point: Point) -> Outcome:
        """The best trial in the search of a point, all of which have finished."""
        tried = [each for each in self.outcomes if exact(each.point) == exact(point) and each.seed < FRESH_SEEDS]
        return max(tried, key=lambda each: self._better * (each.value or 0.0))

    def confirmation(self) -> dict[str, Any] | None:
        """The best point's gain over the unchanged configuration, paired by fresh seed: positive is better."""
        values = {exact(each.point): each.values for each in self.fresh if each.complete and each.values}
        if self.best is None or not {exact(self.best.point), "{}"} <= values.keys():
            return None
        best, unchanged = values[exact(self.best.point)], values["{}"]
        gain, ratio = paired(*((best, unchanged) if self._better > 0 else (unchanged, best)), self._metric)
        return {
            "best": best,
            "unchanged": unchanged,
            "gain": {name: float(value) for name, value in gain._asdict().items()} | {"logarithm": ratio},
            "beats_unchanged": bool(gain.low > 0 if len(best) > 1 else gain.mean > 0),
        }


def report_so_far(run: SweepRun) -> None:
    """While trials come and go: what is known of the points, where people look; so rarely that it costs little."""
    began = time.monotonic()
    if began < run.next_report:
        return
    publish(run)
    run.next_report = time.monotonic() + 20 * (time.monotonic() - began)  # a twentieth of the time


def publish(run: SweepRun, status: str | None = None) -> None:
    """What is known of the points now, in the report as of a sweep with that ``status``, and in MLflow."""
    _publish(run, Table(run), None, None, False)
    for each in (run.directory / "figures", run.directory / "summary.json", write_report(run.directory, status)):
        run.tracker.artifact(each)


def report(run: SweepRun, table: Table) -> Path:
    """Table, pictures, registered model and summary. Raises RuntimeError if no trial has anything to show."""
    config, confirmation, model = run.config, table.confirmation(), None
    if config.register_as and table.best:  # its best trial becomes a version of an MLflow model
        first = table.first(table.best.point)
        tags = {run.metric: str(first.value), "point": json.dumps(table.best.point)}
        tags |= {"gain_on_fresh_seeds": json.dumps(confirmation["gain"])} if confirmation else {}
        model = register(run.directory / "trials" / first.name, config.register_as, "best", run.display.say, tags)
    confirmable = not confirmation and len(table.points) > 1 and _can_be_confirmed(run)
    summary = _publish(run, table, confirmation, model, confirmable)
    for title, (headings, rows) in tables(summary).items():
        run.display.console.print(title, plain_table(headings, rows), sep="\n")
    if all(each.value is None for each in table.outcomes):
        reasons = [each.error for each in table.outcomes if each.error] or ["none has begun"]
        raise RuntimeError(f"no trial has a value of {run.metric}: {reasons[0]}")
    return conclude(run, run.directory / "summary.json", "", summary=summary, best=best_of(summary))


def _can_be_confirmed(run: SweepRun) -> bool:
    """Whether there is an unchanged configuration that the best point could be compared with."""
    try:
        run.config.experiment.check(run.config.trial_config({}, FRESH_SEEDS), run.machine)
    except ConfigError:
        return False
    return True


def _publish(
    run: SweepRun, table: Table, confirmation: dict[str, Any] | None, model: str | None, confirmable: bool
) -> dict[str, Any]:
    """Write summary.json and the figures, and show the best point on MLflow's page of the sweep."""
    config, best = run.config, table.best
    content: dict[str, Any] = {
        "loop": config.loop,
        "config": config.config if Path(config.config).exists() else str(find(config.config)),
        "metric": run.metric,
        "mode": config.direction,
        "points": [vars(point) for point in table.points],
        "best": None,
        "confirmation": confirmation,
        "confirmable": confirmable,
        "model": model,
        "trials": [vars(each) for each in table.outcomes],
        "reward_queries": sum(each.images for each in table.outcomes),
        "budget_spent": run.budget.spent,
    }
    if best is not None:
        first = table.first(best.point)
        settings = {**config.fixed, **best.point, **config.experiment.seeded(first.seed)}
        again = None if config.scheduler.kind == "pbt" else settings
        content["best"] = {**vars(best), "trial": first.name, "settings": again}
    summary: dict[str, Any] = plain(content)
    run.summarise(summary)
    _draw(run, table)
    if best is not None:
        words = best_of(summary)
        run.tracker.tags(
            {f"best/{name.removeprefix('best ').removeprefix('95 % ')}": text for name, text in words.items()}
        )
        listed = zip(summary["points"][:_MOST_TAGS], tables(summary)[POINTS][1], strict=False)
        points = [f"{row[-4]} at {point_of(each['point'])}; {INTERVAL} {row[-3]}; {row[-1]}" for each, row in listed]
        run.tracker.tags({f"point/{number:02d}": text for number, text in enumerate(points, start=1)})
        values = {"best": best.mean, "best_low": best.low, "best_high": best.high}
        run.log_metrics({f"{FIRST_LOOK}/{name}": value for name, value in values.items() if math.isfinite(value)})
        write_note(run, f"best {run.metric} {words[run.metric]} at {words['best point']}")
    return summary


def _draw(run: SweepRun, table: Table) -> None:
    from pipelines.figures import sweep as pictures

    figures = run.directory / "figures"
    figures.mkdir(exist_ok=True)
    if not (tried := [each for each in table.points if np.isfinite(each.mean)]):
        return
    space, measured = run.config.dimensions, pictures.Measured(tried, run.metric, run.config.direction)
    logarithmic = [key for key, dimension in space.items() if dimension.kind == "log_uniform"]
    pictures.responses(figures / "responses.png", measured, logarithmic)
    pictures.responses(figures / "glance.png", measured, logarithmic, glance=True)
    pictures.parallel_coordinates(figures / "parallel_coordinates.png", measured, logarithmic)
    wide = [key for key in space if len(space[key].values) > 1]
    if run.config.search == "grid" and len(wide) >= 2 and table.best is not None:
        pictures.phase_diagram(figures / "phase_diagram.png", measured, *wide[:2])
