"""The pictures of a sweep: each setting against the metric, all settings at once, and the plane of two of them.

A point is the mean of its seeds on the metric's own scale. The best is orange; what failed, was stopped or still runs
is grey, and counts for nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.figures.style import FRAME, INK, LINES, MARGINS, beside, dress, finish, panel_figure, save, sheet
from policies.common.intervals import interval, scale_of
from policies.common.search_space import PointResult, exact, short

_RAMP = ("#dce6f8", "#7fa3e6", LINES["blue"], "#1c3a7a")  # from worse to better
_BEST, _LEFT = LINES["orange"], "#b9c0cb"
_POINT = "a point"
_LETTERS = 45  # that fit below a panel
_MOST_NAMED, _APART = 6, 0.04  # values on an axis that are all named, and of its length that lies between two
_WIDE = 20  # times the smallest: beyond, the metric is shown on its logarithm


class Measured:
    """The ``points`` of a sweep that have values, best first, and how their ``metric`` is drawn."""

    def __init__(self, points: Sequence[PointResult], metric: str, direction: Literal["max", "min"]) -> None:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

        self.points, self.metric, self.direction = points, metric, direction
        self.title = f"{metric} ({'larger' if direction == 'max' else 'smaller'} is better)"
        self.means, self.finished = np.array([each.mean for each in points]), np.array([p.complete for p in points])
        known = self.means[self.finished] if self.finished.any() else self.means
        low, high = np.nanmin(known), np.nanmax(known)
        self.is_wide = bool(np.nanmin(self.means) > 0 and high > _WIDE * low)
        is_best = self.finished & (np.arange(len(points)) == 0)
        best = "the best point", is_best, _BEST, 2.6, "-"
        others = _POINT, self.finished & ~is_best, LINES["blue"], 1.4, "-"
        left = "has not finished", ~self.finished, _LEFT, 1.4, ":"
        self.groups = [group for group in (left, others, best) if group[1].any()]  # and how they are drawn
        self._norm = (LogNorm if self.is_wide else Normalize)(low, high, clip=True)
        self._map = LinearSegmentedColormap.from_list("better", _RAMP if direction == "max" else _RAMP[::-1])

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Red, green, blue and alpha of each value, darker where it is better."""
        return np.asarray(self._map(self._norm(values)))

    def over(self, which: np.ndarray) -> float:
        """The mean over those points, on the metric's scale."""
        return float(interval(self.means[which], scale_of(self.metric)).mean)

    def column(self, key: str) -> list[Any]:
        """What each point has for a setting."""
        return [each.point[key] for each in self.points]


def responses(path: Path, measured: Measured, logarithmic: Sequence[str], glance: bool = False) -> None:
    """One panel a setting, at a ``glance`` of the first three: every point's mean and interval, its seeds, and the mean
    over the finished points at each value that several of them share."""
    from matplotlib.ticker import LogLocator, NullLocator

    keys, finished = list(measured.points[0].point)[: 3 if glance else None], measured.finished
    bars = ", 95 % interval" if any(np.isfinite(each.low) for each in measured.points) else ""
    whose = np.repeat(np.arange(len(measured.points)), [len(each.values) for each in measured.points])
    seeds = np.concatenate([each.values for each in measured.points])
    ends = np.array([(each.mean - each.low, each.high - each.mean) for each in measured.points]).T
    columns = [_places(measured.column(key)) for key in keys]
    long = [labels is not None and sum(map(len, labels)) > _LETTERS for _, labels in columns]
    figure, panels = sheet(len(keys), glance, below=0.5 if any(long) and not glance else 0)
    for number, (axes, key, (places, labels)) in enumerate(zip(panels, keys, columns, strict=True)):
        dress(axes, key, "", "" if number % 3 else measured.title, integer=False, ticks=5)
        if number:
            axes.sharey(panels[0])
        for label, which, colour, *_ in measured.groups:
            style = {"mfc": "white" if colour == _LEFT else colour, "color": colour, "label": label + bars}
            axes.scatter(places[whose[which[whose]]], seeds[which[whose]], 12, color=colour, alpha=0.3, lw=0)
            axes.errorbar(places[which], measured.means[which], ends[:, which], fmt="D", ms=5, capsize=3, **style)
        if shared := [place for place in np.unique(places) if (finished & (places == place)).sum() > 1]:
            over = [measured.over(finished & (places == place)) for place in shared]
            axes.plot(shared, over, color=INK, lw=1.2, alpha=0.6, label="mean of the points at a value")
        if labels is not None:
            slope = {"rotation": 20, "ha": "right"} if long[number] else {}
            axes.set_xticks(range(len(labels)), labels, parse_math=False, **slope)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        for name in [*(["x"] if key in logarithmic else []), *(["y"] if measured.is_wide else [])]:
            axes.set(**{f"{name}scale": "log"})
            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
        axes.title.set_parse_math(False)
    finish(figure, path)


def parallel_coordinates(path: Path, measured: Measured, logarithmic: Sequence[str]) -> None:
    """One line a point through all of its settings to its mean, which colours it."""
    from matplotlib.collections import LineCollection

    columns = {key: measured.column(key) for key in measured.points[0].point} | {measured.title: list(measured.means)}
    ends = (beside([name]) / 2 for name in (next(iter(columns)), measured.title))
    figure, (axes,) = panel_figure(1, 1, 1.6 + 1.9 * len(columns), 3.9, (*ends, 0.4, 0.1))
    logarithmic = [*logarithmic, *([measured.title] if measured.is_wide else [])]
    heights = []
    for index, (key, column) in enumerate(columns.items()):
        places, labels = _places(column)
        heights.append(height := _share(np.log(places) if key in logarithmic else places))
        axes.axvline(index, color=FRAME, lw=1, zorder=0)
        texts = map(short, column) if labels is None else labels[places.astype(int)]
        named = dict(zip(height, texts, strict=True))
        wanted = named if labels is not None or len(named) <= _MOST_NAMED else (height.min(), height.max())
        for at in [at for n, at in enumerate(wanted) if all(abs(at - each) > _APART for each in [*wanted][:n])]:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            style = {"fontsize": 7.5, "color": INK, "va": "center", "bbox": box, "zorder": 5, "parse_math": False}
            axes.annotate(named[at], (index, at), xytext=(5, 0), textcoords="offset points", **style)
    colours = measured.colours(measured.means)
    lines = np.stack([np.broadcast_to(np.arange(len(columns)), (len(colours), len(columns))), np.array(heights).T], -1)
    for label, which, colour, width, line in measured.groups:
        drawn = LineCollection(list(lines[which]), colors=colour, linewidths=width, linestyles=line, label=label)
        if label == _POINT:
            drawn.set(colors=colours[which], label=f"{label}, darker if better")
        axes.add_collection(drawn)
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, color=INK, weight="bold", parse_math=False)
    axes.set(yticks=[], xlim=(-0.15, len(columns) - 0.5), ylim=(-0.06, 1.06))
    axes.tick_params(length=0, pad=8)
    axes.spines[:].set_visible(False)
    finish(figure, path)


def phase_diagram(path: Path, measured: Measured, across: str, up: str) -> None:
    """The mean over the plane of two settings, of the finished points, with its number in each cell, and below it the
    95 % interval where a cell is one point with several seeds."""
    (places, columns), (heights, rows) = (_places(measured.column(key)) for key in (across, up))
    levels, lines = np.unique(places), np.unique(heights)
    mean, ends = np.full((len(lines), len(levels)), np.nan), np.full((len(lines), len(levels), 2), np.nan)
    for row, column in np.ndindex(*mean.shape):
        here = measured.finished & (heights == lines[row]) & (places == levels[column])
        if here.any():
            mean[row, column] = measured.over(here)
        if here.sum() == 1:
            point = measured.points[int(here.argmax())]
            ends[row, column] = point.low, point.high
    names = [
        [short(each) for each in (labels if labels is not None else found.tolist())]
        for found, labels in ((levels, columns), (lines, rows))
    ]
    margins = 0.25 + beside(names[1]), *MARGINS[1:]
    figure, (axes,) = panel_figure(1, 1, 1 + margins[0] + 1.25 * len(levels), 1 + 0.7 * len(lines), margins)
    dress(axes, measured.title, across, up)
    axes.grid(visible=False)
    colours = measured.colours(mean)
    colours[~np.isfinite(mean)] = 1
    axes.imshow(colours, origin="lower", aspect="auto")
    best = np.nanmax(mean) if measured.direction == "max" else np.nanmin(mean)
    for (row, column), value in np.ndenumerate(mean):
        ink = "white" if colours[row, column, :3] @ (0.3, 0.6, 0.1) < 0.6 else INK
        text, weight = f"{value:.3g}" if np.isfinite(value) else "–", "bold" if value == best else "normal"
        axes.text(column, row, text, ha="center", va="center", color=ink, weight=weight)
        if np.isfinite(ends[row, column]).all():
            low, high = (f"{end:.3g}" for end in ends[row, column])
            axes.text(column, row - 0.27, f"{low} – {high}", fontsize=6.5, ha="center", va="center", color=ink)
    for axis, labels in zip((axes.xaxis, axes.yaxis), names, strict=True):
        axis.set_ticks(range(len(labels)), labels)
    axes.spines[:].set_visible(False)
    save(figure, path)


def _share(values: np.ndarray) -> np.ndarray:
    """Where each value stands from the smallest, 0, to the largest, 1; of equal ones in the middle."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.asarray((values - low) / (high - low) if high > low else np.full_like(values, 0.5))


def _places(column: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Where values stand on an axis; those that are no numbers stand side by side, with their labels."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        return np.array(column, dtype=float), None
    texts = [value if isinstance(value, str) else exact(value) for value in column]
    labels, places = np.unique(texts, return_inverse=True)
    return places.astype(float), np.array([short(label) for label in labels.tolist()])
