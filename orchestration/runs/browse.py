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
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from orchestration.runs.config import ConfigError
from orchestration.runs.display import duration
from orchestration.runs.evaluations import kept_evaluations
from orchestration.runs.manifest import has_only_begun, read_manifest, read_summary
from orchestration.runs.run import is_free
from orchestration.runs.tables import ABSENT, change_of, tables
from orchestration.tracking.tracker import flatten
from pipelines.storage.atomic import DamagedFiles, read_lines

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
    try:
        entries = [*root.iterdir()]
    except OSError:
        return []
    runs = [RunInfo(entry) for entry in entries if _is_run(entry)]
    return sorted(runs, key=lambda run: (run.created, run.directory.name), reverse=True)


def _is_run(directory: Path) -> bool:
    """Whether a run, a damaged one or the beginning of one is there."""
    try:
        return os.path.lexists(directory / "manifest.json") or has_only_begun(directory)
    except OSError:  # it may not be looked into
        return False


def find_run(run: str, root: Path) -> RunInfo:
    """The run of a directory, or of a name under ``root``. Raises ConfigError with the nearest names if unknown."""
    places = Path(run), root / run
    for directory in places:
        if _is_run(directory):
            return RunInfo(directory)
    for directory in places:
        if run and directory.exists():
            raise ConfigError(f"{directory} is no run: it holds no manifest.json")
    names = [entry.directory.name for entry in list_runs(root)]
    near = difflib.get_close_matches(Path(run).name, names, n=3, cutoff=0.4) or names[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are no runs under {root}"
    raise ConfigError(f"no run {run!r}, neither a run directory nor a name under {root}: {hint}")


def remove(run: RunInfo) -> None:
    """Remove a run's directory. Raises ConfigError while a process is running it."""
    if not is_free(run.directory):
        raise ConfigError(f"{run.directory} is being run by another process: wait for it or stop it")
    if run.directory.is_symlink():
        raise ConfigError(f"{run.directory} is a link: remove it, or the run that it leads to, by its own name")
    shutil.rmtree(run.directory)


def render_list(runs: Sequence[RunInfo]) -> RenderableType:
    """A table of runs."""
    if not runs:
        return Text("no runs", style="dim")
    table = plain_table(["run", "status"])
    for heading in ("step", "reward", "held-out", "wall"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        texts = _texts(run)
        shown = (texts[label] for label in ("status", "step", "reward", "held-out accuracy", "wall time"))
        table.add_row(Text(run.directory.name), *shown)
    return Group(table, *_warnings(*runs))


def render_show(name: str, root: Path) -> RenderableType:
    """One run: what it is, what came out, and its configuration. Raises ConfigError if there is none."""
    run = find_run(name, root)
    known = {label: text for label, text in _texts(run).items() if str(text) != ABSENT}
    panels: list[tuple[str, Table | Mapping[str, Text]]] = [(run.name, known)]
    panels += [(title, plain_table(*cells)) for title, cells in tables(run.summary).items()]
    for title, values in (
        ("seconds by stage", run.summary.get("seconds_by_stage")),
        ("resolved by the program", run.manifest.get("resolved")),
        ("configuration", run.manifest.get("config")),
    ):
        if values:
            panels.append((title, {key: _plain(value) for key, value in flatten(values).items()}))
    return Group(*(_panel(*panel) for panel in panels), *_warnings(run))


def facts(run: RunInfo) -> dict[str, Any]:
    """A run at a glance, None where it does not say; without a summary, of its held-out measures so far."""
    manifest, summary, measured = run.manifest, run.summary, {} if run.summary else run.evaluations()
    seconds = {**manifest, **summary}.get("wall_seconds")

    def change(result: str, metric: str) -> str | None:
        if f"{result}_before" in summary:
            return change_of(summary[f"{result}_before"], summary.get(f"{result}_after"))
        last = max(measured, default=0)
        return change_of(*(measured.get(step, {}).get(metric) for step in (0, last or -1)))

    total = f"/{manifest['total_steps']}" if manifest.get("total_steps") is not None else ""
    return {
        "loop": run.loop or None,
        "created": run.created[:16].replace("T", " ") or None,
        "step": f"{manifest['committed_step']}{total}" if "committed_step" in manifest else None,
        "reward": change("reward", "evaluation/reward"),
        "held-out accuracy": change("evaluator_accuracy", "evaluator/full"),
        "wall time": None if seconds is None else duration(seconds),
        "images": summary.get("images"),
        "seeds": len(summary.get("seeds") or ()) or summary.get("seed"),
        "weights SHA-256": summary.get("weights_sha256"),
        "git commit": manifest.get("git_commit"),
        "MLflow run": manifest.get("mlflow_run_id"),
        "directory": str(run.directory),
    }


def _texts(run: RunInfo) -> dict[str, Text]:
    """The facts and the status for a terminal, a dash where the run does not say."""
    status = Text(run.status, style=_COLOURS.get(run.status, "magenta"))
    return {"status": status, **{label: _plain(value) for label, value in facts(run).items()}}


def render_compare(names: Sequence[str], root: Path) -> RenderableType:
    """Runs side by side: their results, then the configuration keys in which they differ.

    Raises ConfigError if one of them does not exist.
    """
    runs = [find_run(name, root) for name in names]
    table = plain_table(["", *(run.directory.name for run in runs)])
    table.columns[0].style = "dim"
    texts = [_texts(run) for run in runs]
    for label in ("status", "step", "reward", "held-out accuracy", "images", "wall time"):
        table.add_row(label, *(each[label] for each in texts))
    table.add_row("weights", *(each["weights SHA-256"][:12] for each in texts))
    table.add_section()
    differing = differing_keys(runs)
    for key, values in differing.items():
        table.add_row(Text(key), *map(_plain, values))
    if differing:
        return table
    return Group(table, Text("\nthe configurations are the same", style="dim"))


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


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> Table:
    """A table without lines, whose cells fold where they are too wide."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(escape(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _warnings(*runs: RunInfo) -> list[Text]:
    return [Text(f"warning: {each}", style="yellow") for run in runs for each in run.damaged]


def _panel(title: str, content: Table | Mapping[str, Text]) -> RenderableType:
    """A frame around a table, or around labels and their values."""
    if isinstance(content, Mapping):
        pairs, content = content, Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2))
        for label, value in pairs.items():
            content.add_row(Text(label), value)
    return Panel(content, title=Text(title), title_align="left", border_style="dim", expand=False)
