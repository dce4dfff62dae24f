"""Everything that can be wrong with a sweep, found before anything is started, and what a dry run prints."""

import difflib
from operator import itemgetter
from typing import Any

from orchestration.cluster.ray_cluster import Machine, find_machine
from orchestration.experiments.metric_names import better_end
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.runs.config import ConfigError, about
from orchestration.runs.run import TEMPLATES
from pipelines.pages import fill
from policies.common.search_space import Point, common_points, corner_points, random_points

_TRIED = 20  # points from within a space, of a search whose own are not known before
_REHEARSED = 8  # choices of models that a dry run tries out: a few seconds each


def preflight_sweep(config: SweepConfig, machine: Machine | None = None) -> Machine:
    """Check every point that is known, or the ends of every dimension, as its own run would be checked. Returns what
    the cluster has. Raises ConfigError naming the point."""
    machine = machine or find_machine(config.experiment.device(config.example))
    each = _of_trial(config, machine)
    if each.cpus > machine.cpus or each.gpus > machine.gpus:
        raise ConfigError(
            f"a trial asks for {each.cpus} CPUs and {each.gpus} GPUs, the cluster has {machine.cpus} and "
            f"{machine.gpus}: set cpus_per_trial and gpus_per_trial"
        )
    for point in _points(config):
        with _about_point(point):
            trial = config.trial_config(point, 0)
            if (workers := getattr(trial, "workers", None)) and workers.bounds[1] > 1:
                raise ConfigError("workers.train_workers: a trial of a sweep has one place of its own: set it to 1")
            known, metric = config.experiment.check(trial, each), config.compared
            if metric not in known:
                near = difflib.get_close_matches(metric, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
                raise ConfigError(f"metric {metric!r} is none that such a run reports; {hint}")
            if config.metric and config.mode is None and better_end(metric) is None:
                raise ConfigError(f"mode: is {metric} better when it is larger or smaller? Set mode to max or min")
    steps = config.experiment.steps(config.example)
    if config.scheduler.kind != "none" and config.period >= steps:
        raise ConfigError(
            f"scheduler.kind {config.scheduler.kind} has nothing to compare: {config.compared} is committed every "
            f"{config.period} of {steps} steps; lower evaluation.every and checkpoint.every"
        )
    return machine


def describe_sweep(config: SweepConfig, machine: Machine) -> str:
    """What a dry run prints. Raises ConfigError where models, tried out, do not fit together."""
    each = _of_trial(config, machine)
    beside = min(machine.cpus // each.cpus, machine.gpus // each.gpus if each.gpus else machine.cpus)
    choices = _rehearse(config, each)
    return fill(TEMPLATES / "sweep_plan.txt", config=config, beside=beside, choices=choices, rehearsed=_REHEARSED)


def _of_trial(config: SweepConfig, machine: Machine) -> Machine:
    """What a trial gets of the ``machine``."""
    return Machine(config.cpus_per_trial or machine.cpus, config.gpus_per_trial)


def _about_point(point: Point) -> Any:
    return about(f"at {point or 'the unchanged configuration'}")


def _points(config: SweepConfig) -> list[Point]:
    """What a search will ask for or, where that is not known before, the ends of every dimension, and points within."""
    some = [*corner_points(config.dimensions), *random_points(config.dimensions, _TRIED, config.seed)]
    return [*([{}] if config.confirm_seeds else []), *(config.points or common_points(some))]


def _rehearse(config: SweepConfig, machine: Machine) -> int:
    """Try out so many choices of models, those first that name one for the first time. Returns how many choices the
    points make. Raises ConfigError naming the point."""
    experiment, seen = config.experiment, frozenset[Any]()
    choices: dict[Any, tuple[bool, Point, Any]] = {}
    for point in _points(config):
        settings = config.trial_config(point, 0)
        if not (models := experiment.models(settings)):
            continue
        choices.setdefault(models, (models <= seen, point, settings))
        seen |= models
    for _, point, settings in sorted(choices.values(), key=itemgetter(0))[:_REHEARSED]:
        with _about_point(point):
            experiment.plan(settings, machine)
    return len(choices)
