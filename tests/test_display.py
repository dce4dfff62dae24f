"""The live view: right numbers, no exception for missing ones, and a terminal left as it was found."""

import io
import re
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from orchestration.runs.display import Display, Terminal, duration, sparkline

METRICS = {
    "reward/mean": 0.8712,
    "reward/std": 0.09,
    "evaluator/full": 0.58,
    "images_per_second": 31.24,
    "policy/clip_fraction": 0.125,
}
ROLES = {"sampler 0": "drawing 3/4", "captioner": "waiting", "learner": "update [2/4]"}


def console_of(width: int = 100, height: int = 30, terminal: bool = True) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=width, height=height, color_system=None), written


def panel_of(display: Display, console: Console, written: io.StringIO) -> str:
    before = len(written.getvalue())
    console.print(display)
    return written.getvalue()[before:]


def test_a_line_a_step_when_not_a_terminal() -> None:
    console, written = console_of(width=40, terminal=False)
    with Display("ddpo", 80, console=console) as display:
        display.say("weights [version 3] published")
        display.activity(ROLES)
        display.step(1, METRICS)
        display.step(12, {"reward/mean": 0.5})
    first, second, third = written.getvalue().splitlines()
    assert first == "weights [version 3] published"
    assert second == "step  1/80  reward 0.871 ±0.090  held-out 0.580  31.2 images/s"
    assert third == "step 12/80  reward 0.500  left 0s"


@pytest.mark.parametrize("ends", ["closed", "pipe", "full"])
def test_a_terminal_that_is_gone_stops_nothing(ends: str) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise {"pipe": BrokenPipeError(), "full": OSError(28, "No space left on device")}[ends]

    file = io.StringIO() if ends == "closed" else Gone()
    with Display("ddpo", 80, console=Terminal(file=file)) as display:
        file.close() if ends == "closed" else None
        for step in range(3):
            display.say("said")
            display.step(step, METRICS)
    assert display.done == 2
    if ends == "full":  # where what is printed is all that was asked for, it is an error
        with pytest.raises(OSError, match="No space"):
            Terminal(file=file).show({"a": 1}, str, as_json=True)


def test_a_command_whose_output_is_closed_ends_as_any() -> None:
    command = [sys.executable, "-m", "orchestration.cli", "runs", "list", "--root", "/nowhere"]
    closed = f"exec {shlex.join(command)} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", closed], timeout=60, stdin=subprocess.DEVNULL).returncode == 0


def test_no_words_command_a_terminal() -> None:
    written = io.StringIO()
    with Display("ddpo", 80, console=Terminal(file=written, force_terminal=False)) as display:
        display.say("a\x1b]0;taken\x07\x9b2J\u202eb [bold]c\r")
    assert written.getvalue() == "a\\x1b]0;taken\\x9b2J\\u202eb [bold]c\n"


def test_time_left_counts_the_steps_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("orchestration.runs.display.time.monotonic", lambda: now[0])
    console, _ = console_of(terminal=False)
    with Display("ddpo", 30, first_step=20, console=console) as display:
        assert display.seconds_left() is None
        now[0] += 500  # the start-up, and nothing to learn from
        display.step(21, {})
        assert display.seconds_left() is None
        for step, seconds in ((22, 30), (23, 90), (24, 30)):
            now[0] += seconds
            display.step(step, {})
        assert display.seconds_left() == pytest.approx(6 * 50)
        now[0] += 10
        assert display.seconds_left() == pytest.approx(6 * 50 - 10)
        now[0] += 1000
        assert display.seconds_left() == pytest.approx(5 * 50)
        display.step(30, {})
        assert display.seconds_left() == 0


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_the_panel_fits_its_terminal(width: int) -> None:
    console, written = console_of(width=width)
    display = Display("a title [with brackets]", 80, console=console)
    for step in range(1, 60):
        display.step(step, {**METRICS, "reward/mean": step / 60})
    display.activity({**ROLES, "reward": "a very long activity " * 8})
    panel = panel_of(display, console, written)
    lines = panel.splitlines()
    assert len({len(line) for line in lines}) == 1, panel
    assert len(lines[0]) == min(width, 100)
    assert len(lines) == 15
    assert "59/80" in panel


def test_the_panel_shows_what_is_known() -> None:
    console, written = console_of()
    display = Display("ddpo [digits]", 80, console=console)
    empty = panel_of(display, console, written)
    assert "ddpo [digits]" in empty
    assert "0/80" in empty
    assert "reward" not in empty
    display.begin({"evaluator/full": 0.4, "measure": [0.4], "timestamp_ms": 1})
    display.step(1, {**METRICS, "evaluator/full": 0.5})
    display.step(2, METRICS)
    display.step(3, {"reward/mean": 0.9})
    display.activity(ROLES)
    panel = panel_of(display, console, written)
    assert re.search(r"reward +0\.900 ±0\.090 +▁▁█", panel)
    assert re.search(r"held-out accuracy +0\.580 \+0\.180 +▁▅█", panel)
    assert re.search(r"images/s +31\.2 ", panel)
    assert re.search(r"clipped +12\.5%", panel)
    assert re.search(r"sampler 0 +drawing 3/4", panel)
    assert re.search(r"· +captioner +waiting", panel)
    assert "update [2/4]" in panel


def test_many_roles_fit_a_low_terminal() -> None:
    console, written = console_of(height=20)
    display = Display("ddpo", 80, console=console)
    display.step(1, METRICS)
    display.activity({f"sampler {index}": "drawing" for index in range(50)})
    panel = panel_of(display, console, written)
    assert len(panel.splitlines()) <= 20
    assert "sampler 7" in panel


@pytest.mark.parametrize(
    "metrics", [{}, {"reward/mean": float("nan")}, {"reward/mean": None}, {"evaluator/full": "x"}, {"reward/std": 1.0}]
)
@pytest.mark.parametrize("terminal", [True, False])
def test_missing_metrics_stop_nothing(metrics: dict[str, float], terminal: bool) -> None:
    console, written = console_of(terminal=terminal)
    with Display("ddpo", 1, console=console) as display:
        display.step(1, metrics)
    assert "1/1" in written.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_cursor_comes_back(error: type[BaseException]) -> None:
    console, written = console_of()

    def fail() -> None:
        with Display("ddpo", 5, console=console) as display:
            display.step(1, METRICS)
            raise error

    with pytest.raises(error):
        fail()
    assert "\x1b[?25l" in written.getvalue()
    assert written.getvalue().rindex("\x1b[?25h") > written.getvalue().rindex("\x1b[?25l")


def test_said_lines_stay_above_the_panel() -> None:
    console, written = console_of()
    with Display("ddpo", 5, console=console) as display:
        display.say("step 3 committed")
        display.step(1, METRICS)
    text = written.getvalue()
    assert "step 3 committed" in text
    assert text.rindex("0.871") > text.rindex("step 3 committed")
    assert "step 1/5" in text


def test_a_terminal_without_unicode_gets_plain_lines() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), force_terminal=True, width=80)
    with Display("ddpo", 5, console=console) as display:
        display.say("before → after")
        display.step(1, METRICS)
    assert raw.getvalue().decode("ascii").splitlines()[0] == "before ? after"
    assert b"step 1/5  reward 0.871 ?0.090" in raw.getvalue()


def test_sparkline() -> None:
    assert sparkline([1.0, 1.0], 5) == "▁▁"
    assert sparkline([0.0, 1.0, 2.0, 7.0], 8) == "▁▂▃█"
    assert sparkline([float(value) for value in range(100)], 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (250, "4m10s"), (7500, "2h05m"), (-3, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
