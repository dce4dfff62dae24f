"""TRL's DDPOTrainer beside this project: its own environment, and a process of it that does as it is told."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

PACKAGES = (
    "torch==2.13.0",
    "trl==0.23.1",
    "diffusers==0.35.2",
    "transformers==4.57.6",
    "accelerate==1.10.1",
    "peft==0.17.1",
    "datasets==4.1.1",
)
Scores = Callable[[np.ndarray, list[str]], Sequence[float]]


def environment(directory: Path) -> Path:
    """The Python of a virtual environment with TRL, which is made if it is not there."""
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        print(f"installing {', '.join(PACKAGES)} into {directory}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.touch()
    return python


class Trl:
    """A process that trains with TRL, one thread. ``scores`` answers its questions for rewards."""

    def __init__(self, python: Path, given: dict[str, Any], log: Path, scores: Scores | None = None) -> None:
        self._scores, self._pixels = scores, log.with_suffix(".npy")
        if scores is not None:
            given = {**given, "rewards": str(self._pixels)}
        worker = Path(__file__).with_name("trl_worker.py")
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(python), str(worker), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **{
                    name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH") if name in os.environ
                },
                **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
            },
        )
        self.parameters = self._answer()["parameters"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()
        self._pixels.unlink(missing_ok=True)

    def epoch(self) -> dict[str, float]:
        """Train for an epoch. CPU and wall seconds by stage."""
        return self._ask({})

    def save(self, directory: Path) -> None:
        """Write what it has learned as a diffusers directory."""
        self._ask({"save": str(directory)})

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self._tell(order)
        while "score" in (answer := self._answer()):
            assert self._scores is not None
            self._tell([float(each) for each in self._scores(np.load(self._pixels), answer["score"])])
        return answer

    def _tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL ended: see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer
