"""What Ray Tune is asked for: which trials, suggested and stopped by whom, on what part of the cluster."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator, Repeater

from orchestration.sweep_config import SweepConfig
from orchestration.sweep_run import SweepRun
from orchestration.trial import Trial, metric_of, run_trial
from policies.search_space import Dimension, Point

# Paths stay what they are, Ctrl-C is the command's own, and Tune prints nothing.
_TUNE = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
_SEED = "__trial_index__"  # where Tune's Repeater puts which repetition of a point a trial is


@dataclass(frozen=True)
class Plan:
    """Trials for Tune. ``resolve`` makes a trial of what Tune chose and of the trial's number."""

    space: dict[str, Any]
    resolve: Callable[[dict[str, Any], int], Trial]
    count: int
    searcher: Any = None
    scheduler: Any = None

    @classmethod
    def listed(cls, trials: Sequence[Trial], config: SweepConfig | None = None) -> Self:
        """These trials; with ``config``, its scheduler may stop some."""
        space = {"number": tune.grid_search([*range(len(trials))])}
        stopping = _asha(config) if config and config.scheduler.kind == "asha" else None
        return cls(space, lambda chosen, _: trials[chosen["number"]], min(1, len(trials)), scheduler=stopping)

    @classmethod
    def population(cls, config: SweepConfig, members: Sequence[Trial]) -> Self:
        """Members that copy each other's weights, and try settings near the copied one's (Jaderberg, 1711.09846)."""
        mutations = {
            key: list(dimension.values) if dimension.kind == "values" else domain(dimension)
            for key, dimension in config.dimensions.items()
        }

        def within(point: Point) -> Point:
            return {key: config.dimensions[key].clipped(value) for key, value in point.items()}

        return cls(
            {key: domain(dimension) for key, dimension in config.dimensions.items()},
            lambda chosen, number: members[number].at(chosen),
            len(members),
            BasicVariantGenerator(points_to_evaluate=[member.point for member in members]),
            # In step: a copied commit then is of the step that its new owner has reached.
            PopulationBasedTraining(
                "step",
                perturbation_interval=config.scheduler.interval,
                hyperparam_mutations=mutations,
                custom_explore_fn=within,
                synch=True,
            ),
        )

    @classmethod
    def suggested(cls, config: SweepConfig, root: Path, known: Sequence[Point]) -> Self:
        """Points that Optuna suggests, those of earlier sessions first: they answer from their directories."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)

        def resolve(chosen: dict[str, Any], _: int) -> Trial:
            return Trial.of(root, {k: v for k, v in chosen.items() if k != _SEED}, chosen.get(_SEED, 0))

        # Another seed each session: a sampler that starts anew would suggest again what it suggested first.
        suggesting: Any = OptunaSearch(
            {key: domain(dimension) for key, dimension in config.dimensions.items()},
            metric=metric_of(config),
            mode=config.direction,
            seed=config.seed + len(known),
            points_to_evaluate=list(known) or None,
        )
        searcher = Repeater(suggesting, repeat=config.seeds) if config.seeds > 1 else suggesting
        stopping = _asha(config) if config.scheduler.kind == "asha" else None
        return cls({}, resolve, config.trials * config.seeds, searcher, stopping)


class Ends(tune.Callback):
    """Tells a sweep how its trials end."""

    def __init__(self, run: SweepRun, plan: Plan) -> None:
        self._run, self._plan = run, plan

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores its callbacks, and a sweep is never restored from what Tune stores."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It returned, or was stopped after its last report."""
        step = (trial.last_result or {}).get("step")
        self._run.ended(self._plan.resolve(trial.config, _number(trial.trial_id)), step)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It raised, or its process died."""
        self._run.ended(self._plan.resolve(trial.config, _number(trial.trial_id)), None)


def fit(run: SweepRun, plan: Plan) -> None:
    """Give trials to Tune and wait for them, each in a placement group of its own. A failed one fails alone."""
    if not plan.count:
        return
    os.environ.update(_TUNE)
    config, tracking, resolve = run.config, run.trial_tracking(), plan.resolve

    def trainable(chosen: dict[str, Any]) -> None:
        run_trial(config, resolve(chosen, _number(tune.get_context().get_trial_id())), tracking)

    # The trial's own process stays on this machine, where its directory is; its actors go where there is room.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    bundles: list[dict[str, float]] = [here, {"CPU": run.cpus_per_trial, "GPU": config.gpus_per_trial}]
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory(bundles)),
            param_space=plan.space,
            tune_config=tune.TuneConfig(
                metric=metric_of(config),
                mode=config.direction,
                search_alg=plan.searcher,
                scheduler=plan.scheduler,
                num_samples=plan.count,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, verbose=0, callbacks=[Ends(run, plan)], stop=run.budget
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


def _asha(config: SweepConfig) -> Any:
    """Successive halving (Li et al., 1810.05934). Beyond the last step, as what is finished needs no stop."""
    settings, steps = config.scheduler, config.example.training.steps
    return ASHAScheduler("step", max_t=steps + 1, grace_period=settings.interval, reduction_factor=settings.reduction)


def _number(trial_id: str) -> int:
    """Which of its search's trials it is; 0 from a searcher whose trials have no numbers."""
    text = trial_id.rsplit("_", 1)[-1]
    return int(text) if text.isdecimal() else 0
