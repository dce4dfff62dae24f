"""Sweeps as commands and jobs see them."""

from pydantic import BaseModel

from orchestration.experiments.experiment import Experiment


class Sweep(Experiment):
    """Run an experiment many times over a space of its settings. The same command again goes on with output_dir."""

    name = "sweep"

    @property
    def schema(self) -> type[BaseModel]:
        """See :class:`Experiment`."""
        from orchestration.experiments.sweep.config import SweepConfig  # asks the registry, which asks for this

        return SweepConfig
