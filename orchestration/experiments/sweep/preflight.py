"""Everything that can be wrong with a sweep, found before anything is started, and what a dry run prints."""

import difflib
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from orchestration.cluster.ray_cluster import Machine, find_machine
from orchestration.experiments.metric_names import better_end
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.trial import metric_of, period
from orchestration.runs.config import ConfigError, about
from orchestration.runs.run import TEMPLATES
from pipelines.pages import fill
from policies.common.search_space import Point, common_points, corner_points, random_points

_TRIED = 20  # points from within a space, of a search whose own are not known before
_REHEARSED = 8  # choices of models that a dry run tries out: a few seconds each


def preflight_sweep(config: SweepConfig, machine: Machine | None = None) -> Machine:
    """Check every point that is known, or the ends of every dimension, as its own run would be checked. Returns what
    the cluster has. Raises ConfigError naming the point."""
    base = config.example
    machine = machine or find_machine(config.experiment.device(base))
    cpus, gpus = config.cpus_per_trial or machine.cpus, config.gpus_per_trial
    if cpus > machine.cpus or gpus > machine.gpus:
        raise ConfigError(
            f"a trial asks for {cpus} CPUs and {gpus} GPUs, the cluster has {machine.cpus} and {machine.gpus}: "
            "set cpus_per_trial and gpus_per_trial"
        )
    for point in _points(config):
        with about(f"at {point or 'the unchanged configuration'}"):
            _check(config, point, Machine(cpus, gpus))
    steps = config.experiment.steps(base)
    if config.scheduler.kind != "none" and period(config) >= steps:
        raise ConfigError(
            f"scheduler.kind {config.scheduler.kind} has nothing to compare: {metric_of(config)} is committed every "
            f"{period(config)} of {steps} steps; lower evaluation.every and checkpoint.every"
        )
    return machine


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
        with about(f"at {point or 'the unchanged configuration'}"):
            experiment.plan(settings, machine)
    return len(choices)


def _check(config: SweepConfig, point: Point, machine: Machine) -> None:
    _check_metric(config, config.experiment.check(config.trial_config(point, 0), machine))


def _check_metric(config: SweepConfig, known: Sequence[str]) -> None:
    metric = metric_of(config)
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"metric {metric!r} is none that such a run reports; {hint}")
    if config.metric and config.mode is None and better_end(metric) is None:
        raise ConfigError(f"mode: is {metric} better when it is larger or smaller? Set mode to max or min")


def describe_sweep(config: SweepConfig, machine: Machine) -> str:
    """What a dry run prints. Raises ConfigError where models, tried out, do not fit together."""
    cpus, gpus = config.cpus_per_trial or machine.cpus, config.gpus_per_trial
    beside = min(machine.cpus // cpus, machine.gpus // gpus if gpus else machine.cpus)
    told = {"config": config, "points": config.points, "beside": beside, "metric": metric_of(config)}
    told |= {"choices": _rehearse(config, Machine(cpus, gpus)), "rehearsed": _REHEARSED}
    return fill(TEMPLATES / "sweep_plan.txt", **told)
