"""What a person watches: a live panel on a terminal, one plain line a step anywhere else.

Nothing here can stop a run: a metric that is missing or not a number is left out, and the terminal's cursor comes
back however the block is left.
"""

import contextlib
import errno
import json
import math
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from orchestration.runs.config import visible

_BLOCKS = "▁▂▃▄▅▆▇█"
_REFRESHES_PER_SECOND = 4
_SILENT_SECONDS = 10.0  # after which plain lines say what is waited for
_WIDEST = 100  # columns; a wider terminal gains nothing
_PIPE_WIDTH = 10**6
_NAME = 40  # characters of a name that a table keeps together on a terminal
_CLOCK_WIDTH = 19  # so that the bar keeps its length while the clock runs


@dataclass(frozen=True)
class Row:
    """A number worth watching: its metric, its name on the panel and on plain lines, and how it is shown.

    ``colour`` draws its course, ``spread`` is the metric of its ±, ``gain`` shows what it has gained since the start.
    """

    key: str
    label: str
    plain: str | None = None
    form: str = "{:.3f}"
    colour: str | None = None
    spread: str | None = None
    gain: bool = False


class Terminal(Console):
    """Where all is printed. No text can command the terminal, and a terminal that is closed stops nothing."""

    refused: OSError | None = None  # what could not be written, as there is no space

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, **options})
        if self.is_jupyter:  # plain lines in one output, instead of an output for each
            super().__init__(**{"highlight": False, "force_jupyter": False, "force_terminal": False, **options})
        with contextlib.suppress(AttributeError, ValueError):  # closed
            if "width" not in options and not self.file.isatty():  # a pipe or a file: nothing is folded for its reader
                self.width = _PIPE_WIDTH

    def show(self, facts: Any, render: Callable[[Any], RenderableType], as_json: bool, wraps: bool = True) -> None:
        """Facts as a JSON document, or as ``render`` makes them readable, with lines that are broken to fit or not.
        Nothing else was asked for: raises OSError if they cannot be written."""
        if as_json:
            self.document(facts)
        else:
            self.print(render(facts), soft_wrap=not wraps)
        if self.refused is not None:
            raise self.refused

    def document(self, content: Any) -> None:
        """One JSON document, numbers in full, in ASCII. What JSON has no number for is null."""
        plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
        self.print_json(data=plain, highlight=False, ensure_ascii=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What rich renders, without control characters in its texts."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def _write_buffer(self) -> None:
        """What rich does to write, or nothing from the time on when there is nowhere to write."""
        try:
            super()._write_buffer()
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:  # closed, or its reader has gone: the run goes on
            self._buffer.clear()
            self.quiet = True
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                self.refused = error


DDPO_ROWS = (
    Row("reward/mean", "reward", "reward {}", colour="green", spread="reward/std"),
    Row("evaluator/full", "held-out accuracy", "held-out {}", colour="blue", gain=True),
    Row("images_per_second", "images/s", "{} images/s", form="{:.1f}"),
    Row("policy/clip_fraction", "clipped", form="{:.1%}"),
)


class Display:
    """Live table on a terminal; plain lines otherwise.

    ``total_steps`` is the last step's number, ``first_step`` the number of steps that were done before this process
    (a resume); the time left is estimated from the steps of this process only. ``rows`` are the numbers to show,
    ``unit`` is what a step is called.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        rows: Sequence[Row] = DDPO_ROWS,
        unit: str = "step",
    ) -> None:
        self.title, self.total_steps, self.done = title, total_steps, first_step
        self.console = console or Terminal()
        self._rows, self._unit = rows, unit
        self._activities: dict[str, str] = {}
        self._courses: dict[str, list[float]] = defaultdict(list)
        self._started = self._last_step_at = time.monotonic()
        self._step_times: list[float] = []
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        self._said_at = time.monotonic()
        self._over = threading.Event()
        self.remedy = ""  # what can be done if this process is ended
        self.log: Path | None = None  # the file that keeps the plain lines, wherever they are shown

    def __enter__(self) -> Self:
        self._started = self._last_step_at = time.monotonic()
        console = self.console
        if console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf"):
            self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_SECOND, vertical_overflow="crop")
            self._live.start()
        else:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live is not None:
            self._activities = {}
            self._live.stop()
            self._live = None

    def say(self, text: str, shown: bool = True) -> None:
        """A line that stays; above the panel on a terminal. It is only logged if it is not ``shown``."""
        self._said_at = time.monotonic()
        self._write(text)
        with contextlib.suppress(AttributeError):  # no terminal, so no encoding
            text = text.encode(self.console.encoding, "replace").decode(self.console.encoding)
        if shown:
            self.console.print(Text(text), soft_wrap=self._live is None)

    def announce(self, text: str) -> None:
        """A line for who has no panel to look at."""
        self.say(text, shown=self._live is None)

    def _write(self, text: str) -> None:
        """Add a line to the log, if the disk takes it."""
        if self.log is not None:
            with contextlib.suppress(OSError):
                file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                with open(file, "w", encoding="utf-8", errors="replace") as log:
                    log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {visible(text)}\n")

    def activity(self, states: Mapping[str, str]) -> None:
        """What each role does now, in place of what it did."""
        self._activities = dict(states)

    def _break_silence(self) -> None:
        """Until the end: say what is waited for when nothing else was said for a while."""
        while not self._over.wait(0.5):
            if time.monotonic() - self._said_at > _SILENT_SECONDS:
                busy = [f"{name}: {state}" for name, state in self._activities.items() if state != "idle"]
                self.announce(
                    f"waiting for {'; '.join(busy)}" if busy else "preparing" if not self._step_times else "at work"
                )

    def step(self, step: int, metrics: Mapping[str, float], note: str = "") -> None:
        """A finished step, counted from 1; ``note`` says on the plain line what it was."""
        now = time.monotonic()
        self._step_times.append(now - self._last_step_at)
        self.done, self._last_step_at = step, now
        numbers = self.begin(metrics)
        self.announce(self._line(numbers, note))

    def begin(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Where the courses begin, from which gains count: what was measured before the first step."""
        numbers = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        for key, value in numbers.items():
            self._courses[key].append(value)
        return numbers

    def seconds_left(self) -> float | None:
        """Estimated from the latest steps; None before the second, as the first bears the start-up."""
        latest = self._step_times[1:][-20:]
        if not latest:
            return None
        seconds_per_step = statistics.fmean(latest)  # several may be finished at once, every tenth evaluated
        since_last = time.monotonic() - self._last_step_at
        return max(0.0, seconds_per_step * (self.total_steps - self.done) - min(since_last, seconds_per_step))

    def _line(self, numbers: Mapping[str, float], note: str) -> str:
        """The plain line of a step."""
        parts = [f"{self._unit} {self.done:>{len(str(self.total_steps))}}/{self.total_steps}", *filter(None, [note])]
        for row in self._rows:
            if row.key in numbers and row.plain:
                spread = f" ±{numbers[row.spread]:.3f}" if row.spread and row.spread in numbers else ""
                parts.append(row.plain.format(row.form.format(numbers[row.key]) + spread))
        if (left := self.seconds_left()) is not None:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        inner = width - 6
        parts: list[RenderableType] = [self._progress()]
        numbers = self._numbers(inner)
        if numbers.row_count:
            parts += ["", numbers]
        if self._activities:
            parts += ["", self._roles(max(0, options.size.height - 12))]
        title, colour = f"[bold]{escape(self.title)}[/]", "cyan" if self.done < self.total_steps else "green"
        yield Panel(Group(*parts), title=title, title_align="left", border_style=colour, padding=(1, 2), width=width)

    def _progress(self) -> RenderableType:
        """Step, bar, elapsed and time left, on one line."""
        clock, left = Text(duration(time.monotonic() - self._started), "dim"), self.seconds_left()
        if left is not None and self.done < self.total_steps:
            clock.append(" · ").append(f"{duration(left)} left", "not dim")
        count = Text.assemble((f"{self._unit} ", "dim"), (f"{self.done}/{self.total_steps}", "bold"))
        bar = ProgressBar(max(1, self.total_steps), self.done, complete_style="cyan", finished_style="green")
        last = Column(no_wrap=True, justify="right", min_width=_CLOCK_WIDTH)
        line = Table.grid(Column(no_wrap=True), Column(ratio=1), last, padding=(0, 2, 0, 0), expand=True)
        line.add_row(count, bar, clock)
        return line

    def _numbers(self, width: int) -> Table:
        """What the last steps gave."""
        columns = (Column(style="dim", no_wrap=True), Column(no_wrap=True), Column(no_wrap=True))
        grid = Table.grid(*columns, padding=(0, 2, 0, 0))
        spark = max(8, width - 36)
        for row in self._rows:
            if not (course := self._courses[row.key]):
                continue
            value = Text(row.form.format(course[-1]), f"bold {row.colour}" if row.colour else "")
            if row.spread and (spreads := self._courses[row.spread]):
                value.append(f" ±{spreads[-1]:.3f}", "dim")
            if row.gain and len(course) > 1:
                value.append(f" {course[-1] - course[0]:+.3f}", "dim")
            grid.add_row(row.label, value, Text(sparkline(course, spark), row.colour) if row.colour else "")
        return grid

    def _roles(self, most: int) -> Table:
        """A line a role, as many as fit the terminal's height."""
        state_column = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (Column(no_wrap=True), Column(style="dim", no_wrap=True), state_column)
        grid = Table.grid(*columns, padding=(0, 1, 0, 0), expand=True)
        for role, state in list(self._activities.items())[:most]:
            idle = state in {"waiting", "idle", "ready", ""}
            grid.add_row(Text("·", "dim") if idle else self._spinner, role, Text(state, "dim" if idle else ""))
        return grid


def plain_table(
    headings: Sequence[str], rows: Sequence[Sequence[str | Text]] = (), numbers: Sequence[str] = ()
) -> Table:
    """A table without lines, whose cells fold where they are too wide for a terminal; ``numbers`` do not, and the names
    in the first column only if they are long."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        whole: Any = {"no_wrap": True, "justify": "right"} if heading in numbers else {}
        table.add_column(escape(heading), overflow="fold", **whole)
    table.columns[0].no_wrap = all(len(row[0]) <= _NAME for row in rows)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def sparkline(values: list[float], width: int) -> str:
    """``values`` as at most ``width`` block characters, the mean of neighbours where there are more values."""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * count
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``45s``, ``4m10s``, ``2h05m``."""
    minutes, rest = divmod(max(0, round(min(seconds, 1e9))), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
