"""Run directories read back: what ``ouroboros runs list | show | compare`` prints.

A run directory is one that holds ``manifest.json``. Nothing here trusts what it reads: a half-written, damaged or
foreign directory gives a row with what could be read, and what could not is named, never an exception.
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from orchestration.runs.config import ConfigError
from orchestration.runs.display import duration, plain_table
from orchestration.runs.evaluations import kept_evaluations
from orchestration.runs.manifest import has_only_begun, read_manifest, read_summary
from orchestration.runs.run import is_free
from orchestration.runs.tables import ABSENT, best_of, change_of, results, tables
from orchestration.tracking.tracker import flatten
from pipelines.storage.atomic import DamagedFiles, read_lines

_CANDIDATES = 10  # that are named of those which begin as asked for
_COLOURS = {"RUNNING": "cyan", "FINISHED": "green", "KILLED": "yellow", "FAILED": "red"}


class RunInfo:
    """What a run directory holds: its manifest and its summary, empty where there is none (yet), and what is damaged in
    them. Nothing is read that a link leads to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damaged: list[str] = []
        self.manifest = self._read("manifest.json", read_manifest)
        self.summary = self._read("summary.json", read_summary)
        self.name = self.manifest.get("name") or directory.name
        self.loop, self.created = (self.manifest.get(key) or "" for key in ("loop", "created"))
        begins = not self.damaged and has_only_begun(directory)
        self.status = self.manifest.get("status") or ("not begun" if begins else "unreadable")
        if self.status == "RUNNING" and os.access(directory / ".lock", os.W_OK) and is_free(directory):
            self.status = "KILLED"  # its process could not say so

    def _read(self, name: str, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The object that a file holds; an empty one if it is damaged or not there."""
        if not os.path.lexists(self.directory / name):
            return {}
        try:
            if (self.directory / name).is_symlink():
                raise DamagedFiles(f"{self.directory / name} is a link")
            return read(self.directory)
        except (ConfigError, DamagedFiles) as error:
            self.damaged.append(str(error))
            return {}

    def steps(self) -> list[dict[str, Any]]:
        """The journal of a DDPO run."""
        path = self.directory / "metrics.jsonl"
        return [] if path.is_symlink() else read_lines(path, ["step"], self.damaged)

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The held-out measures of a DDPO run by step, that of the base model first."""
        place = self.directory / "evaluations"
        is_linked = place.is_symlink() or any(path.is_symlink() for path in place.glob("step-*"))
        return {} if is_linked else kept_evaluations(self.directory, self.damaged)


def list_runs(root: Path) -> list[RunInfo]:
    """The runs under ``root``, newest first; none if it does not exist."""
    runs = (RunInfo(root / name) for name in run_names(root))
    return sorted(runs, key=lambda run: (run.created, run.directory.name), reverse=True)


def run_names(root: Path) -> list[str]:
    """The names of the runs under ``root``, of which nothing is read."""
    try:
        return sorted(entry.name for entry in root.iterdir() if _is_run(entry))
    except OSError:
        return []


def _is_run(directory: Path) -> bool:
    """Whether a run, a damaged one or the beginning of one is there."""
    try:
        return os.path.lexists(directory / "manifest.json") or has_only_begun(directory)
    except OSError:  # it may not be looked into
        return False


def find_run(run: str, root: Path, whole: bool = False) -> RunInfo:
    """The run of a directory, or of a name under ``root``, or, unless it has to be ``whole``, of the beginning of one
    name there. Raises ConfigError with the candidates if there are several, with the nearest names if there is none."""
    places = Path(run).expanduser(), root / run
    for directory in places:
        if _is_run(directory):
            return RunInfo(directory)
    for directory in places:
        if run and directory.exists():
            raise ConfigError(f"{directory} is no run: it holds no manifest.json")
    names = run_names(root)
    begun = [name for name in names if run and name.startswith(run)]
    if len(begun) == 1 and not whole:
        return RunInfo(root / begun[0])
    if len(begun) > 1:
        listed = ", ".join(begun[:_CANDIDATES]) + (", …" if len(begun) > _CANDIDATES else "")
        raise ConfigError(f"{run!r} is the beginning of {len(begun)} names under {root}: {listed}")
    near = begun or difflib.get_close_matches(Path(run).name, names, n=3, cutoff=0.4) or names[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are no runs under {root}"
    raise ConfigError(f"no run {run!r}, neither a run directory nor a name under {root}: {hint}")


def remove(run: RunInfo) -> None:
    """Remove a run's directory. Raises ConfigError while a process is running it."""
    if not is_free(run.directory):
        raise ConfigError(f"{run.directory} is being run by another process: wait for it or stop it")
    if run.directory.is_symlink():
        raise ConfigError(f"{run.directory} is a link: remove it, or the run that it leads to, by its own name")
    shutil.rmtree(run.directory)


def facts(run: RunInfo) -> dict[str, Any]:
    """A run at a glance, None where it does not say; without a summary, of its held-out measures so far."""
    manifest, summary, measured = run.manifest, run.summary, {} if run.summary else run.evaluations()
    last = max(measured, default=0) or -1
    seed = summary.get("seed")
    found: dict[str, Any] = {
        "run": run.directory.name,
        "name": run.name,
        "status": run.status,
        "loop": run.loop or None,
        "created": run.created or None,
        "step": manifest.get("committed_step"),
        "total_steps": manifest.get("total_steps"),
        "seeds": summary.get("seeds") or ([] if seed is None else [seed]),
        "images": summary.get("images"),
        "wall_seconds": {**manifest, **summary}.get("wall_seconds"),
    }
    for result, metric in (("reward", "evaluation/reward"), ("evaluator_accuracy", "evaluator/full")):
        for end, step in (("before", 0), ("after", last)):
            found[f"{result}_{end}"] = summary.get(f"{result}_{end}", measured.get(step, {}).get(metric))
    found["results"] = results(summary)
    origin = {"git_commit": manifest.get("git_commit"), "mlflow_run_id": manifest.get("mlflow_run_id")}
    origin |= {"weights_sha256": summary.get("weights_sha256"), "directory": str(run.directory)}
    return {**found, **origin, "damaged": run.damaged}


def glance(known: Mapping[str, Any]) -> dict[str, str | None]:
    """Facts as people read them, by label."""
    seeds, seconds, total = known["seeds"], known["wall_seconds"], known["total_steps"]
    of = "" if total is None else f"/{total}"
    found = {
        "loop": known["loop"],
        "created": (known["created"] or "")[:16].replace("T", " ") or None,
        "step": None if known["step"] is None else f"{known['step']}{of}",
        "reward": change_of(known["reward_before"], known["reward_after"]),
        "held-out accuracy": change_of(known["evaluator_accuracy_before"], known["evaluator_accuracy_after"]),
        "wall time": None if seconds is None else duration(seconds),
        "images": known["images"],
        "seeds" if len(seeds) > 1 else "seed": (len(seeds) if len(seeds) > 1 else seeds[0]) if seeds else None,
        "weights SHA-256": known["weights_sha256"],
        "git commit": known["git_commit"],
        "MLflow run": known["mlflow_run_id"],
        "directory": known["directory"],
    }
    return {label: None if value is None else str(value) for label, value in found.items()}


def everything(run: RunInfo) -> dict[str, Any]:
    """All that ``runs show`` has of a run."""
    found = {**facts(run), "best": best_of(run.summary), "summary": run.summary}
    return found | {key: run.manifest.get(key) for key in ("resolved", "config")}


def compared(runs: Sequence[RunInfo]) -> dict[str, Any]:
    """Runs side by side: the facts of each, and the configuration keys in which they differ."""
    return {"runs": [facts(run) for run in runs], "differing": differing_keys(runs)}


def render_list(runs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table of the facts of runs."""
    labels = {"step": "step", "reward": "reward", "held-out": "held-out accuracy", "wall": "wall time"}
    labels |= {"result": "result"} if any(known["results"] for known in runs) else {}
    rows = []
    for known in runs:
        first = next((f"{label} {value:.4g}" for label, value in known["results"].items()), None)
        texts = {**glance(known), "result": first}
        rows.append([known["run"], _status(known), *(_plain(texts[of]) for of in labels.values())])
    return Group(plain_table(["run", "status", *labels], rows, numbers=[*labels]), *_warnings(*runs))


def render_show(known: Mapping[str, Any]) -> RenderableType:
    """One run: what it is, what came out, and its configuration."""
    texts = {"status": _status(known)} | {label: Text(text) for label, text in glance(known).items() if text}
    texts |= {label: Text(text) for label, text in known["best"].items()}
    panels: list[tuple[str, Table | Mapping[str, Text]]] = [(known["name"], texts)]
    panels += [(title, plain_table(*cells)) for title, cells in tables(known["summary"]).items()]
    for title, values in (
        ("seconds by stage", known["summary"].get("seconds_by_stage")),
        ("resolved by the program", known["resolved"]),
        ("configuration", known["config"]),
    ):
        if values:
            panels.append((title, {key: _plain(value) for key, value in flatten(values).items()}))
    return Group(*(_panel(*panel) for panel in panels), *_warnings(known))


def render_compare(known: Mapping[str, Any]) -> RenderableType:
    """Runs side by side: their results, then the configuration keys in which they differ."""
    runs = known["runs"]
    table = plain_table(["", *(each["run"] for each in runs)], [["status", *map(_status, runs)]])
    table.columns[0].style = "dim"
    texts = [glance(each) for each in runs]
    rows = {
        label: [each[label] for each in texts]
        for label in ("step", "reward", "held-out accuracy", "images", "wall time")
    }
    rows["weights"] = [each["weights SHA-256"] and each["weights SHA-256"][:12] for each in texts]
    for label in dict.fromkeys(label for each in runs for label in each["results"]):
        numbers = [each["results"].get(label) for each in runs]
        rows[label] = [None if number is None else f"{number:.4g}" for number in numbers]
    for label, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(Text(label), *map(_plain, values))
    table.add_section()
    for key, values in known["differing"].items():
        table.add_row(Text(key), *map(_plain, values))
    same = [] if known["differing"] else [Text("\nthe configurations are the same", style="dim")]
    return Group(table, *same, *_warnings(*runs))


def differing_keys(runs: Sequence[RunInfo]) -> dict[str, list[Any]]:
    """Dotted configuration keys in which the runs differ, with each run's value (None: no such key)."""
    configs = [flatten(config) if isinstance(config := run.manifest.get("config"), Mapping) else {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each[1:])}


def _plain(value: Any) -> Text:
    """A value as it stands in a configuration file; a dash where there is none."""
    if value is None:
        return Text(ABSENT)
    return Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _status(known: Mapping[str, Any]) -> Text:
    return Text(known["status"], style=_COLOURS.get(known["status"], "magenta"))


def _warnings(*runs: Mapping[str, Any]) -> list[Text]:
    return [Text(f"warning: {each}", style="yellow") for known in runs for each in known["damaged"]]


def _panel(title: str, content: Table | Mapping[str, Text]) -> RenderableType:
    """A frame around a table, or around labels and their values."""
    if isinstance(content, Mapping):
        pairs, content = content, Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2))
        for label, value in pairs.items():
            content.add_row(Text(label), value)
    return Panel(content, title=Text(title), title_align="left", border_style="dim", expand=False)
