"""Atomic commits of a run's state: everything or nothing.

A commit is a directory ``step-000123`` written aside, flushed to the disk and renamed. Its ``manifest.json`` holds
the SHA-256 of every file, so a truncated or altered commit is detected when it is read. Tensors are safetensors, the
rest is JSON: reading a commit can execute nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class DamagedCheckpoint(RuntimeError):  # noqa: N818
    """A commit whose files do not match its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` finished steps: named arrays, and whatever JSON can hold."""

    step: int
    tensors: dict[str, np.ndarray]
    state: dict[str, Any]


class CheckpointStore:
    """The commits of one run, newest kept."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-[0-9]*[0-9]"))

    def path(self, step: int) -> Path:
        """The directory of a commit."""
        return self.directory / f"step-{step:06d}"

    def commit(self, step: int, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> Path:
        """Write a commit and forget those beyond ``keep``."""
        from safetensors.numpy import save

        target, aside = self.path(step), self.directory / f".step-{step:06d}.partial"
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        files = {
            # Not ascontiguousarray, which gives an array without dimensions one.
            _TENSORS: save({name: np.asarray(array, order="C") for name, array in tensors.items()}),
            _STATE: json.dumps(state).encode(),
        }
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "sha256": {n: hashlib.sha256(b).hexdigest() for n, b in files.items()},
        }
        files[_MANIFEST] = json.dumps(manifest, indent=1).encode()
        for name, content in files.items():
            _write_durably(aside / name, content)
        _flush_directory(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        _flush_directory(self.directory)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def load(self, step: int | None = None) -> Checkpoint:
        """A commit, by default the newest. Raises FileNotFoundError or DamagedCheckpoint."""
        from safetensors.numpy import load

        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no commit" if step is None else f"no commit of step {step} (there are: {steps})"
            raise FileNotFoundError(f"{self.directory} holds {wanted}")
        step = steps[-1] if step is None else step
        directory = self.path(step)
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            schema, manifest_step, hashes = manifest["schema"], manifest["step"], manifest["sha256"]
            contents = {name: (directory / name).read_bytes() for name in (_TENSORS, _STATE)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{directory} cannot be read: {type(error).__name__}: {error}") from error
        if schema != SCHEMA:
            raise DamagedCheckpoint(f"{directory} has schema {schema}, this program reads {SCHEMA}")
        if manifest_step != step:
            raise DamagedCheckpoint(f"{directory} holds step {manifest_step}: it was renamed or altered")
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != hashes.get(name):
                raise DamagedCheckpoint(f"{directory / name} does not match its manifest: it was truncated or altered")
        return Checkpoint(step, load(contents[_TENSORS]), json.loads(contents[_STATE]))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.partial")
    _write_durably(aside, (json.dumps(content, indent=2) + "\n").encode())
    os.replace(aside, path)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
