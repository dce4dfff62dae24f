"""The configuration of a MAD experiment: one loop, or several arms that differ from it. Light to import."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from orchestration.experiments.settings import TaskRunSettings
from orchestration.runs.config import about
from pipelines.data.real_data import DataSettings
from pipelines.generators import GENERATORS
from pipelines.mad.captions import CaptionsSettings
from pipelines.refinements import REFINEMENTS, Refinement
from pipelines.refinements.aligned import Aligned
from pipelines.rewards import REWARDS
from pipelines.settings import RewardSettings
from policies.loops.rules import RULES, Rule
from policies.rl.settings import Name, Settings, explain

# The keys in which an arm can be described: of every rule, of every generator's own, or a block of its name.
_RULES: list[type[Rule]] = [Rule, *RULES.built_in.values()]
_OF_RULES = {key: field for rule in _RULES for key, field in rule.model_fields.items()}
_SCHEMAS = [each.schema for each in GENERATORS.built_in.values() if each.flat]
_FLAT = {key: field for schema in _SCHEMAS for key, field in schema.model_fields.items()}
BLOCKS = {name: each.schema for name, each in GENERATORS.built_in.items() if not each.flat}
GENERATOR_KEYS = {*_FLAT, *BLOCKS}
REFINING = dict(REFINEMENTS.built_in)
_KEYS: Any = create_model(
    "_KEYS",
    __base__=Settings,
    **{key: (field.annotation, field) for key, field in (_OF_RULES | _FLAT).items()},  # type: ignore[call-overload]
    **{name: (schema, schema()) for name, schema in (BLOCKS | REFINING).items()},
)


class ArmSettings(_KEYS, Settings):
    """What arms can differ in: the loop, and the generator that runs through it. The settings of a rule or a generator
    of one's own are a block under its name: the import path, or the entry point's."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    rule: Annotated[str, AfterValidator(RULES.check)] = Field(
        "fully_synthetic", description="what a generation is trained on: 'ouroboros config' lists them; or module:Name"
    )
    family: Annotated[str, AfterValidator(GENERATORS.check)] = Field(
        "gaussian", description="the generator: 'ouroboros config' lists them; or module:Name"
    )
    refinement: Annotated[str, AfterValidator(REFINEMENTS.check)] | None = Field(
        None, description="what a fitted generator undergoes before it draws: aligned, neon, sims; or module:Name"
    )
    captions: CaptionsSettings = CaptionsSettings()

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        if "options" in content:
            raise ValueError("options: what it held stands under its own name now, as in my_rule:EveryOther.every=3")
        if content.get("synthetic_from") == "all":
            raise ValueError("synthetic_from: samples of all earlier generations are rule=accumulate now")
        content = {key: value for key, value in content.items() if key != "synthetic_from"}  # runs from before hold it
        known = {*cls.model_fields, *RULES.installed, *GENERATORS.installed, *REFINEMENTS.installed}
        unknown = [(key, value) for key, value in content.items() if key not in known and ":" not in key]
        if unknown:
            problems: Any = [{"type": "extra_forbidden", "loc": (key,), "input": value} for key, value in unknown]
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return content

    @cached_property
    def loop(self) -> Rule:
        """The data rule with its settings. Raises ValueError."""
        kind = RULES.find(self.rule)
        return self._made(kind, {key: getattr(self, key) for key in kind.model_fields if key in _OF_RULES}, self.rule)

    @cached_property
    def generator(self) -> Any:
        """The generator's class. Raises ValueError."""
        return GENERATORS.find(self.family)

    @cached_property
    def generator_settings(self) -> Any:
        """The generator's settings. Raises ValueError."""
        if self.family in BLOCKS:
            return getattr(self, self.family)
        schema = self.generator.schema
        known = schema.model_fields if self.family in GENERATORS.built_in else ()
        return self._made(schema, {key: getattr(self, key) for key in known}, self.family)

    @cached_property
    def refined(self) -> Refinement | None:
        """The refinement with its settings. Raises ValueError."""
        if self.refinement is None or self.refinement in REFINING:
            return getattr(self, self.refinement) if self.refinement else None
        return self._made(REFINEMENTS.find(self.refinement), {}, self.refinement)

    @property
    def refinement_content(self) -> dict[str, Any] | None:
        """The refinement as a task is given it."""
        refined = self.refined
        return {"refinement": self.refinement, "how": refined.model_dump(mode="json")} if refined else None

    @property
    def rewarded(self) -> RewardSettings | None:
        """What leads a loop in which words ask for images: what it aligns with or selects by. Raises ValueError."""
        if isinstance(self.refined, Aligned):
            return self.refined.rewarded
        asked = self.loop.worded_reward() if self.generator.captioned else None
        if asked is None:
            return None
        options = {asked["name"]: asked["options"]} if asked["options"] else {}
        try:
            return RewardSettings(function=asked["name"], options=options)
        except ValidationError as error:
            raise ValueError(f"reward: {explain(RewardSettings, error)}") from error

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """The blocks of rules and generators of one's own, by name."""
        return self.__pydantic_extra__

    @property
    def foreign(self) -> list[str]:
        """Import paths of a rule, a generator and a refinement that are imported when they are first used."""
        return [name for name in (self.rule, self.family, self.refinement) if name and ":" in name]

    @property
    def code(self) -> list[str]:
        """Import paths of all that is not this program's own."""
        paths = [RULES.path(self.rule), GENERATORS.path(self.family), *self.loop.functions]
        paths += [REFINEMENTS.path(self.refinement)] if self.refinement else []
        paths += [REWARDS.path(name) for name in (self.rewarded.weights if self.rewarded else ())]
        return [path for path in paths if path]

    def underivable(self, generations: int, largest: bool = False) -> str | None:
        """What n_e, or the ``largest`` admissible n_s, needs and this arm lacks; None if it can be found."""
        if self.refined:
            return "an arm without a refinement"
        found: str | None = self.generator.underivable(self.generator_settings, self.loop, generations, largest)
        return found

    def family_settings(self, classes: int = 0) -> dict[str, Any]:
        """The settings of this arm's family, as plain content; ``classes`` is how many the real images have."""
        content: dict[str, Any] = self.generator.settled(self.generator_settings, classes).model_dump(mode="json")
        return content

    @property
    def described(self) -> dict[str, Any]:
        """The settings as plain content, without the blocks of generators."""
        return self.model_dump(mode="json", exclude={*BLOCKS, *REFINING} - {self.refinement or ""})

    def _made(self, schema: type[Settings], given: dict[str, Any], name: str) -> Any:
        """``schema`` with the settings ``given``, and those of the block under its ``name``."""
        own = self.own.get(name, {})
        with about(name if own else ""):
            if twice := [key for key in own if key in given]:
                raise ValueError(f"give {twice[0]} as a key of its own")
            try:
                return schema.model_validate(own | given)
            except ValidationError as error:
                raise ValueError(explain(schema, error)) from error


def _listed(wanted: Any) -> Any:
    """What is to be derived, also where each is said to be wanted or not."""
    return tuple(name for name, each in wanted.items() if each is not False) if isinstance(wanted, Mapping) else wanted


Derived = Annotated[tuple[Literal["effective_samples", "largest_admissible"], ...], BeforeValidator(_listed)]


class MadConfig(ArmSettings, TaskRunSettings):
    """A MAD experiment: arms × seeds × generations."""

    model_config = ArmSettings.model_config

    name: Name = "mad"
    generations: int = Field(
        10, ge=1, le=100_000, description="models trained one after another; the first on real data"
    )
    arms: dict[str, dict[str, Any]] = Field({}, description="by name, the keys in which an arm differs; none: one arm")
    data: DataSettings = DataSettings()
    derive: Derived = Field(
        (),
        description="of Gaussian arms with new real data: effective_samples is n_e and n_e/n_r, largest_admissible the "
        "largest n_s with n_e/n_r ≥ 1, by bisection",
    )

    @model_validator(mode="after")
    def _arms_can_run(self) -> Self:
        if not any(arm.foreign for arm in self.resolved_arms.values()):  # a stranger's run may name these
            self.check_arms()
        return self

    def check_arms(self) -> None:
        """Raise ValueError if an arm's sizes are none, or nothing can be derived of any. Imports what arms name."""
        arms = self.resolved_arms.values()
        for name, arm in self.resolved_arms.items():
            with self.about_arm(name):
                arm.loop.check()
                arm.loop.later_sizes(self.generations)
                _ = arm.generator_settings, arm.refined, arm.rewarded
        used = {name for arm in arms for name in (arm.rule, arm.family, arm.refinement)}
        if unused := {name for arm in arms for name in arm.own} - used:
            raise ValueError(f"{unused.pop()!r} is neither the rule nor the family of an arm, nor its refinement")
        for name in self.derive:
            lacking = [arm.underivable(self.generations, name == "largest_admissible") for arm in arms]
            if all(lacking):
                raise ValueError(f"derive.{name} needs {lacking[0]}")

    def about_arm(self, name: str) -> Any:
        """Let a ValueError of the block say which arm it is about."""
        return about(f"arms.{name}" if self.arms else "")

    @cached_property
    def resolved_arms(self) -> dict[str, ArmSettings]:
        """Every arm with all of its settings; without ``arms`` the one loop, named after its rule."""
        own = {name: getattr(self, name) for name in ArmSettings.model_fields} | self.own
        if not self.arms:
            return {self.rule: ArmSettings(**own)}
        resolved = {}
        for name, overrides in self.arms.items():
            blocks = {
                key: dict(own[key]) | value
                for key, value in overrides.items()
                if isinstance(value, dict) and (isinstance(own.get(key), Settings) or key in self.own)
            }
            try:
                resolved[name] = ArmSettings.model_validate(own | overrides | blocks)
            except ValidationError as error:
                raise ValueError(f"arms.{name}: {explain(ArmSettings, error)}") from error
        return resolved
