"""Every kind of experiment by name: commands, jobs, resume and sweeps look them up here and nowhere else."""

from orchestration.experiments.ddpo.experiment import Ddpo
from orchestration.experiments.experiment import Experiment, SweptExperiment
from orchestration.experiments.mad.experiment import Mad
from orchestration.experiments.study.experiment import Studies
from orchestration.experiments.sweep.experiment import Sweep
from orchestration.runs.config import ConfigError

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in (Ddpo(), Mad(), Studies(), Sweep())}
SWEPT = {name: each for name, each in EXPERIMENTS.items() if isinstance(each, SweptExperiment)}


def experiment_of(name: object) -> Experiment:
    """The experiment that a manifest names. Raises ConfigError for one that this version does not have."""
    if isinstance(name, str) and name in EXPERIMENTS:
        return EXPERIMENTS[name]
    raise ConfigError(f"{name!r} is no experiment of this version: it has {', '.join(EXPERIMENTS)}")
