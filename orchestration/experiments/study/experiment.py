"""Studies as commands and jobs see them."""

from orchestration.experiments.experiment import DIFFUSION, Experiment
from orchestration.experiments.study.config import Study


class Studies(Experiment):
    """Run a study: arms and controls × seeds of tasks, and claims. The same command again goes on with output_dir."""

    name = "study"
    schema = Study

    def imports(self, config: Study) -> tuple[str, ...]:
        """See :class:`Experiment`: those of a diffusion model, which studies are about."""
        return DIFFUSION
