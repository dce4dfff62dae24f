"""What a run reads, by digest: prompts, models, captioner, evaluator, options and code of rewards, data.

A run remembers it in its manifest, and goes on with nothing else unless a person says so. Every file is hashed once,
at the beginning; later, one whose size and time of change are as they were is taken to be the same.
"""

import ast
import contextlib
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestration.runs.config import ConfigError, about
from orchestration.runs.manifest import has_only_begun
from pipelines.rewards import REWARDS
from pipelines.storage.locations import fingerprint
from policies.common.user_code import IN_PROCESS, PROGRAM, file_of, import_function, source_of

Inputs = dict[str, dict[str, str | None]]  # by configuration key, or "code of" a module


def fingerprints(paths: Mapping[str, str], held: Inputs | None = None) -> Inputs:
    """Of every path by its key."""
    return {key: fingerprint(path, (held or {}).get(key)) for key, path in paths.items()}


def code_of(names: Iterable[str]) -> Inputs:
    """Of the modules and files behind import paths: each one's file, and those beside it that it imports; of a function
    that is in this process alone, its source. Of this program's own there is nothing to say."""
    found: Inputs = {}
    for name in names:
        if name.startswith(tuple(f"{package}." for package in PROGRAM)):
            continue
        with about():
            function = import_function(name, "reward.function", REWARDS.all_names)
        if name.startswith(f"{IN_PROCESS}:"):
            digest = hashlib.sha256(source_of(function)).hexdigest()
            found[f"code of {name}"] = {"path": name, "sha256": digest, "stamp": None}
        else:
            used = _used(name.rpartition(":")[0], file_of(name))
            found |= {f"code of {module}": fingerprint(str(file)) for module, file in used}
    return found


def _used(module: str, own: Path | None) -> Iterator[tuple[str, Path]]:
    """A module and its file, which may be named by its ``own`` path, and the same of every module that it imports from
    its package or from beside it, and so on: not of libraries, nor of this program."""
    beside, seen, waiting = own and own.parent, set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen or (file := own if own and name == module else _file(name)) is None:
            continue
        seen.add(name)
        is_package, top = file.name == "__init__.py", name.partition(".")[0]
        beside = beside or file.parents[module.count(".") + is_package]
        is_library = top in PROGRAM or {"site-packages", "dist-packages"} & {*file.parts}
        if top == module.partition(".")[0] or (file.is_relative_to(beside) and not is_library):
            yield name, file
            waiting += _imported(file, name if is_package else name.rpartition(".")[0])


def _file(module: str) -> Path | None:
    with contextlib.suppress(Exception, SystemExit):  # the packages above it are imported, and may fail in any way
        spec = importlib.util.find_spec(module)
        return Path(spec.origin) if spec and spec.has_location and spec.origin and spec.origin.endswith(".py") else None
    return None


def _imported(file: Path, package: str) -> Iterator[str]:
    """Every name that the source of a module could mean another module by."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def changed_inputs(held: Inputs, found: Inputs) -> dict[str, str]:
    """What is not as it was, by its key, in words."""
    words = {}
    for key, before in held.items():
        now = found.get(key)
        if now is None or now["sha256"] is None:
            words[key] = f"{before['path']} is not there"
        elif before["sha256"] is not None and now["sha256"] != before["sha256"]:
            place = before["path"] if now["path"] == before["path"] else f"{now['path']}, not {before['path']},"
            words[key] = f"{place} holds something else"
    return words


def accept(directory: Path, manifest: dict[str, Any], held: Mapping[str, Any], found: Inputs, changes: bool) -> None:
    """Put what a run reads now into its ``manifest``, and what has changed since ``held`` was written.

    Raises ConfigError if something has, unless ``changes`` are accepted, or nothing that was committed rests on it.
    """
    before = held.get("inputs", {})
    words = changed_inputs(before, found)
    if words and not (changes or has_only_begun(directory)):
        what = "; ".join(f"{key}: {changed}" for key, changed in words.items())
        raise ConfigError(
            f"{directory} would go on with other inputs than it began with: {what}. Put back what was there, or go on "
            f"and have it recorded: ouroboros resume {directory} --accept-changes"
        )
    if words:
        digests = {key: [before[key]["sha256"], found.get(key, {}).get("sha256")] for key in words}
        note = {"step": held.get("committed_step", 0), "inputs": digests}
        manifest["changes"] = [*manifest.get("changes", []), note]
    manifest["inputs"] = found
