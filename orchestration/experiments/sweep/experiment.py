"""Sweeps as commands and jobs see them."""

from typing import TYPE_CHECKING

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
