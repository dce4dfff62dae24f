"""What a run found, as tables for people, from its summary alone: without the experiment's code. Light to import."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from policies.common.search_space import FRESH_SEEDS, exact, short

ABSENT, GENERATIONS = "–", "generation 1 → last"
_METRICS = ("fid", "frechet", "w2_squared", "heterozygosity", "precision", "recall")  # of MAD
Rows = list[list[str]]
Cells = tuple[list[str], Rows]  # headings, and a row for each claim, arm or point


def tables(summary: Mapping[str, Any]) -> dict[str, Cells]:
    """The tables of an experiment by title. What a damaged summary does not hold is left out."""
    found: dict[str, Cells] = {}
    makers: dict[str, Callable[[Mapping[str, Any]], Cells]]
    makers = {GENERATIONS: _generations, "claims": _claims, "means over seeds": _arms, "points, best first": _points}
    for title, make in makers.items():
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            if (cells := make(summary))[1]:
                found[title] = cells
    return found


def claim_lines(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each claim in a line."""
    return [f"{each['outcome']:<9}  {each['sentence']}: {wanted_of(each)}; {_found(each)}" for each in claims]


def wanted_of(claim: Mapping[str, Any]) -> str:
    """What a claim asks for, in symbols."""
    sign = {"absolute": "", "difference": " − ", "ratio": " / "}[claim["kind"]]
    of = f"{claim['metric']} of {claim['arm']}{sign}{claim['control'] or ''}"
    return f"{of} {claim['direction']} {claim['bound']:g}"


def change_of(before: float | None, after: float | None) -> str | None:
    """A number at the beginning and at the end; None if there is neither."""
    ends = [ABSENT if end is None else f"{end:.3f}" for end in (before, after)]
    return None if before is None and after is None else " → ".join(ends)


def _generations(summary: Mapping[str, Any]) -> Cells:
    """What became of each arm of a MAD experiment."""
    if summary.get("claims") is not None:
        return [], []
    arms = summary["arms"]
    present = [metric for metric in _METRICS if any(metric in arm["metrics"] for arm in arms.values())]
    means = {name: [arm["metrics"].get(metric, {}).get("mean") for metric in present] for name, arm in arms.items()}
    return ["arm", "goes MAD", *present], [
        [name, str((arm.get("verdict") or {}).get("goes_mad") or ABSENT)]
        + [change_of(mean[0], mean[-1]) or ABSENT if mean else ABSENT for mean in means[name]]
        for name, arm in arms.items()
    ]


def _claims(summary: Mapping[str, Any]) -> Cells:
    """Every claim, its outcome first."""
    rows = [[c["outcome"], c["sentence"], wanted_of(c), _found(c), str(c["seeds"])] for c in summary["claims"]]
    return ["outcome", "claim", "wanted", "found", "seeds"], rows


def _arms(summary: Mapping[str, Any]) -> Cells:
    """Every arm of a study: the mean of each metric over seeds."""
    of_study = summary["arms"].items() if summary["claims"] is not None else ()
    arms = {arm: about["metrics"] for arm, about in of_study}
    names = list(dict.fromkeys(name for metrics in arms.values() for name in metrics))
    rows = [
        [arm, *(_within(held[name], "mean") if name in held else ABSENT for name in names)]
        for arm, held in arms.items()
    ]
    return ["arm", *names], rows


def _points(summary: Mapping[str, Any]) -> Cells:
    """Every point of a sweep, best first."""
    keys = list(dict.fromkeys(key for each in summary["points"] for key in each["point"]))
    rows = []
    for each in summary["points"]:
        here = exact(each["point"])
        searched = [t for t in summary["trials"] if exact(t["point"]) == here and t["seed"] < FRESH_SEEDS]
        ends = {f"{t['status'].lower()} at {t['step']}" for t in searched if t["status"] != "FINISHED"}
        known = each if each["low"] is not None and isfinite(each["low"]) else {**each, "low": None}
        value = _within(known, "mean", "{:.4g}")
        point = [short(each["point"].get(key)) for key in keys]
        rows.append([*point, value, str(len(searched)), ", ".join(sorted(ends))])
    return [*(key.rsplit(".", 1)[-1] for key in keys), summary["metric"], "seeds", "not finished"], rows


def _found(claim: Mapping[str, Any]) -> str:
    value = None if claim["value"] is None else _within(claim, "value")
    return "; ".join(filter(None, (value, claim["reason"])))


def _within(found: Mapping[str, Any], key: str, form: str = "{:.3g}") -> str:
    """A value with its interval."""
    value, low, high = (found[each] for each in (key, "low", "high"))
    if value is None:
        return ABSENT
    return form.format(value) + ("" if None in (low, high) else f" [{form.format(low)}, {form.format(high)}]")
