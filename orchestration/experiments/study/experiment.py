"""Studies as commands and jobs see them."""

from pathlib import Path

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.experiment import Experiment
from orchestration.experiments.study.config import Study


class Studies(Experiment):
    """Run a study: arms and controls × seeds of tasks, and claims. The same command again goes on with output_dir."""

    name = "study"
    schema = Study

    def plan(self, config: Study, machine: Machine | None = None) -> str:
        """See :class:`Experiment`."""
        from orchestration.experiments.study.preflight import describe_study, preflight_study

        return describe_study(config, preflight_study(config, machine))

    def run(self, config: Study) -> Path:
        """See :class:`Experiment`."""
        from orchestration.experiments.study.loop import run_study

        return run_study(config)

    def resume(self, directory: Path, trusted: bool, changes: bool) -> Path:
        """See :class:`Experiment`."""
        from orchestration.experiments.study.loop import resume_study

        return resume_study(directory, trusted, changes)
