"""Content-addressed tasks: work named by the hash of all it depends on, done once and stored once.

Resume, shared prefixes of arms, and parallel arms × seeds follow from the name alone and need no code of their own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.storage.atomic import DamagedFiles, Files, commit_directory, read_directory, read_manifest

SCHEMA = 4  # part of every key: raised when a task comes to mean something else


@dataclass(frozen=True, eq=False)
class Task:
    """Work of one kind on the results of other tasks.

    ``label``, for people, ``kept``, whether its files stay once every task that reads them is done, and ``divisible``,
    whether several workers can share its training (:mod:`pipelines.sharing`), are not part of the key.
    """

    kind: str
    parameters: Mapping[str, Any]
    inputs: tuple["Task", ...] = ()
    label: str = ""
    kept: bool = True
    divisible: bool = False
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _key(self.kind, self.parameters, [task.key for task in self.inputs]))


def _key(kind: str, parameters: Mapping[str, Any], inputs: Sequence[str]) -> str:
    content = _plain([SCHEMA, kind, parameters, inputs])
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(content: Any) -> Any:
    """Equal content in one form: JSON writes 1, 1.0 and -0.0 apart, but the keys 1 and "1" alike. Raises TypeError."""
    if isinstance(content, Mapping):
        if not all(isinstance(key, str) for key in content):
            raise TypeError(f"the names of a task's parameters are text, unlike one of {list(content)}")
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content


def in_order(tasks: Iterable[Task]) -> Iterator[Task]:
    """Every task and all it depends on, each key once and after its inputs."""
    seen: set[str] = set()
    stack = list(tasks)[::-1]
    while stack:
        task = stack[-1]
        waiting = [each for each in task.inputs if each.key not in seen]
        if task.key in seen or not waiting:
            stack.pop()
            if task.key not in seen:
                seen.add(task.key)
                yield task
        else:
            stack += waiting[::-1]


class TaskStore:
    """Results by key, each committed whole: ``directory/<key>/``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return (self.directory / key / "manifest.json").exists()

    def path(self, key: str) -> Path:
        """Where a result is."""
        return self.directory / key

    def commit(self, task: Task, files: Files, about: Mapping[str, Any]) -> None:
        """Store a result, with what made it."""
        made_by = {"kind": task.kind, "parameters": task.parameters, "inputs": [each.key for each in task.inputs]}
        commit_directory(self.path(task.key), files, {**made_by, **about})

    def load(self, key: str) -> Files:
        """The files of a result. Raises DamagedFiles."""
        return read_directory(self.path(key))[0]

    def about(self, key: str) -> dict[str, Any]:
        """What made a result, when and in how many seconds. Raises DamagedFiles."""
        about = read_manifest(self.path(key))
        if key != _key(about.get("kind", ""), about.get("parameters", {}), about.get("inputs", [])):
            raise DamagedFiles(f"{self.path(key)} holds the result of another task: it was renamed or altered")
        return about

    def forget(self, key: str) -> None:
        """Delete a result's files. What made it stays known, so it counts as done until someone needs the files."""
        about = self.about(key)
        commit_directory(self.path(key), {}, {**about, "forgotten": True})

    def to_do(self, order: Sequence[Task]) -> set[str]:
        """Keys, of tasks in dependency order, that have to be done: what is not stored whole, and what was forgotten
        but is read by one that has to be done."""
        missing: set[str] = set()
        read: set[str] = set()
        for task in reversed(order):
            state = self._state(task.key)
            if state == "missing" or (state == "forgotten" and task.key in read):
                missing.add(task.key)
                read.update(each.key for each in task.inputs)
        return missing

    def _state(self, key: str) -> Literal["stored", "forgotten", "missing"]:
        try:
            self.load(key)  # damaged files are missing files: they are made again
            return "forgotten" if self.about(key).get("forgotten") else "stored"
        except DamagedFiles:
            return "missing"
