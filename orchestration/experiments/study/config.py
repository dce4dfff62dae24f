"""What a study is to its author: one class, whose fields are its settings. Light to import."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from inspect import isabstract
from typing import Any, ClassVar, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from orchestration.experiments.settings import TaskRunSettings
from pipelines.storage.tasks import Task
from policies.common.claims import Claim
from policies.common.intervals import Scale
from policies.common.user_code import import_function
from policies.rl.settings import Name, explain

STUDIES: dict[str, str] = {  # name → import path
    "adversarial_features": "orchestration.experiments.adversarial_features:AdversarialFeatures",
    "animate": "orchestration.experiments.animate:Animate",
    "any_to_any": "orchestration.experiments.any_to_any:AnyToAny",
    "consistency": "orchestration.experiments.consistency:Consistency",
    "distil": "orchestration.experiments.distil:Distil",
    "drag": "orchestration.experiments.drag:Drag",
    "edit_videos": "orchestration.experiments.edit_videos:EditVideos",
    "erase": "orchestration.experiments.erase:Erase",
    "few_labels": "orchestration.experiments.few_labels:FewLabels",
    "guard": "orchestration.experiments.guard:Guarding",
    "invert": "orchestration.experiments.invert:Invert",
    "keypoints": "orchestration.experiments.keypoints:FindKeypoints",
    "neurons": "orchestration.experiments.neurons:Neurons",
    "text_gan": "orchestration.experiments.text_gan:TextGan",
}
_GROUP = "ouroboros.studies"  # of entry points, by which an installed package brings its own


class Study(TaskRunSettings, ABC):
    """A study: settings, arms (the treatment and its controls) × seeds of tasks, and claims about what they measure.

    A subclass adds its settings as fields and gives ``arms`` a default: all arms that it knows, of which a
    configuration may name fewer. Reading a configuration as ``Study`` makes the class that its key ``study`` names.
    """

    study: str = Field(description="a name that is registered, or an import path module:Class")
    name: Name = "study"
    scale: ClassVar[Scale | None] = None  # of the seeds of its metrics; None: by their names
    arms: tuple[str, ...] = Field((), description="those to run; a study's own default is all of them")

    @abstractmethod
    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The tasks whose results are reported for an arm and a seed (see pipelines.studies); what they need follows.

        Tasks of equal parameters and inputs are one task, done once, in whatever arm they are.
        """

    @abstractmethod
    def claims(self) -> Iterable[Claim]:
        """What the study says will come out of its arms, whichever are run."""

    def claimed(self) -> list[Claim]:
        """The claims about arms that are run, on the study's scale where they name none."""
        on = {"absolute": self.scale}  # others are on a scale of their own
        found = [claim for claim in self.claims() if claim.arm in self.arms]
        return [replace(claim, scale=claim.scale or on.get(claim.kind)) for claim in found]

    def preflight(self) -> None:
        """Raise ValueError, in one line, for whatever cannot be run: called before Ray starts."""

    def describe(self) -> str:
        """What a dry run adds about this study, as lines."""
        return ""

    def reads(self) -> Mapping[str, str]:
        """The files, directories and models that are read, by configuration key: a run goes on with no others."""
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _as_named(cls, content: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        if cls is not Study or not isinstance(content, Mapping):
            return handler(content)
        if not isinstance(content.get("study"), str):
            raise ValueError(f"study: name one of {', '.join(known_studies())}, or an import path module:Class")
        found = find_study(content["study"])
        try:
            return found.model_validate(content)
        except ValidationError as error:
            raise ValueError(explain(found, error)) from error

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        known, listed = cls.model_fields["arms"].default, ", ".join(cls.model_fields["arms"].default)
        if unknown := [arm for arm in arms if arm not in known]:
            raise ValueError(f"{unknown[0]!r} is none of the arms {listed}")
        if not arms or len(set(arms)) < len(arms):
            raise ValueError(f"give each arm once, of {listed}")
        return arms


def known_studies() -> dict[str, str]:
    """Every registered study: name → import path."""
    return {each.name: each.value for each in entry_points(group=_GROUP)} | STUDIES


def find_study(name: str) -> type[Study]:
    """The class of a registered study, or of an import path. Raises ValueError."""
    known = known_studies()
    if name not in known and ":" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}; or give an import path module:Class"
        raise ValueError(f"study {name!r} is not known: {hint}")
    found = import_function(known.get(name, name), "study", list(known))
    if not (isinstance(found, type) and issubclass(found, Study)):
        raise ValueError(f"study {name!r} is no class that extends orchestration.experiments.study.config.Study")
    if isabstract(found):
        raise ValueError(f"study {name!r} has no {' and no '.join(sorted(found.__abstractmethods__))}: write it")
    return found
