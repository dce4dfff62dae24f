"""Everything that can be wrong with a sweep, found before anything is started, and what a dry run prints."""

from orchestration.cluster import Machine, find_machine
from orchestration.config import ConfigError, about
from orchestration.run import TEMPLATES
from orchestration.sweep_config import SweepConfig
from orchestration.trial import metric_of, period
from pipelines.pages import fill
from policies.search_space import Point, corner_points


def preflight_sweep(config: SweepConfig) -> Machine:
    """Check every point that is known, or the ends of every dimension, as its own run would be checked. Returns what
    the cluster has. Raises ConfigError naming the point."""
    base = config.example
    device = base.actors.device if config.loop == "ddpo" else base.workers.device
    machine = find_machine(device)
    cpus, gpus = config.cpus_per_trial or machine.cpus, config.gpus_per_trial
    if cpus > machine.cpus or gpus > machine.gpus:
        raise ConfigError(
            f"a trial asks for {cpus} CPUs and {gpus} GPUs, the cluster has {machine.cpus} and {machine.gpus}: "
            "set cpus_per_trial and gpus_per_trial"
        )
    unchanged: list[Point] = [{}] if config.confirm_seeds else []
    for point in [*unchanged, *(config.points or corner_points(config.dimensions))]:
        with about(f"at {point or 'the unchanged configuration'}"):
            _check(config, point, Machine(cpus, gpus))
    if config.loop == "ddpo" and config.scheduler.kind != "none" and period(config) >= base.training.steps:
        raise ConfigError(
            f"scheduler.kind {config.scheduler.kind} has nothing to compare: {metric_of(config)} is committed every "
            f"{period(config)} of {base.training.steps} steps; lower evaluation.every and checkpoint.every"
        )
    return machine


def _check(config: SweepConfig, point: Point, machine: Machine) -> None:
    settings = config.trial_config(point, 0)
    if config.loop == "ddpo":
        from orchestration.preflight import preflight

        preflight(settings, machine)
        return
    from orchestration.mad_preflight import preflight_mad

    if len(settings.resolved_arms) > 1:
        raise ConfigError(f"{config.config} has several arms: a trial runs one, so put what differs into space")
    preflight_mad(settings, machine)


def describe_sweep(config: SweepConfig, machine: Machine) -> str:
    """What a dry run prints."""
    cpus, gpus = config.cpus_per_trial or machine.cpus, config.gpus_per_trial
    beside = min(machine.cpus // cpus, machine.gpus // gpus if gpus else machine.cpus)
    told = {"config": config, "points": config.points, "beside": beside, "metric": metric_of(config)}
    return fill(TEMPLATES / "sweep_plan.txt", **told)
