"""What all figures look like: colours, panels, and how they are written. matplotlib is imported when it is used."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, FAINT, FRAME, RIGHT, WRONG = "#1f2430", "#8b93a1", "#cfd5de", "#1a7f4b", "#c0392b"
LINES = {"blue": "#3b6fd4", "green": "#1a9e77", "orange": "#e0822f", "purple": "#8757c7", "red": "#cf4a5a"}

ARM_COLOURS = (*LINES.values(), "#2aa3b8", "#b8901a", "#7a5240")


def panel_figure(count: int, most: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its ``count`` panels of this size (inches), at most so many in a row."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(most, count)
    rows = -(-count // columns)
    figure = figure_of(width * columns, height * rows, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def dress(axes: "Axes", title: str, below: str, beside: str = "", integer: bool = True, ticks: int = 10) -> None:
    """The looks that all panels share; ``below`` and ``beside`` name the axes."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", pad=8)
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
    axes.legend(fontsize=7.5, labelcolor=INK, edgecolor="none", framealpha=0.7, **options)


def write(axes: "Axes", place: tuple[float, float], text: str, letters: int, **style: Any) -> None:
    """Centre ``text`` at a place relative to the axes, in at most two lines of so many ``letters``."""
    lines = "\n".join(textwrap.wrap(text, letters, max_lines=2, placeholder=" …"))
    axes.text(*place, lines, transform=axes.transAxes, ha="center", linespacing=1.15, parse_math=False, **style)


def figure_of(width: float, height: float, **options: Any) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)


def save(figure: "Figure", path: Path) -> None:
    """Write the PNG, without matplotlib's version in it, so that equal pictures are equal files, and drawn once:
    ``savefig`` draws twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(path, format="png")


def arm_colours(names: Iterable[str]) -> dict[str, np.ndarray]:
    """Red, green and blue (3,) of each name; beyond the palette, evenly from the rainbow."""
    from matplotlib import colormaps, colors

    arms = list(dict.fromkeys(names))
    palette = ARM_COLOURS if len(arms) <= len(ARM_COLOURS) else colormaps["turbo"](np.linspace(0.05, 0.95, len(arms)))
    return dict(zip(arms, colors.to_rgba_array(palette)[:, :3], strict=False))


def finish(figure: Any, path: Path, **options: Any) -> None:
    """Save with a legend below: every label once, in rows as full as the longest allows."""
    found = (axes.get_legend_handles_labels() for axes in figure.axes)
    keys = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.06 * max(map(len, keys), default=1))))
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(keys) // columns))
    style = {"ncols": columns, "fontsize": 7.5, "labelcolor": INK, "frameon": False} | options
    for text in figure.legend(keys.values(), keys, loc="outside lower center", **style).get_texts():
        text.set_parse_math(False)
    save(figure, path)
