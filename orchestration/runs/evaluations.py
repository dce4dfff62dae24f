"""The held-out measures that a DDPO run has left, read back. Light to import."""

from pathlib import Path
from typing import Any

from pipelines.storage.atomic import DamagedFiles, read_json


def kept_evaluations(directory: Path, damaged: list[str] | None = None) -> dict[int, dict[str, Any]]:
    """What the evaluations of a run's directory left, by step; nothing before the first. What is damaged is left out,
    and named in ``damaged``."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((directory / "evaluations").glob("step-*.json")):
        try:
            told = read_json(path)
            lists = [told.get(key) for key in ("prompts", "captions", "measure") if told.get(key) is not None]
            numbers = [value for key, value in told.items() if "/" in key or key == "measured_reward"]
            if not all(isinstance(each, list) for each in lists) or not all(
                isinstance(v, float | int) for v in numbers
            ):
                raise DamagedFiles(f"{path} is damaged: it is no evaluation")
            found[int(path.stem.removeprefix("step-"))] = told
        except (DamagedFiles, ValueError) as error:
            damaged = [] if damaged is None else damaged
            damaged.append(str(error))
    return found


def kept_step(kept: dict[int, dict[str, Any]]) -> int:
    """The step whose weights were kept; the last one while none are."""
    return next((step for step, told in kept.items() if told.get("kept")), max(kept))
