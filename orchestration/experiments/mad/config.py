"""The configuration of a MAD experiment: one loop, or several arms that differ from it. Light to import."""

from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from orchestration.experiments.settings import TaskRunSettings
from orchestration.runs.config import about
from pipelines.data.real_data import DataSettings
from pipelines.generators import settings as families
from pipelines.generators.registry import CLOSED_FORM, SETTINGS
from policies.loops.settings import LoopSettings
from policies.rl.settings import Name, Settings, explain

MOST_DIMENSIONS = 500  # of simulations for n_e
MOST_BISECTED, MOST_BIAS = 50, 0.99  # dimensions and bias of those for the largest admissible n_s: minutes, not hours
Family = Literal["gaussian", "categorical", "mixture", "gan", "diffusion"]


class ArmSettings(families.MixtureSettings, families.CategoricalSettings, families.GaussianSettings, LoopSettings):
    """What arms can differ in: the loop, and the generator that runs through it."""

    family: Family = "gaussian"
    gan: families.GanSettings = families.GanSettings()
    diffusion: families.DiffusionSettings = families.DiffusionSettings()

    def underivable(self, generations: int, largest: bool = False) -> str | None:
        """What n_e, or the ``largest`` admissible n_s, needs and this arm lacks; None if it can be found."""
        if self.family != "gaussian" or self.rule not in ("fresh", "memory") or self.supply == "fixed":
            return "family=gaussian with rule=fresh, or with rule=memory and real_supply=fresh"
        sizes = {self.sizes(generation, generations) for generation in range(2, generations + 1)}
        n_real = sizes.pop()[0] if len(sizes) == 1 else 0
        if n_real < 1:
            return "as many new real samples (1 or more) at every generation from 2 on"
        if self.dimension > MOST_DIMENSIONS and self.covariance != "known":
            return f"a dimension of {MOST_DIMENSIONS} at most, or covariance=known"
        simulated = self.rule == "fresh" and self.covariance == "unbiased" and self.real_weight == 1 and n_real > 1
        quick = self.sampling_bias == 1 or (self.dimension <= MOST_BISECTED and self.sampling_bias <= MOST_BIAS)
        if largest and not (simulated and quick):
            return (
                f"rule=fresh, covariance=unbiased, real_weight=1, n_real of 2 or more, and a dimension of "
                f"{MOST_BISECTED} and a sampling_bias of {MOST_BIAS} at most (or 1, where every n_s is admissible)"
            )
        return None

    def family_settings(self, classes: int = 0) -> dict[str, Any]:
        """The settings of this arm's family, as plain content; ``classes`` is how many the real images have."""
        if self.family in CLOSED_FORM:
            return self.model_dump(mode="json", include=set(SETTINGS[self.family].model_fields))
        content: dict[str, Any] = getattr(self, self.family).model_dump(mode="json")
        if self.family == "diffusion":  # a small training set may lack the last class
            content["classes"] = content["classes"] or classes
        return content


class DeriveSettings(Settings):
    """What is worked out from a Gaussian fresh-data loop when it is done."""

    effective_samples: bool = Field(False, description="n_e and n_e/n_r of every arm with new real data")
    largest_admissible: bool = Field(False, description="the largest n_s with n_e/n_r ≥ 1, by bisection")


class MadConfig(ArmSettings, TaskRunSettings):
    """A MAD experiment: arms × seeds × generations."""

    name: Name = "mad"
    generations: int = Field(10, ge=1, le=100_000)
    arms: dict[str, dict[str, Any]] = Field({}, description="by name, the keys in which an arm differs; none: one arm")
    data: DataSettings = DataSettings()
    derive: DeriveSettings = DeriveSettings()

    @model_validator(mode="after")
    def _arms_can_run(self) -> Self:
        for name, arm in self.resolved_arms.items():
            with about(f"arms.{name}" if self.arms else ""):
                arm.check()
                for generation in range(2, self.generations + 1):
                    arm.sizes(generation, self.generations)
        for name, wanted in self.derive:
            lacking = [
                arm.underivable(self.generations, name == "largest_admissible") for arm in self.resolved_arms.values()
            ]
            if wanted and all(lacking):
                raise ValueError(f"derive.{name} needs {lacking[0]}")
        return self

    @cached_property
    def resolved_arms(self) -> dict[str, ArmSettings]:
        """Every arm with all of its settings; without ``arms`` the one loop, named after its rule."""
        own = {name: getattr(self, name) for name in ArmSettings.model_fields}
        if not self.arms:
            return {self.rule: ArmSettings(**own)}
        resolved = {}
        for name, overrides in self.arms.items():
            try:
                blocks = {key: own.get(key) for key in overrides if isinstance(overrides[key], dict)}
                merged = {
                    key: block.model_dump() | overrides[key]
                    for key, block in blocks.items()
                    if isinstance(block, Settings)
                }
                resolved[name] = ArmSettings.model_validate(own | overrides | merged)
            except ValidationError as error:
                raise ValueError(f"arms.{name}: {explain(ArmSettings, error)}") from error
        return resolved
