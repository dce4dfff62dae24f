"""Commits of a run's state: named arrays and JSON after so many steps; the newest stay.

Tensors are safetensors, the rest is JSON: reading a commit can execute nothing.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.atomic import DamagedFiles, commit_directory, read_directory

SCHEMA = 1
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` finished steps: named arrays, and whatever JSON can hold."""

    step: int
    tensors: dict[str, np.ndarray]
    state: dict[str, Any]


WeightsKind = Literal["current", "previous", "averaged"]  # of a learner


@dataclass(frozen=True)
class LearnerState:
    """Everything that learning needs to go on as if it had never stopped."""

    tensors: dict[str, np.ndarray]
    weights_version: int


class CheckpointStore:
    """The commits of one run. The newest ``keep`` of them stay."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep
        self.pinned: int | None = None  # the step of a commit that stays in any case
        self.damaged: list[str] = []

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-[0-9]*[0-9]"))

    def path(self, step: int) -> Path:
        """The directory of a commit."""
        return self.directory / f"step-{step:06d}"

    def commit(self, step: int, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> Path:
        """Write a commit and forget those beyond ``keep``."""
        from safetensors.numpy import save

        target = self.path(step)
        files = {
            # Not ascontiguousarray, which gives an array without dimensions one.
            _TENSORS: save({name: np.asarray(array, order="C") for name, array in tensors.items()}),
            _STATE: json.dumps(state).encode(),
        }
        commit_directory(target, files, {"schema": SCHEMA, "step": step})
        for old in self.steps()[: -self.keep]:
            if old != self.pinned:
                shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def adopt(self, source: Path) -> int:
        """Put a commit of another store in place of what is held of its step and later. Returns its step."""
        contents, manifest = read_directory(source)
        step = int(manifest["step"])
        for later in self.steps():
            if later >= step:
                shutil.rmtree(self.path(later))
        commit_directory(self.path(step), contents, {"schema": manifest["schema"], "step": step})
        return step

    def newest(self) -> Checkpoint | None:
        """The newest commit that is whole, None if nothing was committed. What is wrong with newer ones: ``damaged``.

        Raises DamagedFiles if none is whole.
        """
        self.damaged = []
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except DamagedFiles as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise DamagedFiles("; ".join(self.damaged))
        return None

    def load(self, step: int | None = None) -> Checkpoint:
        """A commit, by default the newest. Raises FileNotFoundError or DamagedFiles."""
        from safetensors.numpy import load

        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no commit" if step is None else f"no commit of step {step} (there are: {steps})"
            raise FileNotFoundError(f"{self.directory} holds {wanted}")
        step = steps[-1] if step is None else step
        directory = self.path(step)
        contents, manifest = read_directory(directory)
        if manifest.get("schema") != SCHEMA:
            raise DamagedFiles(f"{directory} has schema {manifest.get('schema')}, this program reads {SCHEMA}")
        if manifest.get("step") != step:
            raise DamagedFiles(f"{directory} holds step {manifest.get('step')}: it was renamed or altered")
        if not {_TENSORS, _STATE} <= contents.keys():
            raise DamagedFiles(f"{directory} holds no state")
        return Checkpoint(step, load(contents[_TENSORS]), json.loads(contents[_STATE]))
