"""A sweep: points × seeds of one loop under Ray Tune, then the best point against the unchanged configuration.

Tune decides what runs when, and what is not worth finishing. It is asked anew in each session: a trial's own directory
is the only memory, so the command given again loses nothing and runs nothing twice.
"""

from pathlib import Path

from orchestration.cluster.ray_cluster import connected
from orchestration.experiments.sweep import search
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.preflight import preflight_sweep
from orchestration.experiments.sweep.report import Table, report
from orchestration.experiments.sweep.run import SweepRun
from orchestration.experiments.sweep.trial import Trial
from policies.common.search_space import FRESH_SEEDS, Point, common_points


def run_sweep(config: SweepConfig, trusted: bool = False, changes: bool = False) -> Path:
    """Run a sweep, or go on with it. Returns the path of summary.json. Raises ConfigError before it starts, also if
    another began it and it is not ``trusted``, or it would read other things and no ``changes`` are accepted."""
    machine = preflight_sweep(config)
    with SweepRun(config, machine, trusted, changes) as run, connected(machine.gpus, run.display.remedy):
        _search(run)
        best = Table(run).best
        if config.confirm_seeds and best is not None and not run.budget.spent:
            _confirm(run, best.point)
        return report(run, Table(run))


def _search(run: SweepRun) -> None:
    config, root = run.config, run.directory
    if config.search == "optuna":
        known = [trial.point for trial in run.trials() if trial.seed < FRESH_SEEDS]
        search.suggested(run, common_points(known))
    elif config.scheduler.kind == "pbt":
        search.population(run, [Trial.member(root, i, point) for i, point in enumerate(config.points)])
    else:
        trials = [Trial.of(root, point, seed) for point in config.points for seed in range(config.seeds)]
        # A scheduler compares with what is done as well; without one, that needs no place.
        wanted = [each for each in trials if config.scheduler.kind != "none" or not each.over()]
        search.listed(run, wanted, stopping=True)


def _confirm(run: SweepRun, best: Point) -> None:
    """The best point and the unchanged configuration on seeds that had no part in choosing it."""
    seeds = range(FRESH_SEEDS, FRESH_SEEDS + run.config.confirm_seeds)
    trials = [Trial.of(run.directory, point, seed) for seed in seeds for point in (best, {})]
    search.listed(run, [trial for trial in trials if not trial.over()])
