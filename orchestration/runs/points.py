"""The points of a sweep as a table for people, from its summary. Light to import."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from policies.common.search_space import FRESH_SEEDS, exact, short


def points_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each point, best first. Empty if the summary is not a sweep's."""
    try:
        points = summary["points"]
        keys = list(dict.fromkeys(key for each in points for key in each["point"]))
        headings = [*(key.rsplit(".", 1)[-1] for key in keys), summary["metric"], "seeds", "not finished"]
        return headings, [_row(each, keys, summary["trials"]) for each in points]
    except (KeyError, TypeError, AttributeError, ValueError):
        return [], []


def _row(point: Mapping[str, Any], keys: list[str], trials: list[Mapping[str, Any]]) -> list[str]:
    values, here = point["values"], exact(point["point"])
    searched = [each for each in trials if exact(each["point"]) == here and each["seed"] < FRESH_SEEDS]
    ends = sorted({f"{each['status'].lower()} at {each['step']}" for each in searched if each["status"] != "FINISHED"})
    value = f"{point['mean']:.4g}" if values else "–"
    low, high = point["low"], point["high"]
    spread = f" [{low:.4g}, {high:.4g}]" if low is not None and isfinite(low) else ""
    return [*(short(point["point"].get(key)) for key in keys), value + spread, str(len(searched)), ", ".join(ends)]
