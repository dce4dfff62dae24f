"""Sweeps as commands and jobs see them."""

from typing import Any

from pydantic import BaseModel

from orchestration.experiments.experiment import Experiment
from orchestration.runs.browse import RunInfo


class Sweep(Experiment):
    """Run an experiment many times over a space of its settings. The same command again goes on with output_dir."""

    name = "sweep"

    @property
    def schema(self) -> type[BaseModel]:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.config import SweepConfig  # asks the registry, which asks for this

        return SweepConfig

    def imports(self, config: Any) -> list[str]:
        """See :class:`Experiment`: a trial drives a run, as a command does."""
        tracking, trial = "mlflow.store.tracking.sqlalchemy_store", f"orchestration.experiments.{config.loop}.loop"
        ours = ["matplotlib.figure", tracking, trial, "orchestration.experiments.sweep.trial"]
        return [*config.experiment.imports(config.example), *ours]

    def rows(self, run: RunInfo) -> list[dict[str, Any]]:
        """See :class:`Experiment`: a row a trial, with its point."""
        trials, metric = run.summary.get("trials", []), run.summary.get("metric", "value")
        return [{**t["point"], "seed": t["seed"], "status": t["status"], metric: t["value"]} for t in trials]
