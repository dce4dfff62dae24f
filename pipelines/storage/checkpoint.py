"""Commits of a run's state: named arrays and JSON after so many steps; the newest stay, by number or by size.

Tensors are safetensors, the rest is JSON: reading a commit can execute nothing.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.storage.atomic import (
    DamagedFiles,
    check_directory,
    commit_directory,
    pieces_of,
    read_bytes,
    recover,
)
from pipelines.storage.tensor_files import encoded, tensor_file

SCHEMA = 1
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` finished steps: named arrays, and whatever JSON can hold."""

    step: int
    tensors: Mapping[str, np.ndarray]  # read when they are asked for, as long as the commit is there
    state: dict[str, Any]


WeightsKind = Literal["current", "previous", "averaged"]  # of a learner


@dataclass(frozen=True)
class LearnerState:
    """Everything that learning needs to go on as if it had never stopped."""

    tensors: Mapping[str, np.ndarray]
    weights_version: int


def parse_size(text: str) -> float:
    """Bytes of a size such as "20 GB". Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|TB)", text)
    if found is None:
        raise ValueError(f'write a size such as "20 GB", in {", ".join(_UNITS)}')
    return float(found[1]) * _UNITS[found[2]]


class QuotaError(RuntimeError):
    """A commit that is too large for what all commits together may take."""


class CheckpointStore:
    """The commits of one run. ``keep`` of them stay, the newest: so many, or as many as fit in a size ("20 GB").

    ``owners`` are the ids that the run has, and had before it was copied: a commit of another run is refused. Without
    any, or in a commit from before there were ids, nobody asks.
    """

    def __init__(self, directory: Path, keep: int | str = 2, owners: Sequence[str] = ()) -> None:
        self.directory = directory
        self.keep = keep
        self.owners = owners
        self.pinned: int | None = None  # the step of a commit that stays in any case
        self.damaged: list[str] = []
        for left in directory.glob(".step-*.before"):  # of a commit that was being replaced when the process died
            recover(directory / left.name[1:].removesuffix(".before"))

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-[0-9]*[0-9]"))

    def path(self, step: int) -> Path:
        """The directory of a commit."""
        return self.directory / f"step-{step:06d}"

    def commit(self, step: int, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> Path:
        """Write a commit and forget those beyond ``keep``. Raises QuotaError, before anything is written."""
        target, known = self.path(step), json.dumps(state).encode()
        size, content = encoded(tensors)
        if isinstance(self.keep, str):
            self._make_room(size + len(known), self.keep)
        commit_directory(target, {_TENSORS: content, _STATE: known}, self._about(step))
        if isinstance(self.keep, int):
            self._forget(self.steps()[: -self.keep])
        return target

    def _make_room(self, size: int, quota: str) -> None:
        """Forget old commits until one of ``size`` bytes fits in beside the others; the newest stays in any case."""
        if 2 * size > parse_size(quota):
            takes = f"a commit takes {size / 1e9:.3g} GB, and the one before it stays until it is whole"
            raise QuotaError(f"{takes}: checkpoint.keep={quota!r} has to be {2 * size / 1e9:.3g} GB at least")
        steps, taken = self.steps(), size
        if self.pinned in steps:
            steps.remove(self.pinned)
            taken += sum(file.stat().st_size for file in self.path(self.pinned).iterdir())
        for number, step in enumerate(reversed(steps)):
            taken += sum(file.stat().st_size for file in self.path(step).iterdir())
            if number and taken > parse_size(quota):
                return self._forget(steps[:-number])

    def _forget(self, steps: Sequence[int]) -> None:
        for step in steps:
            if step != self.pinned:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def adopt(self, source: Path) -> int:
        """Put a commit of another store in place of what is held of its step and later. Returns its step."""
        manifest = check_directory(source)
        step = int(manifest["step"])
        for later in self.steps():
            if later >= step:
                shutil.rmtree(self.path(later))
        commit_directory(self.path(step), pieces_of(source), self._about(step) | {"schema": manifest["schema"]})
        return step

    def _about(self, step: int) -> dict[str, Any]:
        return {"schema": SCHEMA, "step": step} | ({"run": self.owners[0]} if self.owners else {})

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
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no commit" if step is None else f"no commit of step {step} (there are: {steps})"
            raise FileNotFoundError(f"{self.directory} holds {wanted}")
        step = steps[-1] if step is None else step
        directory = self.path(step)
        manifest = check_directory(directory)
        if manifest.get("schema") != SCHEMA:
            raise DamagedFiles(f"{directory} has schema {manifest.get('schema')}, this program reads {SCHEMA}")
        if manifest.get("step") != step:
            raise DamagedFiles(f"{directory} holds step {manifest.get('step')}: it was renamed or altered")
        if self.owners and manifest.get("run", self.owners[0]) not in self.owners:
            raise DamagedFiles(f"{directory} is a commit of another run (id {manifest['run']})")
        if not {_TENSORS, _STATE} <= manifest["sha256"].keys():
            raise DamagedFiles(f"{directory} holds no state")
        state = json.loads(read_bytes(directory / _STATE))
        return Checkpoint(step, tensor_file(directory / _TENSORS), state)
