"""The pictures of a sweep: each setting against the metric, all settings at once, and the plane of two of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.figures.style import FAINT, INK, LINES, dress, panel_figure, save
from policies.common.search_space import exact, short

Tried = Sequence[tuple[Mapping[str, Any], float]]  # (point, metric) of each trial that has one

_MAP = "viridis"


def responses(path: Path, tried: Tried, metric: str, logarithmic: Sequence[str]) -> None:
    """One panel a setting: every trial's metric, and the mean at each value that several trials share."""
    keys, values = list(tried[0][0]), np.array([value for _, value in tried])
    figure, panels = panel_figure(len(keys), 3, 3.6, 2.9)
    for number, (axes, key) in enumerate(zip(panels, keys, strict=True)):
        places, labels = _places([point[key] for point, _ in tried])
        dress(axes, "", key, "" if number % 3 else metric, integer=False, ticks=5)
        axes.scatter(places, values, s=22, color=LINES["blue"], alpha=0.7, linewidth=0)
        shared = [place for place in np.unique(places) if (places == place).sum() > 1]
        if shared:
            axes.plot(shared, [values[places == place].mean() for place in shared], color=INK, linewidth=1.2)
        if labels is not None:
            axes.set_xticks(range(len(labels)), labels)
        if key in logarithmic:
            axes.set_xscale("log")
        axes.sharey(panels[0])
    save(figure, path)


def parallel_coordinates(path: Path, tried: Tried, metric: str, logarithmic: Sequence[str]) -> None:
    """One line a trial through all of its settings to its metric, which colours it."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    keys = [*tried[0][0], metric]
    columns = [[point[key] for point, _ in tried] for key in keys[:-1]] + [[value for _, value in tried]]
    values = np.array(columns[-1], dtype=float)
    colours = colormaps[_MAP](Normalize(values.min(), values.max() or 1)(values))
    figure, (axes,) = panel_figure(1, 1, 1.6 + 1.9 * len(keys), 3.6)
    heights = []
    for index, (key, column) in enumerate(zip(keys, columns, strict=True)):
        places, labels = _places(column)
        places = np.log10(places) if key in logarithmic else places
        low, span = places.min(), (places.max() - places.min()) or 1
        heights.append((places - low) / span)
        axes.axvline(index, color=FAINT, linewidth=0.8)
        ends = [(0.0, short(min(column))), (1.0, short(max(column)))] if labels is None else []
        marks = ends or [((place - low) / span, label) for place, label in enumerate(labels or [])]
        for height, text in dict(marks).items():
            axes.annotate(text, (index, height), xytext=(4, 2), textcoords="offset points", fontsize=7, color=INK)
    for line, colour in zip(np.array(heights).T, colours, strict=True):
        axes.plot(range(len(keys)), line, color=colour, linewidth=1.4, alpha=0.85)
    axes.set_xticks(range(len(keys)), keys, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(keys) - 0.55)
    axes.spines[:].set_visible(False)
    save(figure, path)


def phase_diagram(path: Path, tried: Tried, metric: str, across: str, up: str) -> None:
    """The mean metric over the plane of two settings, with its number in each cell."""
    import pandas
    from matplotlib.colors import LogNorm

    (places, columns), (heights, rows) = (_places([point[key] for point, _ in tried]) for key in (across, up))
    table = pandas.DataFrame({"across": places, "up": heights, "value": [value for _, value in tried]})
    plane = table.pivot_table("value", "up", "across")
    columns, rows, mean = columns or list(plane.columns), rows or list(plane.index), plane.to_numpy()
    known = mean[np.isfinite(mean)]
    scale = LogNorm(known.min(), known.max()) if known.min() > 0 and known.max() > 20 * known.min() else None
    figure, (axes,) = panel_figure(1, 1, 2.2 + 0.95 * len(columns), 1.6 + 0.7 * len(rows))
    picture = axes.imshow(mean, origin="lower", aspect="auto", cmap=_MAP, norm=scale)
    for (row, column), value in np.ndenumerate(mean):
        if np.isfinite(value):
            red, green, blue, _ = picture.cmap(picture.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color="white" if dark else INK)
    axes.set_xticks(range(len(columns)), [short(value) for value in columns])
    axes.set_yticks(range(len(rows)), [short(value) for value in rows])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.colorbar(picture, label=metric)
    save(figure, path)


def _places(column: Sequence[Any]) -> tuple[np.ndarray, list[str] | None]:
    """Where values stand on an axis; those that are no numbers stand side by side, with their labels."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        return np.array(column, dtype=float), None
    texts = [value if isinstance(value, str) else exact(value) for value in column]
    labels = sorted(set(texts))
    return np.array([labels.index(text) for text in texts], dtype=float), [short(label) for label in labels]
