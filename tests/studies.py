"""A study in one file, of a toy: shrinking numbers, numpy only."""

import io
import time
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import Task
from pipelines.studies import metrics, task
from policies.common.claims import Claim


class Shrink(Study):
    """Does shrinking make numbers smaller? The control shrinks by nothing."""

    study: str = "tests.studies:Shrink"
    name: str = "shrink"
    arms: tuple[str, ...] = ("shrunk", "untouched")
    factor: float = Field(0.5, gt=0, le=1, description="what the numbers are multiplied by")
    seconds: float = Field(0.0, ge=0, description="how long measuring takes")

    def preflight(self) -> None:
        """Shrinking by nothing is the control."""
        if self.factor == 1:
            raise ValueError("factor is 1, which is what the control does: give less")

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """Draw numbers, which the arms have in common, shrink them, measure them."""
        drawn = task(draw, {"seed": seed, "count": 100}, label=f"numbers of seed {seed}")
        changed = task(shrink, {"factor": self.factor if arm == "shrunk" else 1.0}, drawn)
        return [changed, task(measure, {"seconds": self.seconds}, changed, label=f"{arm}, seed {seed}")]

    def claims(self) -> Sequence[Claim]:
        """One that is kept, one that is missed."""
        return [
            Claim(
                "shrinking makes numbers smaller", "size", "shrunk", "at most", 0.75, control="untouched", kind="ratio"
            ),
            Claim("shrunk numbers are next to nothing", "size", "shrunk", "at most", 0.01, scale="logarithm"),
        ]


def draw(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Random numbers (count,)."""
    return {"numbers": np.random.default_rng(parameters["seed"]).random(parameters["count"]).tobytes()}


def shrink(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """The numbers times the factor, which are the product."""
    return {"product/numbers": (np.frombuffer(inputs[0]["numbers"]) * parameters["factor"]).tobytes()}


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Their mean size, and how they look."""
    time.sleep(parameters["seconds"])
    numbers = np.frombuffer(inputs[0]["product/numbers"])
    Image.fromarray((255 * numbers.reshape(10, 10)).astype(np.uint8)).save(png := io.BytesIO(), "PNG")
    frames = [Image.fromarray(np.full((10, 10), level, np.uint8)) for level in (0, 255)]
    frames[0].save(gif := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    with wave.open(wav := io.BytesIO(), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes((1000 * numbers).astype("<i2").tobytes())
    files = {"images/numbers.png": png.getvalue(), "figures/numbers.png": png.getvalue()}
    files |= {"figures/levels.gif": gif.getvalue(), "sounds/numbers.wav": wav.getvalue()}
    return metrics({"size": float(numbers.mean()), "sorted": np.sort(numbers)[::20].tolist()}) | files
