"""What a run found, as tables for people, from its summary alone: without the experiment's code. Light to import."""

import contextlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from pipelines.storage.yaml_text import parse_yaml
from policies.common.intervals import FEWEST, scale_of
from policies.common.search_space import FRESH_SEEDS, exact, short

ABSENT, GENERATIONS, POINTS, INTERVAL = "–", "generation 1 → last", "points, best first", "95 % interval"
_METRICS = ("fid", "frechet", "w2_squared", "heterozygosity", "precision", "recall")  # of MAD
Rows = list[list[str]]
Cells = tuple[list[str], Rows]  # headings, and a row for each claim, arm or point


def tables(summary: Mapping[str, Any]) -> dict[str, Cells]:
    """The tables of an experiment by title. What a damaged summary does not hold is left out."""
    found: dict[str, Cells] = {}
    makers: dict[str, Callable[[Mapping[str, Any]], Cells]]
    makers = {GENERATIONS: _generations, "claims": _claims, "means over seeds": _arms, POINTS: _points}
    makers["trials that did not finish"] = _unfinished
    for title, make in makers.items():
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            if (cells := make(summary))[1]:
                found[title] = cells
    return found


def best_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The best point of a sweep, and the command that runs it: by label. Empty for what is no sweep.

    The command is put together here with every word quoted: a summary may be a stranger's.
    """
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        best, metric = summary["best"], summary["metric"]
        if best is None:
            return {"best point": "none yet: no point has finished all of its seeds"}
        found = {"best point": point_of(best["point"]), metric: f"{best['mean']:.4g}"}
        found |= {INTERVAL: _interval_of(metric, best), "best trial": best["trial"]}
        if best["settings"] is None:
            return found | {"command": "none: its members changed their settings as they went; resume the trial itself"}
        assignments = [f"{key}={_as_yaml(value)}" for key, value in best["settings"].items()]
        words = ["ouroboros", summary["loop"], "--config", summary["config"], *assignments]
        return found | {"command": shlex.join(words)}
    return {}


def point_of(point: Mapping[str, Any]) -> str:
    """A point in a line."""
    names = _names(point)
    return ", ".join(f"{names[key]}={short(value)}" for key, value in point.items()) or "the unchanged configuration"


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


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers at the end of a run of arms, by arm if there are several, or of a sweep's best point, by metric; none
    of what is not as a run writes it."""
    found: dict[str, Any] = {}
    arms = summary.get("arms") or {}
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        for arm, content in arms.items():
            for metric, held in content["metrics"].items():
                mean = held["mean"][-1] if isinstance(held["mean"], list) else held["mean"]
                found[metric if len(arms) == 1 else f"{arm}: {metric}"] = mean
        if "points" in summary:
            found[f"best {summary['metric']}"] = summary["best"]["mean"]
    return {label: value for label, value in found.items() if isinstance(value, int | float)}


def _points(summary: Mapping[str, Any]) -> Cells:
    """Every point of a sweep, best first; only those have a rank whose seeds have all finished."""
    metric, rows = summary["metric"], []
    names = _names(dict.fromkeys(key for each in summary["points"] for key in each["point"]))
    for rank, each in enumerate(summary["points"], start=1):
        here = exact(each["point"])
        searched = [t for t in summary["trials"] if exact(t["point"]) == here and t["seed"] < FRESH_SEEDS]
        ends = {f"{t['status'].lower()} at {t['step']}" for t in searched if t["status"] != "FINISHED"}
        point = [short(each["point"].get(key)) for key in names]
        value = ABSENT if each["mean"] is None else f"{each['mean']:.4g}"
        seeds, place = str(len(searched)), str(rank) if each["complete"] else ABSENT
        rows.append([place, *point, value, _interval_of(metric, each), seeds, ", ".join(sorted(ends))])
    return ["rank", *names.values(), metric, INTERVAL, "seeds", "not finished"], rows


def _unfinished(summary: Mapping[str, Any]) -> Cells:
    """Trials of a sweep that have come to no end of their own: where each is, and why."""
    rows = []
    for each in [trial for trial in summary["trials"] if trial["status"] != "FINISHED"]:
        value = ABSENT if each["value"] is None else short(each["value"])
        ended = [each["status"].lower(), str(each["step"]), value, each["error"] or ""]
        rows.append([point_of(each["point"]), str(each["seed"]), *ended])
    return ["point", "seed", "status", "step", f"{summary['metric']} there", "error"], rows


def _interval_of(metric: str, point: Mapping[str, Any]) -> str:
    """The 95 % interval of a point's mean; why there is none, where there is none."""
    low, high, seeds, fewest = point["low"], point["high"], len(point["values"]), FEWEST.get(scale_of(metric), 2)
    if low is not None and high is not None and isfinite(low):
        return f"[{low:.4g}, {high:.4g}]"
    if not seeds:
        return ABSENT
    few = "one seed" if seeds == 1 else f"{seeds} of the {fewest} seeds it takes"
    return f"none: {few if seeds < fewest else 'seeds alike, or too far apart'}"


def _names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys by the shortest of their endings that is no other's."""
    ends = {key: [key.split(".", cut)[-1] for cut in range(key.count("."), -1, -1)] for key in keys}
    taken = [end for of_key in ends.values() for end in of_key]
    return {key: next((end for end in of_key if taken.count(end) == 1), key) for key, of_key in ends.items()}


def _as_yaml(value: Any) -> str:
    """A value as it stands in an override, so that it is read as what it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            if parse_yaml(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False)


def _found(claim: Mapping[str, Any]) -> str:
    value = None if claim["value"] is None else _within(claim, "value")
    return "; ".join(filter(None, (value, claim["reason"])))


def _within(found: Mapping[str, Any], key: str) -> str:
    """A value with its interval."""
    value, low, high = (found[each] for each in (key, "low", "high"))
    if value is None:
        return ABSENT
    return f"{value:.3g}" + ("" if None in (low, high) else f" [{low:.3g}, {high:.3g}]")
