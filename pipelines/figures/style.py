"""What all figures look like: colours, panels, and how they are written. matplotlib is imported when it is used."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, FAINT, FRAME, RIGHT, WRONG = "#1f2430", "#8b93a1", "#cfd5de", "#1a7f4b", "#c0392b"
LINES = {"blue": "#3e5cdc", "orange": "#b74a00", "green": "#11ba9b", "yellow": "#e6ac1e", "purple": "#a14e9f"}
LINES |= {"red": "#9c4943"}
ARM_COLOURS = (*LINES.values(), "#47b7ff", "#1d1d39")  # no two alike to the colour-blind, see tests/test_figures.py
PALE = ["#" + "".join(f"{127 + int(each[at : at + 2], 16) // 2:02x}" for at in (1, 3, 5)) for each in ARM_COLOURS]
_MARKERS, _DASHES = "osD^vPX", ("-", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1)))
MARGINS = 0.62, 0.16, 0.5, 0.36  # inches left of a panel, right of it, below and above
_GLANCE_MARGINS = 0.42, 0.05, 0.18, 0.16
_GLANCE_DPI = 84  # of figures that fit into MLflow's description of a run, 528 × 69 pixels


def panel_figure(
    count: int, most: int, width: float, height: float, margins: Sequence[float] = MARGINS, glance: bool = False
) -> tuple[Any, list[Any]]:
    """A figure and its ``count`` panels of this size (inches), at most so many in a row; of few pixels at a glance.
    The ``margins`` of each panel hold its labels: what matplotlib's layouts take to find them is most of a picture."""
    left, right, below, above = margins
    columns = min(most, count)
    rows = -(-count // columns)
    figure = figure_of(width * columns, height * rows)
    figure.set_dpi(_GLANCE_DPI if glance else DPI)
    size = (width - left - right) / width / columns, (height - below - above) / height / rows
    panels = []
    for index in range(count):
        row, column = divmod(index, columns)
        corner = (column + left / width) / columns, (rows - 1 - row + below / height) / rows
        panels.append(figure.add_axes((*corner, *size)))
    return figure, panels


def sheet(count: int, glance: bool = False, below: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure and its ``count`` panels, three in a row, with so many inches more ``below`` each; at a ``glance``
    small, two with room for strips beside."""
    width, height = (1.5 if count < 3 else 2.08, 0.82) if glance else (4.3, 2.9)
    margins = np.add(_GLANCE_MARGINS if glance else MARGINS, (0, 0, below, 0))
    figure, panels = panel_figure(count, 3, width, height, margins.tolist(), glance)
    for axes in panels if glance else ():
        axes.margins(y=0.15)  # markers are large there
    return figure, panels


def beside(labels: Iterable[str], size: float = 8) -> float:
    """Inches that labels of this font size take, with what is between them and a panel."""
    lines = [line for label in labels for line in label.split("\n")]
    return 0.1 + 0.0088 * size * max(map(len, lines), default=0)


def dress(axes: "Axes", title: str, below: str, beside: str = "", integer: bool = True, ticks: int = 10) -> None:
    """The looks that all panels share; ``below`` and ``beside`` name the axes."""
    from matplotlib.ticker import MaxNLocator

    large = axes.figure.dpi == DPI
    look: dict[str, Any] = {"fontsize": 10 if large else 7, "color": INK, "weight": "bold", "pad": 8 if large else 3}
    axes.set_title(title, loc="left", y=1, **look)  # else matplotlib measures all ticks to find the place
    axes.set_xlabel(below, fontsize=8, color=FAINT)
    axes.set_ylabel(beside, fontsize=8, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=integer, nbins=ticks, steps=[1, 2, 5, 10]))
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FRAME)


def legend(axes: "Axes", **options: Any) -> None:
    if axes.figure.dpi == DPI:  # at a glance there is no room
        axes.legend(fontsize=7.5, labelcolor=INK, edgecolor="none", framealpha=0.7, **options)


def write(axes: "Axes", place: tuple[float, float], text: str, letters: int, **style: Any) -> None:
    """Centre ``text`` at a place of the axes, in at most two lines of so many ``letters``."""
    lines = "\n".join(textwrap.wrap(text, letters, max_lines=2, placeholder=" …"))
    axes.text(*place, lines, ha="center", linespacing=1.15, parse_math=False, **style)


def figure_of(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def save(figure: "Figure", path: Path) -> None:
    """Write the PNG, without matplotlib's version in it, so that equal pictures are equal files, and drawn once:
    ``savefig`` draws twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes if figure.dpi < DPI else ():
        axes.set(xlabel="", ylabel="")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(path, format="png")


def arm_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each name's line: beyond the palette the colours come again, dashed."""
    looks = []
    for index, _ in enumerate(arms := list(dict.fromkeys(names))):
        turn, place = divmod(index, len(ARM_COLOURS))
        marker, dashes = _MARKERS[(place + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)]
        looks.append({"color": ARM_COLOURS[place], "marker": marker, "linestyle": dashes})
    return dict(zip(arms, looks, strict=True))


def finish(figure: Any, path: Path, **options: Any) -> None:
    """Save with a legend below: every label once, in rows as full as the longest allows."""
    found = (axes.get_legend_handles_labels() for axes in figure.axes)
    keys = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.06 * max(map(len, keys), default=1))))
    if figure.dpi < DPI:  # it may not grow: one row, or none
        keys = keys if sum(0.3 + 0.055 * len(label) for label in keys) < figure.get_figwidth() else {}
        options |= {
            "ncols": max(1, len(keys)),
            "fontsize": 6,
            "handlelength": 1,
            "columnspacing": 1,
            "borderaxespad": 0,
        }
        _make_room(figure, 0.15 if keys else 0.0, grows=False)
    else:
        _make_room(figure, 0.17 * -(-len(keys) // columns), grows=True)
    style = {"ncols": columns, "fontsize": 7.5, "labelcolor": INK, "frameon": False} | options
    for text in figure.legend(keys.values(), keys, loc="lower center", **style).get_texts():
        text.set_parse_math(False)
    save(figure, path)


def _make_room(figure: Any, inches: float, grows: bool) -> None:
    """Leave so much below the panels of a figure, which ``grows`` by it or whose panels shrink."""
    height = figure.get_figheight() + inches * grows
    figure.set_figheight(height)
    start = inches / height
    for axes in figure.axes:
        box = axes.get_position(original=True)
        axes.set_position((box.x0, start + box.y0 * (1 - start), box.width, box.height * (1 - start)))
