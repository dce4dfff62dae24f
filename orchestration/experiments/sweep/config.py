"""The configuration of a sweep: one loop run many times over a space of its settings. Light to import."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestration.experiments.experiment import SweptExperiment
from orchestration.experiments.metric_names import better_end
from orchestration.experiments.registry import SWEPT
from orchestration.runs.config import ConfigError, load_config
from orchestration.tracking.tracker import TrackingSettings
from pipelines.storage.locations import find
from policies.common import search_space
from policies.common.search_space import FRESH_SEEDS, MOST_POINTS, Dimension, Point
from policies.rl.settings import Name, Settings


class SchedulerSettings(Settings):
    """What ends or changes a trial before its last step; DDPO only."""

    kind: Literal["none", "asha", "pbt"] = Field("none", description="asha stops the worse; pbt copies the better")
    interval: int = Field(10, ge=1, description="asha: steps of a trial before it may be stopped; pbt: between copies")
    reduction: int = Field(3, ge=2, description="asha: of so many trials that reach a rung, one goes on")


class BudgetSettings(Settings):
    """What a sweep may spend, over all its sessions. It stops where the first is reached, and can be continued."""

    hours: float | None = Field(None, gt=0, description="wall time of all sessions; null: no limit")
    reward_queries: int | None = Field(None, ge=1, description="images scored in training; DDPO only")


class SweepConfig(Settings):
    """Points × seeds, each a trial: one run of the loop."""

    name: Name = "sweep"
    loop: str = Field("ddpo", description="the experiment that is run many times")
    config: str = Field("configs/ddpo/digits.yaml", description="what every trial starts from")
    fixed: dict[str, Any] = Field({}, description="dotted keys that every trial overrides")
    space: dict[str, Any] = Field({}, description="dotted keys and the values to try: a list, or a range")
    search: Literal["grid", "random", "optuna"] = Field("random", description="how points of the space are chosen")
    trials: int = Field(8, ge=1, le=MOST_POINTS, description="points to try; a grid has its own number")
    seeds: int = Field(1, ge=1, le=FRESH_SEEDS, description="runs of each point")
    seed: int = Field(0, ge=0, description="seed of the search")
    scheduler: SchedulerSettings = SchedulerSettings()
    metric: str | None = Field(None, description="what is compared; null: evaluator/full, or the family's distance")
    mode: Literal["max", "min"] | None = Field(None, description="which end of it is better; null: as is known")
    confirm_seeds: int = Field(
        0, ge=0, le=FRESH_SEEDS, description="fresh seeds on which the best point meets the unchanged config"
    )
    budget: BudgetSettings = BudgetSettings()
    cpus_per_trial: int | None = Field(None, ge=1, description="CPUs of a trial; null: all that one machine has")
    gpus_per_trial: int = Field(0, ge=0, description="0: trials run on CPUs")
    register_as: str | None = Field(None, description="name of the MLflow model that the best DDPO trial becomes")
    output_dir: str | None = Field(None, description="the sweep's directory; null: runs/<name>-<date>-<time>")
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("loop")
    @classmethod
    def _can_be_swept(cls, loop: str) -> str:
        if loop not in SWEPT:
            raise ValueError(f"no experiment that can be swept; there are {' and '.join(SWEPT)}")
        return loop

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        space, scheduler, experiment = self.dimensions, self.scheduler.kind, self.experiment
        if self.search == "grid":
            points = len(search_space.grid_points(space))
            if "trials" in self.model_fields_set and self.trials not in (
                points,
                type(self).model_fields["trials"].default,
            ):
                raise ValueError(f"trials is {self.trials}, but this grid has {points} points: shorten lists of space")
        if both := sorted(set(space) & set(self.fixed)):
            raise ValueError(f"{both[0]} is in both space and fixed: take it out of one")
        for key in (*self.fixed, *space):
            if whole := next((each for each in space if key.startswith(f"{each}.")), None):
                raise ValueError(f"space.{whole} sets all below it, so {key} would be lost: name only keys below")
        own = {"seed", "seeds", "output_dir", "tracking"} & {key.split(".")[0] for key in (*space, *self.fixed)}
        if own:
            raise ValueError(f"{min(own)} of a trial is set by the sweep: use the sweep's own seeds and tracking")
        if scheduler != "none" and not experiment.reports_steps:
            raise ValueError("scheduler.kind: a MAD trial reports once, at its end, so nothing can stop it before")
        if scheduler == "pbt" and (self.search != "random" or self.seeds > 1 or self.trials < 4):
            raise ValueError("scheduler.kind pbt needs search=random, seeds=1 and 4 trials or more: they are copied")
        if self.budget.reward_queries and not experiment.asks_rewards:
            raise ValueError("budget.reward_queries: the MAD loop asks no reward; set budget.hours")
        if self.register_as and not experiment.leaves_pipeline:
            raise ValueError("register_as: only DDPO trials leave a pipeline to register")
        return self

    @property
    def experiment(self) -> SweptExperiment:
        """What is run."""
        return SWEPT[self.loop]

    @cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """The space, read."""
        return search_space.read_space(self.space)

    @property
    def points(self) -> list[Point]:
        """What a grid or random search will try; for optuna, nothing is known before."""
        if self.search == "optuna":
            return []
        if self.search == "grid":
            return search_space.common_points(search_space.grid_points(self.dimensions))
        found = search_space.random_points(self.dimensions, self.trials, self.seed)
        # Members of a population may be alike.
        return found if self.scheduler.kind == "pbt" else search_space.common_points(found)

    @cached_property
    def example(self) -> Any:
        """The configuration of one trial, for what all of them share. Raises ConfigError."""
        return self.trial_config(search_space.corner_points(self.dimensions)[0], 0)

    @property
    def direction(self) -> Literal["max", "min"]:
        """Whether larger or smaller values of the metric are better."""
        return self.mode or better_end(self.metric or "") or self.experiment.end

    @cached_property
    def compared(self) -> str:
        """The metric that trials are compared by."""
        return self.metric or self.experiment.default_metric(self.example)

    @cached_property
    def period(self) -> int:
        """Steps between two reports of a trial."""
        return self.experiment.period(self.example, self.compared)

    def trial_config(self, point: Point, seed: int, place: Mapping[str, Any] | None = None) -> Any:
        """The configuration of one trial; ``place`` holds its output_dir and tracking. Raises ConfigError."""
        path = find(self.config)
        if path is None or not path.is_file():
            raise ConfigError(f"config: there is no file {self.config!r}")
        own = self.experiment.seeded(seed)
        return load_config(self.experiment.schema, path, values={**self.fixed, **point, **own, **(place or {})})
