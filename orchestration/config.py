"""A run's configuration: typed, read from YAML, overridden by dotted keys, every key known. Light to import."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from actors.settings import ActorSettings
from orchestration.tracking import TrackingSettings
from pipelines.checkpoint import parse_size
from pipelines.settings import CaptionerSettings, ModelSettings, RewardSettings
from policies.settings import AdvantageSettings, SamplingSettings, Settings, TrainingSettings, explain


class ConfigError(ValueError):
    """A configuration that cannot be run: what is wrong, where, and what to do. One line."""


@contextlib.contextmanager
def about(what: str = "") -> Iterator[None]:
    """Let a ValueError of the block be a ConfigError that begins with ``what`` it is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {error}" if what else str(error)) from error


class EvaluationSettings(Settings):
    """The held-out measure: images of fixed prompts and seeds that are never learned from."""

    evaluator: str | None = Field(
        "models/digits/evaluator", description="directory of an evaluator; null: only the reward is measured"
    )
    images: int = Field(1080, ge=1, description="images before and after the run")
    every: int = Field(10, ge=0, description="steps between interim evaluations; 0 for none")
    interim_images: int = Field(180, ge=1)
    patience: int = Field(
        2,
        ge=0,
        description="so many evaluations in a row below the best one end a run, which keeps its weights; 0: never",
    )

    def size_after(self, done: int, steps: int) -> int:
        """How many images are to be measured when ``done`` of ``steps`` steps are done."""
        if done == steps:
            return self.images
        return self.interim_images if self.every and done % self.every == 0 else 0


class CheckpointSettings(Settings):
    """Commits of the whole run state."""

    every: int = Field(5, ge=1, description="steps between commits")
    keep: int | str = Field(2, description='newest commits to keep: their number, or what all may take ("20 GB")')

    @field_validator("keep", mode="before")
    @classmethod
    def _is_number_or_size(cls, keep: Any) -> Any:
        if isinstance(keep, str):
            parse_size(keep)
        elif isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError('write how many commits are to be kept, 1 at least, or a size such as "20 GB"')
        return keep


class DdpoConfig(Settings):
    """One DDPO run."""

    name: str = Field("ddpo", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0)
    output_dir: str | None = Field(None, description="the run's directory; null: runs/<name>-<date>-<time>-seed<seed>")
    prompts: str = Field("configs/prompts/digits.txt", description="a text file, one prompt a line")
    model: ModelSettings = ModelSettings()
    captioner: CaptionerSettings = CaptionerSettings()
    reward: RewardSettings = RewardSettings()
    sampling: SamplingSettings = SamplingSettings()
    training: TrainingSettings = TrainingSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    actors: ActorSettings = ActorSettings()


Config = TypeVar("Config", bound=BaseModel)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def load_config(schema: type[Config], paths: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML files ``paths`` (none: all defaults), apply ``key.sub=value`` overrides, validate.

    Of several files a later one wins, key by key within each block. Raises ConfigError.
    """
    content: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, Path) else paths or ():
        try:
            blocks = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(blocks, dict):
            raise ConfigError(f"config {path} holds a {type(blocks).__name__}, not keys and values")
        for key, block in blocks.items():
            both = isinstance(block, dict) and isinstance(content.get(key), dict)
            content[key] = {**content[key], **block} if both else block
    for each in overrides:
        override(content, each)
    return validate(schema, content)


def validate(schema: type[Config], content: dict[str, Any]) -> Config:
    """The typed configuration of plain ``content``. Raises ConfigError naming the key."""
    try:
        return schema.model_validate(_tuples(content))
    except ValidationError as error:
        raise ConfigError(explain(schema, error)) from error
    except RecursionError as error:
        raise ConfigError("the configuration refers to itself (a YAML alias inside its own anchor)") from error


def override(content: dict[str, Any], assignment: str) -> None:
    """Apply ``key.sub=value`` to plain ``content``. Raises ConfigError."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {assignment!r} is not key=value, such as training.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {assignment!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    block = content
    for parent in parents:
        if block.get(parent) is None:
            block[parent] = {}
        block = block[parent]
        if not isinstance(block, dict):
            raise ConfigError(f"override {assignment!r}: {parent!r} is a value, it has no keys below it")
    block[last] = value


def _tuples(content: Any) -> Any:
    """Plain YAML for strict models: lists become tuples, and 1e-4, which YAML 1.1 reads as text, a number."""
    if isinstance(content, dict):
        return {key: _tuples(value) for key, value in content.items()}
    if isinstance(content, list):
        return tuple(_tuples(value) for value in content)
    return float(content) if isinstance(content, str) and _EXPONENT.fullmatch(content) else content
