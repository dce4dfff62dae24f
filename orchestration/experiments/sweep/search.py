"""What Ray Tune is asked for: which trials, suggested and stopped by whom, on what part of the cluster."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator, Repeater

from orchestration.experiments.sweep.report import report_so_far
from orchestration.experiments.sweep.run import SweepRun
from orchestration.experiments.sweep.trial import Trial, run_trial
from policies.common.search_space import Dimension, Point

# Paths stay what they are, Ctrl-C is the command's own, and Tune prints nothing.
_SEED = "__trial_index__"  # where Tune's Repeater puts which repetition of a point a trial is


Resolve = Callable[[dict[str, Any], int], Trial]  # the trial of what Tune chose, and of the trial's number


def listed(run: SweepRun, trials: Sequence[Trial], stopping: bool = False) -> None:
    """Do these trials; if ``stopping``, the sweep's scheduler may stop some."""
    if trials:
        space = {"number": tune.grid_search([*range(len(trials))])}
        _fit(run, lambda chosen, _: trials[chosen["number"]], space, 1, scheduler=_asha(run) if stopping else None)


def population(run: SweepRun, members: Sequence[Trial]) -> None:
    """Members that copy each other's weights, and try settings near the copied one's (Jaderberg, 1711.09846)."""
    space = run.config.dimensions

    def within(point: Point) -> Point:
        return {key: space[key].clipped(value) for key, value in point.items()}

    domains = {key: domain(dimension) for key, dimension in space.items()}
    listed_values = {key: list(each.values) for key, each in space.items() if each.kind == "values"}
    copying = PopulationBasedTraining(
        "step",
        perturbation_interval=run.config.scheduler.interval,
        hyperparam_mutations=domains | listed_values,
        custom_explore_fn=within,
        synch=True,  # in step: a copied commit then is of the step that its new owner has reached
    )
    first = BasicVariantGenerator(points_to_evaluate=[member.point for member in members])
    _fit(run, lambda chosen, number: members[number].at(chosen), domains, len(members), first, copying)


def suggested(run: SweepRun, known: Sequence[Point]) -> None:
    """Points that Optuna suggests, those of earlier sessions first: they answer from their directories."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, root = run.config, run.directory  # what resolves goes to the trials' processes, which know no run

    def resolve(chosen: dict[str, Any], _: int) -> Trial:
        return Trial.of(root, {k: v for k, v in chosen.items() if k != _SEED}, chosen.get(_SEED, 0))

    # Another seed each session: a sampler that starts anew would suggest again what it suggested first.
    suggesting: Any = OptunaSearch(
        {key: domain(dimension) for key, dimension in config.dimensions.items()},
        metric=run.metric,
        mode=config.direction,
        seed=config.seed + len(known),
        points_to_evaluate=list(known) or None,
    )
    searcher = Repeater(suggesting, repeat=config.seeds) if config.seeds > 1 else suggesting
    _fit(run, resolve, {}, config.trials * config.seeds, searcher, _asha(run))


class Ends(tune.Callback):
    """Tells a sweep how its trials end."""

    def __init__(self, run: SweepRun, resolve: Resolve) -> None:
        self._run, self._resolve = run, resolve

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores its callbacks, and a sweep is never restored from what Tune stores."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It returned, or was stopped after its last report."""
        self._ended(trial, (trial.last_result or {}).get("step"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It raised, or its process died."""
        self._ended(trial, None)

    def _ended(self, trial: Any, step: int | None) -> None:
        self._run.ended(self._resolve(trial.config, _number(trial.trial_id)), step)
        report_so_far(self._run)


def _fit(
    run: SweepRun, resolve: Resolve, space: dict[str, Any], count: int, searcher: Any = None, scheduler: Any = None
) -> None:
    """Give trials to Tune and wait for them, each in a placement group of its own. A failed one fails alone."""
    config, tracking, changes = run.config, run.trial_tracking(), run.changes

    def trainable(chosen: dict[str, Any]) -> None:
        run_trial(config, resolve(chosen, _number(tune.get_context().get_trial_id())), tracking, changes)

    # The trial's own process stays on this machine, where its directory is; its actors go where there is room.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    gpus = config.gpus_per_trial  # a bundle each: what shares one is planned, not left to Ray
    each = {"CPU": run.cpus_per_trial / max(1, gpus), "GPU": float(gpus > 0)}
    bundles: list[dict[str, float]] = [here, *[each] * max(1, gpus)]
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory(bundles)),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=run.metric,
                mode=config.direction,
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=count,
                reuse_actors=not config.experiment.reports_steps,  # nothing stops such a trial in the middle
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, verbose=0, callbacks=[Ends(run, resolve)], stop=run.budget
            ),
        ).fit()
    run.settle()


def domain(dimension: Dimension) -> Any:
    """Tune's name for a dimension."""
    if dimension.kind == "values":
        return tune.choice(list(dimension.values))
    low, high = dimension.values
    if dimension.kind == "integers":
        return tune.randint(low, high + 1)
    return tune.uniform(low, high) if dimension.kind == "uniform" else tune.loguniform(low, high)


def _asha(run: SweepRun) -> Any:
    """Successive halving (Li et al., 1810.05934) if that is wanted. Beyond the last step: the finished need no stop."""
    settings = run.config.scheduler
    if settings.kind != "asha":
        return None
    steps = run.config.example.training.steps
    return ASHAScheduler("step", max_t=steps + 1, grace_period=settings.interval, reduction_factor=settings.reduction)


def _number(trial_id: str) -> int:
    """Which of its search's trials it is; 0 from a searcher whose trials have no numbers."""
    text = trial_id.rsplit("_", 1)[-1]
    return int(text) if text.isdecimal() else 0
