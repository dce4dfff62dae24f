"""One page of a run for people: ``report.html``, made from what the run's directory holds, finished or not.

The page needs nothing but itself: its pictures are part of it, it runs no script and asks no network, and its content
policy forbids both. Names of arms, prompts and errors are a stranger's text, and all of it is escaped.
"""

import base64
import contextlib
import io
import textwrap
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from orchestration.runs.browse import RunInfo, facts, glance
from orchestration.runs.config import ConfigError
from orchestration.runs.evaluations import kept_evaluations, kept_step
from orchestration.runs.run import TEMPLATES, Run, is_free
from orchestration.runs.tables import GENERATIONS, best_of, tables
from orchestration.tracking.tracker import flatten
from pipelines.pages import fill
from pipelines.storage.atomic import DamagedFiles, read_bytes, replace_durably
from pipelines.storage.names import file_name
from pipelines.storage.yaml_text import parse_yaml

_LARGEST = 2400  # pixels; a picture that is wider or higher is reduced
_LONGEST = 60  # seconds of a sound
_MOST_BARS = 400  # of a timeline; of a longer run, every second or third step and so on
_LETTERS = 66  # of a line on MLflow's page of a run
_GLANCE = "glance"  # what the names of pictures for MLflow's page of a run begin with
_STAGES = ("sample", "reward", "learn", "publish", "evaluate", "commit", "fit", "measure")  # from the bottom up


def write_report(directory: Path, status: str | None = None) -> Path:
    """Write ``report.html`` into a run's directory and return its path. Title and captions are the experiment's own, of
    ``LOOP_report.yaml`` among the templates.

    Without ``status`` it is the manifest's; a run that says it is running, but that no process runs, was killed.
    """
    run = RunInfo(directory)
    own = TEMPLATES / f"{run.loop}_report.yaml"
    try:
        timeline = _timeline(run)
        content = fill(
            TEMPLATES / "report.html",
            run=run,
            own=parse_yaml(own.read_text("utf-8")) if str(run.loop).isidentifier() and own.exists() else {},
            names={file_name(arm): arm for arm in run.summary.get("arms") or ()},
            status=status or ("KILLED" if run.status == "RUNNING" and is_free(directory) else run.status),
            facts=glance(facts(run)),
            best=best_of(run.summary),
            tables={title: cells for title, cells in tables(run.summary).items() if title != GENERATIONS},
            measured=_measured(run),
            pictures=dict(_pictures(directory / "figures")),
            sounds=dict(_sounds(directory / "sounds")),
            timeline=timeline,
            highest=max((sum(spent.values()) for _, spent in timeline), default=0),
            settings={group: flatten(run.manifest.get(group) or {}) for group in ("config", "resolved", "packages")},
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{directory / 'summary.json'} is not what a report is made from: {error}") from error
    replace_durably(path := directory / "report.html", content.encode(errors="replace"))
    return path


def conclude(run: Run, path: Path, found: str, *artifacts: Path, **values: Any) -> Path:
    """Hand MLflow figures and sounds, the summary at ``path``, the report and other ``artifacts`` of a run that is
    done, note what it ``found``, in a line if not yet noted, and say it all by the template of its loop. Returns
    ``path``."""
    figures = run.directory / "figures"
    for each in (figures, run.directory / "sounds", *artifacts, path, write_report(run.directory, "FINISHED")):
        if each.exists():  # a sweep's trials draw no figures, and few studies can be heard
            run.tracker.artifact(each)
    if found:
        write_note(run, found)
    text = fill(TEMPLATES / f"{run.manifest['loop']}_result.txt", run=run, figures=figures, **values)
    for line in text.splitlines():
        run.display.say(line)
    return path


def write_note(run: Run, found: str) -> None:
    """Have MLflow's page of a run open on what was ``found``, in a line, and on pictures: all of it within the 100
    pixels of a description that MLflow shows before a click."""
    pictures = sorted(path.name for path in (run.directory / "figures").glob(f"{_GLANCE}*.png"))
    run.write_note(
        fill(TEMPLATES / "note.md", run=run, found=textwrap.shorten(found, _LETTERS), pictures=pictures).strip()
    )


def _measured(run: RunInfo) -> list[dict[str, Any]]:
    """What the held-out measure said before the run and last, with the ``step`` after which; fewer if not yet."""
    kept = kept_evaluations(run.directory, run.damaged)
    return [{**kept[step], "step": step} for step in (dict.fromkeys([min(kept), kept_step(kept)]) if kept else ())]


def _pictures(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures by name, what moves by its file's. A damaged one is left out."""
    from PIL import Image

    broken = OSError, DamagedFiles, ValueError, SyntaxError, Image.DecompressionBombError
    found = [path for path in directory.glob("*") if path.suffix in (".png", ".gif")]
    for path in sorted(path for path in found if not path.name.startswith(_GLANCE)):
        kind, moves = path.suffix[1:], path.suffix == ".gif"
        with contextlib.suppress(*broken), Image.open(io.BytesIO(content := read_bytes(path)), formats=[kind]) as image:
            image.load()
            if max(image.size) > _LARGEST and not moves:
                image.thumbnail((_LARGEST, _LARGEST))
                image.save(reduced := io.BytesIO(), "PNG", optimize=True)
                content = reduced.getvalue()
            shown = {"size": image.size, "type": f"image/{kind}", "data": base64.b64encode(content).decode()}
            yield path.name if moves else path.stem, shown


def _sounds(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The WAV files by name. One that is damaged, or too long for a page, is left out."""
    for path in sorted(directory.glob("*.wav")):
        with contextlib.suppress(OSError, EOFError, DamagedFiles, wave.Error):
            with wave.open(io.BytesIO(content := read_bytes(path))) as sound:
                seconds = sound.getnframes() / sound.getframerate()
            if seconds <= _LONGEST:
                yield path.stem, {"seconds": seconds, "data": base64.b64encode(content).decode()}


def _timeline(run: RunInfo) -> list[tuple[int, dict[str, float]]]:
    """(step, seconds by stage) of a DDPO run; of a MAD experiment (generation, CPU seconds of a task of each kind)."""
    if stages := run.summary.get("seconds_by_generation"):
        lines = [dict(zip(stages, each, strict=True)) for each in zip(*stages.values(), strict=True)]
    else:
        lines = [{key.removeprefix("seconds/"): value for key, value in line.items()} for line in run.steps()]
    every = -(-len(lines) // _MOST_BARS) or 1
    spent = [{stage: float(line[stage]) for stage in _STAGES if stage in line} for line in lines]
    return list(enumerate(spent, start=1))[::every]
