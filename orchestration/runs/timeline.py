"""What each actor did and when: kept in a run's ``spans.jsonl``, shown as lanes, as a table and as a trace.

A lane is an actor, or the driver, whose spans are what it waited for. Clocks are the nodes' own.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from actors.worker import Span
from pipelines.storage.atomic import append_durably, as_lines, read_json, read_lines, with_digest, write_json

Lanes = Mapping[str, Sequence[Span]]
_SHOWN = 3  # steps of the picture
_LEAST = 5e-4  # of the time, to be a row of the table
STEP = "step"  # the driver's span of a whole step


def append_spans(directory: Path, step: int, lanes: Lanes) -> None:
    """Write down what was done until ``step`` steps were finished; said again of a step, the later counts."""
    content = {name: [(what, round(a, 5), round(b, 5)) for what, a, b in spans] for name, spans in lanes.items()}
    append_durably(directory / "spans.jsonl", as_lines([with_digest({"step": step, "lanes": content})]))


def read_spans(directory: Path) -> dict[str, list[Span]]:
    """Everything that is known, by lane, in the order in which it began; what holds something comes before that."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    lines = read_lines(directory / "spans.jsonl", ["step", "lanes"])
    for line in {line["step"]: line for line in lines}.values():
        with contextlib.suppress(TypeError, ValueError):  # lanes of something else
            for name, spans in line["lanes"].items():
                lanes[name] += [(str(what), float(began), float(ended)) for what, began, ended in spans]
    return {name: sorted(spans, key=lambda span: (span[1], -span[2])) for name, spans in lanes.items()}


def steps_of(lanes: Lanes) -> list[Span]:
    """The driver's spans of whole steps."""
    return [span for span in lanes.get("driver", ()) if span[0] == STEP]


def middle_of(lanes: Lanes) -> dict[str, list[Span]]:
    """What was done in a few steps in the middle of a run, without parts of the work; nothing if there is no step."""
    steps = steps_of(lanes)
    first = max(0, (len(steps) - _SHOWN) // 2)
    shown = steps[first : first + _SHOWN]
    if not shown:
        return {}
    begin, end = shown[0][1], shown[-1][2]
    cut = {
        name: [(what, max(a, begin), min(b, end)) for what, a, b, depth, _ in nested(spans) if not depth]
        for name, spans in lanes.items()
    }
    return {name: [span for span in spans if span[1] < span[2]] for name, spans in cut.items()}


def nested(spans: Sequence[Span]) -> Iterator[tuple[str, float, float, int, float]]:
    """What, start, end, depth, and the seconds that no part of it takes, of each span; steps hold nothing."""
    found: list[tuple[str, float, float, int]] = []
    own: list[float] = []
    within: list[int] = []  # those that hold the next one, from the outside inwards
    for what, begin, end in (span for span in spans if span[0] != STEP):
        while within and found[within[-1]][2] <= begin:
            within.pop()
        if within:
            own[within[-1]] -= end - begin
        above = found[within[-1]][0] if within else ""
        name = above if above.endswith(what) else f"{above} › {what}" if above else what
        found.append((name, begin, end, len(within)))
        own.append(end - begin)
        within.append(len(own) - 1)
    yield from ((*span, seconds) for span, seconds in zip(found, own, strict=True))
    yield from ((STEP, begin, end, 0, 0.0) for what, begin, end in spans if what == STEP)


def render_profile(directory: Path) -> Table:
    """Where the seconds of a step went: of every actor, by what it did, without the first step, which warms up."""
    lanes, peaks = read_spans(directory), read_json(directory / "summary.json").get("peak_memory_bytes", {})
    steps = steps_of(lanes)[1:] or steps_of(lanes)
    if not steps:
        return Table(title=f"{directory / 'spans.jsonl'} holds no step")
    begin, end = steps[0][1], steps[-1][2]
    table = Table(title=f"seconds a step, over {len(steps)} steps of {(end - begin) / len(steps):.3f} s")
    for title in ("actor", "activity", "s/step", "share", "peak memory"):
        table.add_column(title, justify="left" if title in ("actor", "activity") else "right", no_wrap=True)
    for name, spans in lanes.items():
        spent: dict[str, float] = defaultdict(float)
        for what, began, ended, _, seconds in nested(spans):
            if begin <= began and ended <= end and what != STEP:
                spent[what] += seconds
        spent["idle"] = max(0.0, end - begin - sum(spent.values()))
        peak = peaks.get(name, {})
        shown = " + GPU ".join(f"{peak[kind] / 1e6:,.0f} MB" for kind in ("memory", "gpu_memory") if peak.get(kind))
        shares = {
            what: seconds for what, seconds in spent.items() if seconds > _LEAST * (end - begin) or what == "idle"
        }
        for row, (what, seconds) in enumerate(sorted(shares.items(), key=lambda each: (each[0] == "idle", each[0]))):
            share = f"{seconds / (end - begin):.1%}"
            table.add_row("" if row else name, what, f"{seconds / len(steps):.3f}", share, "" if row else shown)
        table.add_section()
    return table


def write_trace(directory: Path) -> Path:
    """Write ``trace.json`` in Chrome's trace event format, for ui.perfetto.dev and chrome://tracing."""
    events: list[dict[str, object]] = []
    for number, (name, spans) in enumerate(read_spans(directory).items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}})
        for what, began, ended in spans:
            at = round(1e6 * began)
            events.append({"ph": "X", "name": what, "pid": 1, "tid": number, "ts": at, "dur": round(1e6 * ended) - at})
    write_json(path := directory / "trace.json", {"traceEvents": events})
    return path
