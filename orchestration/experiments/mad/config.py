"""The configuration of a MAD experiment: one loop, or several arms that differ from it. Light to import."""

from functools import cached_property
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, create_model, model_validator

from orchestration.experiments.settings import TaskRunSettings
from orchestration.runs.config import about
from pipelines.data.real_data import DataSettings
from pipelines.generators import GENERATORS
from policies.loops.rules import RULES, Rule
from policies.rl.settings import Name, Settings, explain

Made = TypeVar("Made", bound=Settings)
# The keys in which an arm can be described: of every rule, of every generator's own, or a block of its name.
_RULES: list[type[Rule]] = [Rule, *RULES.built_in.values()]
_OF_RULES = {key: field for rule in _RULES for key, field in rule.model_fields.items()}
_SCHEMAS = [each.schema for each in GENERATORS.built_in.values() if each.flat]
_FLAT = {key: field for schema in _SCHEMAS for key, field in schema.model_fields.items()}
BLOCKS = {name: each.schema for name, each in GENERATORS.built_in.items() if not each.flat}
GENERATOR_KEYS = {*_FLAT, *BLOCKS}
_KEYS: Any = create_model(
    "_KEYS",
    __base__=Settings,
    **{key: (field.annotation, field) for key, field in (_OF_RULES | _FLAT).items()},  # type: ignore[call-overload]
    **{name: (schema, schema()) for name, schema in BLOCKS.items()},
)


class ArmSettings(_KEYS, Settings):
    """What arms can differ in: the loop, and the generator that runs through it."""

    rule: Annotated[str, AfterValidator(RULES.check)] = Field(
        "fully_synthetic", description="what a generation's training set is made of"
    )
    family: Annotated[str, AfterValidator(GENERATORS.check)] = Field("gaussian", description="the generator")
    options: dict[str, dict[str, Any]] = Field({}, description="of a rule or a generator of one's own, by its name")

    @cached_property
    def loop(self) -> Rule:
        """The data rule with its settings. Raises ValueError."""
        kind = RULES.find(self.rule)
        given = {key: getattr(self, key) for key in kind.model_fields if key in _OF_RULES}
        return _made(kind, given, self.rule, self.options)

    @cached_property
    def generator(self) -> Any:
        """The generator's class. Raises ValueError."""
        return GENERATORS.find(self.family)

    @cached_property
    def generator_settings(self) -> Any:
        """The generator's settings. Raises ValueError."""
        schema = self.generator.schema
        place = getattr(self, self.family) if self.family in BLOCKS else self
        known = schema.model_fields if self.family in GENERATORS.built_in else ()
        return _made(schema, {key: getattr(place, key) for key in known}, self.family, self.options)

    @property
    def foreign(self) -> list[str]:
        """Import paths of a rule and a generator that are imported when they are first used."""
        return [name for name in (self.rule, self.family) if ":" in name]

    @property
    def code(self) -> list[str]:
        """Import paths of all that is not this program's own."""
        paths = [RULES.path(self.rule), GENERATORS.path(self.family), *self.loop.functions]
        return [path for path in paths if path]

    def check(self, generations: int) -> None:
        """Raise ValueError unless the rule has what it needs, at every generation."""
        self.loop.check()
        self.loop.later_sizes(generations)
        _ = self.generator_settings

    def underivable(self, generations: int, largest: bool = False) -> str | None:
        """What n_e, or the ``largest`` admissible n_s, needs and this arm lacks; None if it can be found."""
        found: str | None = self.generator.underivable(self.generator_settings, self.loop, generations, largest)
        return found

    def family_settings(self, classes: int = 0) -> dict[str, Any]:
        """The settings of this arm's family, as plain content; ``classes`` is how many the real images have."""
        content: dict[str, Any] = self.generator.settled(self.generator_settings, classes).model_dump(mode="json")
        return content

    @property
    def described(self) -> dict[str, Any]:
        """The settings as plain content, without the blocks of generators."""
        return self.model_dump(mode="json", exclude=set(BLOCKS))


def _made(schema: type[Made], given: dict[str, Any], name: str, options: dict[str, dict[str, Any]]) -> Made:
    """``schema`` with the settings ``given``, and those of the ``options`` that stand under its ``name``."""
    own = options.get(name, {})
    if twice := [key for key in own if key in given]:
        raise ValueError(f"options of {name}: give {twice[0]} as a key of its own")
    try:
        return schema.model_validate(own | given)
    except ValidationError as error:
        raise ValueError(f"options of {name}: {explain(schema, error)}") from error


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
        if not any(arm.foreign for arm in self.resolved_arms.values()):  # a stranger's run may name these
            self.check_arms()
        return self

    def check_arms(self) -> None:
        """Raise ValueError if an arm's sizes are none, or nothing can be derived of any. Imports what arms name."""
        for name, arm in self.resolved_arms.items():
            with about(f"arms.{name}" if self.arms else ""):
                arm.check(self.generations)
        named = {name for arm in self.resolved_arms.values() for name in (arm.rule, arm.family)}
        if unused := [name for arm in self.resolved_arms.values() for name in arm.options if name not in named]:
            raise ValueError(f"options: {unused[0]!r} is neither the rule nor the family of an arm")
        for name, wanted in self.derive:
            lacking = [
                arm.underivable(self.generations, name == "largest_admissible") for arm in self.resolved_arms.values()
            ]
            if wanted and all(lacking):
                raise ValueError(f"derive.{name} needs {lacking[0]}")

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
