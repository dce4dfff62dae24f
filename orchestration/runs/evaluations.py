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
            content = read_json(path)
            lists = [content.get(key) for key in ("prompts", "captions", "measure") if content.get(key) is not None]
            numbers = [value for key, value in content.items() if "/" in key or key == "measured_reward"]
            are_numbers = all(isinstance(each, float | int) and not abs(each) >= 1e300 for each in numbers)
            if not (are_numbers and all(isinstance(each, list) for each in lists)):
                raise DamagedFiles(f"{path} is damaged: it is no evaluation")
            found[int(path.stem.removeprefix("step-"))] = content
        except (DamagedFiles, ValueError) as error:
            damaged = [] if damaged is None else damaged
            damaged.append(str(error))
    return found


def kept_step(kept: dict[int, dict[str, Any]]) -> int:
    """The step whose weights were kept; the last one while none are."""
    return next((step for step, content in kept.items() if content.get("kept")), max(kept))
