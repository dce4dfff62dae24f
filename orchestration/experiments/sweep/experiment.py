"""Sweeps as commands and jobs see them."""

from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.experiment import Experiment

if TYPE_CHECKING:  # its configuration asks the registry, which asks for this
    from orchestration.experiments.sweep.config import SweepConfig


class Sweep(Experiment):
    """Run an experiment many times over a space of its settings. The same command again goes on with output_dir."""

    name = "sweep"

    @property
    def schema(self) -> type["SweepConfig"]:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.config import SweepConfig

        return SweepConfig

    def plan(self, config: "SweepConfig", machine: Machine | None = None) -> str:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.preflight import describe_sweep, preflight_sweep

        return describe_sweep(config, preflight_sweep(config))

    def run(self, config: "SweepConfig") -> Path:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.loop import run_sweep

        return run_sweep(config)

    def resume(self, directory: Path, trusted: bool, changes: bool) -> Path:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.loop import resume_sweep

        return resume_sweep(directory, trusted, changes)
