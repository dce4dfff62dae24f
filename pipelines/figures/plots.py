"""The pictures a run leaves behind: grids for the dashboard, before and after, and the curves of its numbers.

Images are uint8 RGB, ``(batch, height, width, 3)``. Small ones are enlarged without smoothing, so that every pixel of a
16-pixel image is seen as it is; large ones are reduced. Nothing here touches the display.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.figures import style
from pipelines.figures.style import FAINT, INK, LINES, dress, finish, legend, panel_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_Draw = Callable[["Axes", "DataFrame"], None]

_GRID_PIXELS = 96  # an image in a dashboard grid is at least this high
_GUTTER = 170  # grey of the gutters, seen between white images as between black ones

_STAGES = {"sample": LINES["blue"], "reward": LINES["yellow"], "learn": LINES["green"], "publish": LINES["purple"]}
_STAGES |= {"evaluate": LINES["orange"], "commit": "#9aa3b2"}
_WORK = {
    "sample": "drawing",
    "reward": "scoring",
    "learn": "learning",
    "publish": "taking weights",
    "evaluate": "judging",
}
_KINDS = _STAGES | {work: _STAGES[stage] for stage, work in _WORK.items()}  # and the driver's waiting for it
_KINDS |= {"captioning": style.ARM_COLOURS[-2], "comparing with the base": _STAGES["evaluate"]}
_PAIRED = 1.32  # inches of an image of a pair
_MOST_LANES = 32
_SLOTS = ("orange", "--"), ("purple", "-."), ("yellow", "-"), ("blue", ":")


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """One picture (height, width, 3) uint8 of ``images`` (n, height, width, 1 or 3), row by row, with thin gutters; by
    default about square. Small ones are enlarged by a whole factor."""
    images, (count, height) = np.broadcast_to(images, (*images.shape[:-1], 3)), images.shape[:2]
    columns = min(columns or isqrt(count - 1) + 1, count)
    zoom = max(1, -(-_GRID_PIXELS // height))
    gutter = max(1, zoom // 3)
    edges = (0, -count % columns), (gutter, 0), (gutter, 0), (0, 0)  # before each cell, and cells to fill the last row
    cells = np.pad(images.repeat(zoom, 1).repeat(zoom, 2), edges, constant_values=_GUTTER)
    rows = cells.reshape(-1, columns, *cells.shape[1:]).swapaxes(1, 2)
    grid = rows.reshape(-1, columns * cells.shape[2], 3)
    return np.pad(grid, ((0, gutter), (0, gutter), (0, 0)), constant_values=_GUTTER)


def before_after(
    path: Path,
    before: np.ndarray,
    after: np.ndarray,
    prompts: Sequence[str],
    captions_before: Sequence[str] | None,
    captions_after: Sequence[str] | None,
    names: tuple[str, str] = ("before", "after"),
    title: str = "before and after: same prompts and seeds",
) -> None:
    """Write a PNG of pairs: what a prompt and seed gave before the run, and what they give after it; or other pairs,
    with their ``names`` and ``title``.

    Images of one size, in rows of one length where that can be. Under each image stand the captioner's words, if there
    are any, green where they are the prompt and red where they are not.
    """
    columns = next((number for number in (4, 5, 3) if len(prompts) % number == 0), min(4, len(prompts)))
    rows = -(-len(prompts) // columns)
    width, height = 3.0 * columns, 2.36 * rows + 0.4  # inches
    figure = style.figure_of(width, height)
    figure.suptitle(title, fontsize=9, color=FAINT)
    page = figure.add_axes((0, 0, 1, 1))  # one for all pairs: axes are dear
    page.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    page.axis("off")
    looks = dict(zip(names, ((before, captions_before), (after, captions_after)), strict=True))
    for index, prompt in enumerate(prompts):
        left, top = 3.0 * (index % columns) + 0.15, 2.36 * (index // columns) + 0.95
        style.write(page, (left + 1.35, top - 0.24), prompt, 38, size=8.5, color=INK, va="bottom", weight="bold")
        for side, (name, (images, captions)) in enumerate(looks.items()):
            x = left + 1.37 * side
            page.imshow(images[index], extent=(x, x + _PAIRED, top + _PAIRED, top), interpolation="nearest")
            page.text(x + _PAIRED / 2, top - 0.05, name, fontsize=6.5, color=FAINT, ha="center")
            if captions:
                colour = style.RIGHT if captions[index].strip() == prompt.strip() else style.WRONG
                place = x + _PAIRED / 2, top + _PAIRED + 0.06
                style.write(page, place, captions[index], 26, size=6.6, color=colour, va="top")
    page.set(xlim=(0, width), ylim=(height, 0))
    save(figure, path)


def curves(path: Path, history: Sequence[Mapping[str, float]], glance: bool = False) -> None:
    """Write a PNG of a run's numbers over its steps, at a ``glance`` of the first two.

    ``history`` holds one mapping a step, with ``step`` and any of the run's metrics; what no step has is left out,
    line by line and panel by panel.
    """
    import pandas

    table = pandas.DataFrame(list(history), dtype=float).replace([np.inf, -np.inf], np.nan)
    table = table.set_index("step").dropna(axis="columns", how="all")
    measured = [panel for key, panel in _PANELS.items() if any(name.startswith(key) for name in table)]
    measured = measured[: 2 if glance else None]
    figure, panels = style.sheet(len(measured), glance)
    for axes, (title, draw) in zip(panels, measured, strict=True):
        dress(axes, title, "step", ticks=6)
        draw(axes, table)
    save(figure, path)


def timeline(path: Path, lanes: Mapping[str, Sequence[tuple[str, float, float]]]) -> None:
    """Write a PNG of who did what when: ``lanes`` of (what, start, end in seconds), ``step`` marking whole steps.

    Each lane's label tells the share of the time in which something was done; of very many lanes the first are shown.
    """
    shown = dict(list(lanes.items())[:_MOST_LANES])
    steps = [span for spans in lanes.values() for span in spans if span[0] == "step"]
    begin, end = min(span[1] for span in steps), max(span[2] for span in steps)
    kinds = dict.fromkeys(what for spans in shown.values() for what, *_ in spans if what != "step")
    bars, labels = [], []
    for name, spans in shown.items():
        done = [(what, (start - begin, stop - start)) for what, start, stop in spans if what != "step"]
        bars.append(done)
        busy = min(1.0, sum(length for _, (_, length) in done) / (end - begin))
        labels.append(f"{name}  {'waiting' if name == 'driver' else 'busy'} {busy:.0%}, {1 - busy:.0%} idle")
    margins = style.beside(labels), *style.MARGINS[1:]
    figure, (axes,) = panel_figure(1, 1, 9, 1 + 0.3 * len(shown), margins)
    dress(axes, f"{len(steps)} steps in the middle of the run", "seconds", integer=False)
    for row, done in enumerate(bars):
        colours = [_KINDS.get(what, FAINT) for what, _ in done]
        axes.broken_barh([bar for _, bar in done], (row - 0.38, 0.76), color=colours)
    for _, start, _ in steps:
        axes.axvline(start - begin, color=INK, linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlim=(0, end - begin), ylim=(len(shown) - 0.4, -0.6))
    for colour in dict.fromkeys([*_KINDS.values(), FAINT]):
        if alike := ", ".join(kind for kind in kinds if _KINDS.get(kind, FAINT) == colour):
            axes.plot([], [], "s", color=colour, label=alike)
    finish(figure, path)


def _draw_accuracy(axes: "Axes", table: "DataFrame") -> None:
    slots = [key for key in table if key.startswith("evaluator/") and not key.endswith(("/full", "/agreement"))]
    for (colour, dashes), key in zip(cycle(_SLOTS), slots, strict=False):
        axes.plot(table[key].dropna(), dashes, color=LINES[colour], linewidth=1.2, label=key.split("/", 1)[1])
    for key, marker, label in (("evaluator/full", "o-", "all words right"), ("unseen/full", "x--", "unseen prompts")):
        if key in table:
            axes.plot(table[key].dropna(), marker, color=LINES["green"], linewidth=2, markersize=3, label=label)
    legend(axes)


def _course(
    key: str, colour: str, form: str = "", bottom: float | None = None, spread: str = "", logarithmic: bool = False
) -> _Draw:
    """Draws a metric: as dots, or where there are enough of them faint, under its running mean; within ± ``spread``,
    another metric; on a ``logarithmic`` axis if its values differ by orders of magnitude."""

    def draw(axes: "Axes", table: "DataFrame") -> None:
        values, marker = table[key].dropna(), "o"
        if len(values) >= 20:
            axes.plot(values, color=LINES[colour], linewidth=1, alpha=0.35)
            reach = max(3, len(values) // 16)  # neighbours on either side; at the ends there are fewer
            values, marker = values.rolling(2 * reach + 1, center=True, min_periods=1).mean(), ""
        axes.plot(values, marker=marker, markersize=3, linewidth=2, color=LINES[colour], label="mean")
        if spread in table:
            both = table[[key, spread]].dropna()
            ends = [table.get(key.replace("/mean", f"/{end}")) for end in ("min", "max")]  # nothing lies beyond them
            band = [(both[key] + sign * both[spread]).clip(*ends) for sign in (-1, 1)]
            label = "± one standard deviation"
            axes.fill_between(both.index, *band, color=LINES[colour], alpha=0.13, linewidth=0, label=label)
            legend(axes)
        if logarithmic and table[key].min() > 0 and table[key].max() > 50 * table[key].min():
            axes.set_yscale("log")
        if form:
            axes.yaxis.set_major_formatter(form)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)

    return draw


def _draw_seconds(axes: "Axes", table: "DataFrame") -> None:
    stages = {f"seconds/{stage}": stage for stage in _STAGES if f"seconds/{stage}" in table}
    spent = table[[*stages]].dropna(how="all").fillna(0.0)
    colours = [_STAGES[stage] for stage in stages.values()]
    look: dict[str, Any] = {"labels": [*stages.values()], "step": "mid", "alpha": 0.85, "linewidth": 0}
    axes.stackplot(spent.index, spent.T.to_numpy(), colors=colours, **look)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    place = axes.get_position(original=True)
    axes.set_position((place.x0, place.y0, 0.76 * place.width, place.height))
    legend(axes, reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))


_PANELS: dict[str, tuple[str, _Draw]] = {  # what its metrics' names begin with → title, and what draws them
    "reward/mean": ("reward", _course("reward/mean", "blue", spread="reward/std")),
    "evaluator/full": ("held-out accuracy", _draw_accuracy),
    "evaluator/agreement": ("captioner–evaluator agreement", _course("evaluator/agreement", "blue")),
    "evaluation/diversity": ("diversity of held-out images", _course("evaluation/diversity", "orange")),
    "evaluation/kl_to_base": ("KL to the base (nats an image)", _course("evaluation/kl_to_base", "purple")),
    "policy/approximate_kl": ("approximate KL", _course("policy/approximate_kl", "purple", "{x:.2g}")),
    "policy/clip_fraction": ("share of clipped transitions", _course("policy/clip_fraction", "orange", "{x:.0%}", 0)),
    "policy/gradient_norm": ("gradient norm", _course("policy/gradient_norm", "red", logarithmic=True)),
    "seconds/": ("seconds a step", _draw_seconds),
}
