"""What a study found for people, from its summary alone: no code of the study is needed. Light to import."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEADINGS = ["outcome", "claim", "wanted", "found", "seeds"]
_NOTHING = {"mean": None, "low": None, "high": None}


def claims_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each claim, its outcome first. Empty if the summary is not a study's."""
    claims = summary.get("claims") or []
    return _HEADINGS, [[c["outcome"], c["sentence"], wanted_of(c), _found(c), str(c["seeds"])] for c in claims]


def arms_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each arm: the mean of every metric over seeds. Empty if the summary is not a study's."""
    if summary.get("claims") is None:
        return [], []
    try:
        metrics = {arm: about["metrics"] for arm, about in summary["arms"].items()}
        names = list(dict.fromkeys(name for held in metrics.values() for name in held))
        cells = {
            arm: [_within(held[name], "mean") if name in held else "–" for name in names]
            for arm, held in metrics.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):  # somebody else's
        return [], []
    return ["arm", *names], [[arm, *row] for arm, row in cells.items()]


def claim_lines(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each claim in a line."""
    return [f"{each['outcome']:<9}  {each['sentence']}: {wanted_of(each)}; {_found(each)}" for each in claims]


def wanted_of(claim: Mapping[str, Any]) -> str:
    """What a claim asks for, in symbols."""
    sign = {"absolute": "", "difference": " − ", "ratio": " / "}[claim["kind"]]
    of = f"{claim['metric']} of {claim['arm']}{sign}{claim['control'] or ''}"
    return f"{of} {claim['direction']} {claim['bound']:g}"


def _found(claim: Mapping[str, Any]) -> str:
    said = [] if claim["value"] is None else [_within(claim, "value")]
    return "; ".join([*said, *([claim["reason"]] if claim["reason"] else [])])


def _within(found: Mapping[str, Any], key: str) -> str:
    value, low, high = (found[each] for each in (key, "low", "high"))
    if value is None:
        return "–"
    return f"{value:.3g}" + ("" if low is None or high is None else f" [{low:.3g}, {high:.3g}]")
