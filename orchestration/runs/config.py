"""A run's configuration: typed, read from YAML, overridden by dotted keys, every key known. Light to import."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestration.errors import ConfigError, about
from pipelines.storage.locations import find
from pipelines.storage.yaml_text import parse_yaml, read_yaml
from policies.rl.settings import explain

Config = TypeVar("Config", bound=BaseModel)
_DEPTH = 50  # of blocks in blocks
_ABOVE_A_PATH = re.compile(r"(reward\.function\.|(reward\.)?options\.|arms\.[^.:]+\.)?")  # what one may stand below
# Into a terminal, a path or a UTF-8 file: controls, halves of characters, and what turns the direction of text.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def load_config(
    schema: type[Config],
    sources: Path | Sequence[str | Path | Mapping[str, Any]] | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read the ``sources``, YAML files, relative to here or to the checkout, or what one would hold (none: all
    defaults), apply ``key.sub=value`` overrides and ``values`` by dotted key, validate.

    Of several a later one wins, key by key within each block; keys at the top may be dotted. Raises ConfigError.
    """
    content: dict[str, Any] = {}
    for path in [sources] if isinstance(sources, Path) else sources or ():
        try:
            with about(f"config {path} is not YAML that can be used"):
                held = dict(path) if isinstance(path, Mapping) else read_yaml(find(str(path)) or Path(path))
        except OSError as error:
            raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
        if not isinstance(held, dict | None):
            raise ConfigError(f"config {path} holds a {type(held).__name__}, not keys and values")
        with about("" if isinstance(path, Mapping) else f"config {path}"):
            blocks = _plain(held or {})
        for key, block in blocks.items():
            both = isinstance(block, dict) and isinstance(content.get(key), dict)
            assign(content, key, {**content[key], **block} if both else block)
    for each in overrides:
        override(content, each)
    for name, value in (values or {}).items():
        assign(content, name, value)
    return validate(schema, content)


def validate(schema: type[Config], content: dict[str, Any]) -> Config:
    """The typed configuration of plain ``content``. Raises ConfigError naming the key."""
    try:
        return schema.model_validate(_plain(content))
    except ValidationError as error:
        raise ConfigError(explain(schema, error)) from error


def override(content: dict[str, Any], assignment: str) -> None:
    """Apply ``key.sub=value`` to plain ``content``. Raises ConfigError."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        hint = f": give a file as --config {assignment}" if assignment.endswith((".yaml", ".yml")) else ""
        raise ConfigError(f"override {assignment!r} is not key=value, such as training.learning_rate=1e-4{hint}")
    with about(f"override {assignment!r}: the value is not YAML"):
        value = parse_yaml(text)
    assign(content, key, value)


def assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at the dotted ``key`` of plain ``content``. Raises ConfigError."""
    *parents, last = _parts(key)
    if len(parents) > _DEPTH:
        raise ConfigError(f"{key[:60]!r}… is no key: it has {len(parents)} dots")
    block = content
    for parent in parents:
        if block.get(parent) is None:
            block[parent] = {}
        block = block[parent]
        if not isinstance(block, dict):
            raise ConfigError(f"{key!r}: {parent!r} is a value, it has no keys below it")
    block[last] = value


def _parts(key: str) -> list[str]:
    """The keys that a dotted one is made of; the dots of an import path such as ``my/rewards.py:redness``, which may be
    one of them, divide nothing."""
    above = _ABOVE_A_PATH.match(key)[0] if ":" in key else ""  # type: ignore[index]
    place, colon, rest = key.removeprefix(above).rpartition(":")
    first, *below = rest.split(".")
    return [*above.split(".")[:-1], place + colon + first, *below]


def visible(text: str) -> str:
    """``text``, which may hold a stranger's words, with nothing in it that a terminal would obey."""
    return _UNWRITABLE.sub(lambda found: found[0] if found[0] == "\n" else repr(found[0])[1:-1], text)


def _plain(content: Any, key: str = "") -> Any:
    """Plain values for strict models, lists as tuples. Raises ConfigError for what no setting means and no file of a
    run can hold."""
    if isinstance(content, Path):
        return str(content)
    if isinstance(content, dict):
        below = f"{key}." if key else ""
        if odd := [name for name in content if not isinstance(name, str) or not name or _UNWRITABLE.search(name)]:
            raise ConfigError(f"{below}{odd[0]!r} is no key")
        return {name: _plain(value, f"{below}{name}") for name, value in content.items()}
    if isinstance(content, list | tuple):
        return tuple(_plain(value, key) for value in content)
    problem = None
    if isinstance(content, str) and (found := _UNWRITABLE.search(content.replace("\n", " "))):
        problem = f"the character {found[0]!r} cannot be part of a setting"
    elif isinstance(content, float) and not math.isfinite(content):
        problem = f"{content} is no finite number"
    elif isinstance(content, int) and not -(2**63) <= content < 2**63:
        problem = "a whole number has 64 bits at most"
    elif not isinstance(content, str | float | int | None):
        problem = f"{content} is a {type(content).__name__}; write text in quotes"
    if problem:
        raise ConfigError(f"{key}: {problem}")
    return content
