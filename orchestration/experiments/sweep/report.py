"""What a sweep leaves to look at: a table of its points, pictures, the best point's confirmation, and summary.json."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from orchestration.experiments.sweep.run import SweepRun
from orchestration.experiments.sweep.trial import Trial, reports
from orchestration.runs.browse import plain_table
from orchestration.runs.html_report import conclude
from orchestration.runs.run import register
from orchestration.runs.tables import tables
from policies.common.intervals import interval, paired, scale_of
from policies.common.search_space import FRESH_SEEDS, Point, common_points, exact
from policies.loops.verdicts import plain


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


@dataclass(frozen=True)
class PointResult:
    """A point over its seeds: their mean on the metric's scale and its 95 % interval, nan where it has none."""

    point: Point
    complete: bool  # every seed has finished
    values: list[float]
    mean: float = np.nan
    low: float = np.nan
    high: float = np.nan


class Table:
    """All outcomes of a sweep, and its points from best to worst."""

    def __init__(self, run: SweepRun) -> None:
        self._metric, self._better = run.metric, 1 if run.config.direction == "max" else -1
        self.outcomes = [Outcome.of(run, trial) for trial in run.trials()]
        self.points = self._ranked([each for each in self.outcomes if each.seed < FRESH_SEEDS])
        self.fresh = self._ranked([each for each in self.outcomes if each.seed >= FRESH_SEEDS])
        self.best = next((point for point in self.points if point.complete and point.values), None)

    def _ranked(self, outcomes: list[Outcome]) -> list[PointResult]:
        found = []
        for point in common_points([each.point for each in outcomes]):
            tried = [each for each in outcomes if exact(each.point) == exact(point)]
            values = [each.value for each in tried if each.value is not None]
            ends = map(float, interval(np.array(values), scale_of(self._metric))) if values else ()
            found.append(PointResult(point, all(each.status == "FINISHED" for each in tried), values, *ends))
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


def report(run: SweepRun, table: Table) -> Path:
    """Table, pictures, registered model and summary. Raises RuntimeError if no trial has anything to show."""
    config = run.config
    tried = [(each.point, each.value) for each in table.outcomes if each.value is not None]
    if not tried:
        reasons = [each.error for each in table.outcomes if each.error] or ["none has begun"]
        raise RuntimeError(f"no trial has a value of {run.metric}: {reasons[0]}")
    figures = _draw(run, [(point, value) for point, value in tried if point])
    confirmation = table.confirmation()
    model = None
    if config.register_as and table.best:  # its best trial becomes a version of an MLflow model
        first = table.first(table.best.point)
        tags = {run.metric: str(first.value), "point": json.dumps(table.best.point)}
        tags |= {"gain_on_fresh_seeds": json.dumps(confirmation["gain"])} if confirmation else {}
        model = register(run.directory / "trials" / first.name, config.register_as, "best", run.display.say, tags)
    content = {
        "metric": run.metric,
        "mode": config.direction,
        "points": [vars(point) for point in table.points],
        "best": vars(table.best) if table.best else None,
        "confirmation": confirmation,
        "model": model,
        "trials": [vars(each) for each in table.outcomes],
        "reward_queries": sum(each.images for each in table.outcomes),
        "budget_spent": run.budget.spent,
    }
    summary = plain(content)
    for title, (headings, rows) in tables(summary).items():
        run.display.console.print(title, plain_table(headings, rows), sep="\n")
    return conclude(run, run.summarise(summary), figures, summary=summary)


def _draw(run: SweepRun, tried: list[tuple[Point, float]]) -> Path:
    from pipelines.figures.sweep import parallel_coordinates, phase_diagram, responses

    figures = run.directory / "figures"
    figures.mkdir(exist_ok=True)
    if not tried:
        return figures
    space = run.config.dimensions
    logarithmic = [key for key, dimension in space.items() if dimension.kind == "log_uniform"]
    responses(figures / "responses.png", tried, run.metric, logarithmic)
    parallel_coordinates(figures / "parallel_coordinates.png", tried, run.metric, logarithmic)
    if run.config.search == "grid" and len(wide := [key for key in space if len(space[key].values) > 1]) >= 2:
        phase_diagram(figures / "phase_diagram.png", tried, run.metric, *wide[:2])
    return figures
