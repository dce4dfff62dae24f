"""The reference of settings, made from their types: what ``ouroboros config`` prints and docs/settings.md holds."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from orchestration.experiments.registry import EXPERIMENTS
from orchestration.experiments.study.config import STUDIES, Study, find_study, known_studies
from orchestration.runs.config import ConfigError, about
from orchestration.runs.display import plain_table
from orchestration.runs.run import TEMPLATES
from pipelines.generators import GENERATORS, Generator
from pipelines.pages import fill
from pipelines.refinements import REFINEMENTS, Refinement
from pipelines.rewards import REWARDS, Reward
from policies.common.user_code import import_function
from policies.loops.rules import RULES, Rule
from policies.rl.settings import OF_THE_PROGRAM, nearest

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_KINDS = {"study": Study, "reward": Reward, "rule": Rule, "generator": Generator, "refinement": Refinement}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}


@functools.cache
def parts() -> dict[str, dict[str, Any]]:
    """All that has settings by name: of experiments and studies every key, of rewards, data rules, generators and
    refinements those that they add."""
    classes: dict[str, Any] = {name: find_study(name) for name in STUDIES}
    classes |= REWARDS.built_in | RULES.built_in | GENERATORS.built_in | REFINEMENTS.built_in
    found = {name: _part("experiment", name, each.schema, "", each.__doc__) for name, each in EXPERIMENTS.items()}
    return found | {name: _part_of_class(name, each) for name, each in classes.items()}


def _part_of_class(name: str, found: Any) -> dict[str, Any]:
    """The settings of what ``name`` leads to. Raises ValueError if that has none."""
    kind = next((kind for kind, base in _KINDS.items() if isinstance(found, type) and issubclass(found, base)), "")
    if not kind:
        takes = f"as a reward, its options are what it takes by name: {signature(found)}"
        raise ValueError(f"{name!r} is no class of a study, reward, rule, generator or refinement; {takes}")
    flat = kind == "study" or name in RULES.built_in or (name in GENERATORS.built_in and found.flat)
    block = "" if flat else f"reward.options.{name}." if kind == "reward" else f"{name}."
    return _part(kind, name, found.schema if kind == "generator" else found, block)


def _part(kind: str, name: str, schema: Any, block: str, said: str | None = None) -> dict[str, Any]:
    types = schema.model_json_schema()
    common = Rule.model_fields if kind == "rule" else ()  # said once, of MAD
    rows = settings_of(types, types.get("$defs", {}), block)
    settings = [row for row in rows if row["key"].removeprefix(block).split(".")[0] not in common]
    meaning = _first(said or types.get("description", ""))
    return {"name": name, "kind": kind, "meaning": meaning, "settings": settings}


def _installed() -> dict[str, str]:
    """The import paths of what other packages bring, by name. Nothing is imported."""
    found = {name: path for name, path in known_studies().items() if name not in STUDIES}
    return found | {name: r.path(name) or "" for r in (REWARDS, RULES, GENERATORS, REFINEMENTS) for name in r.installed}


def reference(name: str | None = None, key: str | None = None) -> Any:
    """What there is; or one part, which may be an import path; or of that one key, or the keys of a block. Raises
    ConfigError with the nearest."""
    known = parts()
    if name is None:
        others = [{"name": each, "kind": "installed", "meaning": path} for each, path in _installed().items()]
        return [{about: part[about] for about in ("name", "kind", "meaning")} for part in known.values()] + others
    if ":" in name or name in _installed():
        with about(""):
            known = {name: _part_of_class(name, import_function(_installed().get(name, name), "name", known, "Name"))}
    elif name not in known:
        keys = {row["key"]: f"{each} {row['key']}" for each in EXPERIMENTS for row in known[each]["settings"]}
        raise ConfigError(f"{name!r} has no settings: {_meant(name, dict(zip(known, known, strict=True)) | keys)}")
    rows = known[name]["settings"]
    begins = re.compile(rf"(reward\.options\.)?({re.escape(name)}\.)?{re.escape(key or '')}((\[\])?\..*)?")
    found = [row for row in rows if key is None or begins.fullmatch(row["key"])]
    if key is not None and not found:
        raise ConfigError(f"{name} has no key {key!r}: {_meant(key, {row['key']: row['key'] for row in rows})}")
    return {**known[name], "settings": found}


def render(known: Any) -> RenderableType:
    """What ``reference`` found, for people."""
    if isinstance(known, list):
        return plain_table(["name", "kind", "meaning"], [[*each.values()] for each in known])
    rows = [[row["key"], row["type"], default_of(row), row["meaning"]] for row in known["settings"]]
    table = plain_table(["key", "type", "default", "meaning"], rows) if rows else "no settings of its own"
    return Group(Text(f"{known['name']} ({known['kind']}): {known['meaning']}\n"), table)


def page() -> str:
    """docs/settings.md."""
    return fill(TEMPLATES / "settings.md", parts=parts().values(), default_of=default_of)


def default_of(row: Mapping[str, Any]) -> str:
    """A default as it would be written in a configuration; empty for a block."""
    if row["type"] == "block" or row["required"]:
        return "to be given" if row["required"] else ""
    default = row["default"]
    return default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)


def settings_of(
    schema: Mapping[str, Any], blocks: Mapping[str, Any], prefix: str = "", given: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for every key and block of a JSON schema; ``given`` are the defaults where a block is part of another."""
    for name, field in schema.get("properties", {}).items():
        if OF_THE_PROGRAM.items() <= field.items():
            continue
        held = [blocks[each] for each in re.findall(r"'#/\$defs/(\w+)'", str(field))]
        default, is_block = (given or field).get(name if given else "default"), "$ref" in field
        declared = Study.model_fields.get(name)  # which studies declare again
        meaning = held[0].get("description") if is_block else declared and declared.description
        row = {"key": f"{prefix}{name}", "type": _type(field), "default": None if is_block else default}
        row |= {"required": not given and name in schema.get("required", ())}
        yield row | {"meaning": _first(field.get("description") or meaning or "")}
        below = f"{prefix}{name}{'[]' if field.get('type') == 'array' else ''}."
        for block in held:
            yield from settings_of(block, blocks, below, default if is_block else None)


def _type(field: Mapping[str, Any]) -> str:
    """A type in words."""
    kind = field.get("type", "")
    if several := [*map(_type, field.get("anyOf", ())), *map(str, field.get("enum", ()))]:
        return " or ".join(several)
    if kind == "array":
        items = ", ".join(map(_type, field.get("prefixItems", ())))
        return f"[{items}]" if items else f"list of {_type(field['items'])}"
    if kind == "object":
        held = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")][0]
        return f"by name: {_type(held) if isinstance(held, dict) else 'anything'}"
    bounds = " and ".join(f"{sign} {field[name]:g}" for name, sign in _SIGNS.items() if name in field)
    return f"{_TYPES.get(kind, 'block' if '$ref' in field else 'anything')} {bounds}".rstrip()


def _first(text: str) -> str:
    """The first paragraph."""
    return " ".join(text.split("\n\n")[0].replace("``", "").split())


def _meant(given: str, known: Mapping[str, str]) -> str:
    near = nearest(given, [*known])
    return f"did you mean {known[near[0]]!r}?" if near else "see 'ouroboros config'"
