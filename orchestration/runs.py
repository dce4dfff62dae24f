"""Run directories read back: what ``ouroboros runs list | show | compare`` prints.

A run directory is one that holds ``manifest.json``. Nothing here trusts what it reads: a half-written, damaged or
foreign directory gives a row with what could be read, never an exception.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from orchestration.config import ConfigError
from orchestration.display import duration
from orchestration.tracking import flatten

_COLOURS = {"RUNNING": "cyan", "FINISHED": "green", "KILLED": "yellow", "FAILED": "red"}
_ABSENT = "–"


@dataclass(frozen=True)
class RunInfo:
    """What a run directory tells; None where it does not (yet)."""

    directory: Path
    name: str
    loop: str | None
    status: str
    created: str | None
    committed_step: int | None
    total_steps: int | None
    reward_before: float | None
    reward_after: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    wall_seconds: float | None
    manifest: dict[str, Any]
    summary: dict[str, Any]


def read_run(directory: Path) -> RunInfo:
    """A run directory; without a summary, results are those of the steps so far."""
    manifest, summary = _json(directory / "manifest.json"), _json(directory / "summary.json")
    steps = _steps(directory / "metrics.jsonl")
    rewards = _values(steps, "reward/mean")
    accuracies = _values(steps, "evaluator/full")
    stamps = _values(steps, "timestamp_ms")
    elapsed = (stamps[-1] - stamps[0]) / 1000 if len(stamps) > 1 else None

    def result(key: str, fallback: float | None) -> float | None:
        return _number(summary.get(key)) if key in summary else fallback

    return RunInfo(
        directory=directory,
        name=str(manifest.get("name") or directory.name),
        loop=_string(manifest.get("loop")),
        status=_string(manifest.get("status")) or "unreadable",
        created=_string(manifest.get("created")),
        committed_step=_integer(manifest.get("committed_step")),
        total_steps=_integer(manifest.get("total_steps")),
        reward_before=result("reward_before", rewards[0] if rewards else None),
        reward_after=result("reward_after", rewards[-1] if rewards else None),
        accuracy_before=result("evaluator_accuracy_before", accuracies[0] if accuracies else None),
        accuracy_after=result("evaluator_accuracy_after", accuracies[-1] if accuracies else None),
        wall_seconds=result("wall_seconds", elapsed),
        manifest=manifest,
        summary=summary,
    )


def list_runs(root: Path) -> list[RunInfo]:
    """The runs under ``root``, newest first; none if it does not exist."""
    try:
        directories = [entry for entry in root.iterdir() if (entry / "manifest.json").is_file()]
    except OSError:
        return []
    runs = [read_run(entry) for entry in directories]
    return sorted(runs, key=lambda run: (run.created or "", run.name), reverse=True)


def find_run(run: str, root: Path) -> RunInfo:
    """The run of a directory, or of a name under ``root``. Raises ConfigError with the nearest names if unknown."""
    for directory in (Path(run), root / run):
        if (directory / "manifest.json").is_file():
            return read_run(directory)
    names = [entry.directory.name for entry in list_runs(root)]
    near = difflib.get_close_matches(Path(run).name, names, n=3, cutoff=0.4) or names[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are no runs under {root}"
    raise ConfigError(f"no run {run!r}, neither a run directory nor a name under {root}: {hint}")


def render_list(runs: Sequence[RunInfo]) -> RenderableType:
    """A table of runs."""
    if not runs:
        return Text("no runs", style="dim")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for heading in ("step", "reward", "held-out", "wall"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.directory.name,
            _status(run.status),
            _progress(run),
            _change(run.reward_before, run.reward_after),
            _change(run.accuracy_before, run.accuracy_after),
            _duration(run.wall_seconds),
        )
    return table


def render_show(name: str, root: Path) -> RenderableType:
    """One run: what it is, what came out, and its configuration. Raises ConfigError if there is none."""
    run = find_run(name, root)
    facts = _pairs()
    rows: list[tuple[str, RenderableType | None]] = [
        ("status", _status(run.status)),
        ("loop", _text(run.loop)),
        ("created", _text(run.created)),
        ("step", _text(_progress(run))),
        ("reward", _text(_change(run.reward_before, run.reward_after))),
        ("held-out accuracy", _text(_change(run.accuracy_before, run.accuracy_after))),
        ("wall time", _text(_duration(run.wall_seconds))),
        ("images", _text(run.summary.get("images"))),
        ("weights SHA-256", _text(run.summary.get("weights_sha256"))),
        ("git commit", _text(run.manifest.get("git_commit"))),
        ("MLflow run", _text(run.manifest.get("mlflow_run_id"))),
        ("directory", _text(run.directory)),
    ]
    for label, value in rows:
        if value is not None:
            facts.add_row(label, value)
    parts: list[RenderableType] = [Panel(facts, title=Text(run.name), title_align="left", border_style="dim")]
    arms = run.summary.get("arms")
    if isinstance(arms, Mapping):
        parts.append(Panel(_arms(arms), title="generation 1 → last", title_align="left", border_style="dim"))
    stages = run.summary.get("seconds_by_stage")
    for title, values in (
        ("seconds by stage", stages),
        ("resolved by the program", run.manifest.get("resolved")),
        ("configuration", run.manifest.get("config")),
    ):
        if isinstance(values, Mapping) and values:
            table = _pairs()
            for key, value in flatten(values).items():
                table.add_row(key, Text(_plain(value)))
            parts.append(Panel(table, title=title, title_align="left", border_style="dim"))
    return Group(*parts)


def _arms(arms: Mapping[str, Any]) -> RenderableType:
    """What became of each arm of a MAD experiment."""
    shown = ("fid", "frechet", "w2_squared", "heterozygosity", "precision", "recall")
    present = [metric for metric in shown if any(metric in arm["metrics"] for arm in arms.values())]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("arm", "goes MAD", *present):
        table.add_column(heading, overflow="fold")
    for name, arm in arms.items():
        means = [arm["metrics"].get(metric, {}).get("mean") for metric in present]
        changes = [_change(_number(mean[0]), _number(mean[-1])) if mean else _ABSENT for mean in means]
        table.add_row(Text(name), (arm["verdict"] or {}).get("goes_mad", _ABSENT), *changes)
    return table


def render_compare(names: Sequence[str], root: Path) -> RenderableType:
    """Runs side by side: their results, then the configuration keys in which they differ.

    Raises ConfigError if one of them does not exist.
    """
    runs = [find_run(name, root) for name in names]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", style="dim", overflow="fold")
    for run in runs:
        table.add_column(run.directory.name, overflow="fold")
    table.add_row("status", *(_status(run.status) for run in runs))
    table.add_row("step", *(_progress(run) for run in runs))
    table.add_row("reward", *(_change(run.reward_before, run.reward_after) for run in runs))
    table.add_row("held-out accuracy", *(_change(run.accuracy_before, run.accuracy_after) for run in runs))
    table.add_row("images", *(_plain(run.summary.get("images")) for run in runs))
    table.add_row("wall time", *(_duration(run.wall_seconds) for run in runs))
    table.add_row("weights", *(_plain(run.summary.get("weights_sha256"))[:12] for run in runs))
    table.add_section()
    differing = differing_keys(runs)
    for key, values in differing.items():
        table.add_row(key, *(Text(_plain(value)) for value in values))
    if differing:
        return table
    return Group(table, Text("\nthe configurations are the same", style="dim"))


def differing_keys(runs: Sequence[RunInfo]) -> dict[str, list[Any]]:
    """Dotted configuration keys in which the runs differ, with each run's value (None: no such key)."""
    configs = [flatten(config) if isinstance(config := run.manifest.get("config"), Mapping) else {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each[1:])}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that can be read; the last one may be half written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def _values(steps: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for step in steps if (value := _number(step.get(key))) is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _status(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, "magenta"))


def _progress(run: RunInfo) -> str:
    if run.committed_step is None:
        return _ABSENT
    return f"{run.committed_step}" if run.total_steps is None else f"{run.committed_step}/{run.total_steps}"


def _change(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return _ABSENT
    first, last = (_ABSENT if value is None else f"{value:.3f}" for value in (before, after))
    return f"{first} → {last}"


def _duration(seconds: float | None) -> str:
    return _ABSENT if seconds is None else duration(seconds)


def _plain(value: Any) -> str:
    """A value as it stands in a configuration file; a dash where there is none."""
    if value is None:
        return _ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _text(value: Any) -> Text | None:
    return None if value is None or value == _ABSENT else Text(str(value), overflow="fold")


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table
