"""The pictures of a self-consuming experiment, from plain arrays: curves, trajectories, samples and class shares.

A colour belongs to an arm, in the order of first appearance. Bands and bars are 95 % intervals over seeds; nan leaves a
gap. Generations count from 1. Equal input gives equal bytes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.figures import style
from pipelines.figures.plots import image_grid
from pipelines.figures.style import DPI, FAINT, FRAME, INK, LINES, dress, finish, panel_figure, save
from policies.common.intervals import Scale, interval, scale_of

_BLUE = LINES["blue"]
_MOST_PIXELS = 1600  # in a row of images
_LETTERS = 17  # of a row's label, in a line
_FLOOR = {"color": FAINT, "linestyle": ":", "linewidth": 1.4, "label": "real against real"}
_Arms = Mapping[str, np.ndarray]


def arm_curves(
    path: Path,
    curves: Mapping[str, _Arms],
    laws: Mapping[str, _Arms],
    floors: Mapping[str, float],
    titles: Mapping[str, str],
    glance: bool = False,
) -> None:
    """Write a PNG with a panel for each metric of ``curves``: metric → arm → (seeds, generations).

    ``laws`` (metric → arm → (generations,)) are dashed over the means, ``floors`` (metric → what real data scores
    against real data) dotted; ``titles`` head the panels.
    """
    from matplotlib.colors import to_rgb

    looks = style.arm_looks(name for metric in curves for name in (*curves[metric], *laws.get(metric, {})))
    figure, panels = style.sheet(len(curves), glance)
    for axes, (metric, arms) in zip(panels, curves.items(), strict=True):
        dress(axes, titles.get(metric, metric), "generation")
        bands = {}
        for name, values in arms.items():
            mean, *bands[name] = interval(values, scale_of(metric))
            x, few = np.arange(1, len(mean) + 1), max(1, len(mean) // 12)
            axes.plot(x, mean, **looks[name], markevery=few, ms=3.5, label=name, lw=1.8)
        for name, law in laws.get(metric, {}).items():
            darker = 0.55 * np.array(to_rgb(looks[name]["color"]))
            axes.plot(np.arange(1, len(law) + 1), law, "--", color=darker, lw=1.2, label="exact law")
        if metric in floors:
            axes.axhline(floors[metric], **_FLOOR)
        _draw_bands(axes, bands, looks)
    finish(figure, path)


def precision_recall_paths(path: Path, paths: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a PNG of each arm's way through the recall–precision plane: arm → precision, recall (seeds, generations).

    Lines are means over seeds on the scale of shares, as everywhere else, their dots grow with the generation; single
    seeds are faint.
    """
    looks = style.arm_looks(paths)
    figure, (axes,) = panel_figure(1, 1, 5.6, 4.9)
    dress(axes, "from the first generation (○) to the last (●)", "recall", "precision", integer=False)
    axes.grid(axis="x", color="#e8ebf0", linewidth=0.8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    for name, (precision, recall) in paths.items():
        seeds = np.stack([recall, precision])
        x, y = (interval(each, scale_of("precision")).mean for each in seeds)
        colour, dashes = looks[name]["color"], looks[name]["linestyle"]
        axes.plot(*seeds.swapaxes(1, 2), color=colour, lw=0.7, alpha=0.25)
        axes.plot(x, y, color=colour, linestyle=dashes, lw=1.6, label=name)
        axes.scatter(x[1:], y[1:], np.linspace(4, 34, len(x))[1:], color=colour, lw=0, zorder=3)
        axes.scatter(x[:1], y[:1], 26, facecolors="white", edgecolors=colour, lw=1.6, zorder=4)
    finish(figure, path)


def fresh_fraction_curve(
    path: Path, fractions: np.ndarray, final: np.ndarray, floor: float | None, metric: str, scale: Scale
) -> None:
    """Write a PNG of the last generation's distance ``final`` (seeds, k) against the fresh fractions (k,), in order;
    ``scale`` is that of its seeds."""
    mean, low, high = interval(final, scale)
    figure, (axes,) = panel_figure(1, 1, 5.6, 3.6)
    dress(axes, f"{metric} of the last generation", "fresh real data in a training set", integer=False)
    axes.xaxis.set_major_formatter("{x:.0%}")
    bars = (mean - low, high - mean)
    axes.errorbar(fractions, mean, bars, fmt="o-", ms=4, capsize=3, color=_BLUE, label="mean, 95 % interval")
    axes.scatter(np.tile(fractions, len(final)), final, 18, color=_BLUE, alpha=0.3, lw=0, label="one seed")
    if floor is not None:
        axes.axhline(floor, **_FLOOR)
    axes.set_ylim(bottom=0)
    finish(figure, path)


def generations_grid(
    path: Path, images: np.ndarray, labels: Sequence[str], above: Sequence[str] = (), glance: bool = False
) -> None:
    """Write a PNG of uint8 ``images`` (rows, columns, height, width, 1 or 3), a label a row, by :func:`image_grid`;
    what stands ``above`` the columns is theirs, else each is one latent seed. Large images are reduced."""
    few = -(-images.shape[1] * images.shape[3] // _MOST_PIXELS)
    images = images[:, :, : images.shape[2] // few * few, : images.shape[3] // few * few]
    images = images.reshape(*images.shape[:2], images.shape[2] // few, few, -1, few, images.shape[4]).mean((3, 5))
    grid = image_grid(images.astype(np.uint8).reshape(-1, *images.shape[2:]), images.shape[1])
    wrapped = [textwrap.fill(label, _LETTERS, max_lines=4, placeholder=" …") for label in labels]
    over = 0.17 if glance else 0.3 + 0.15 * max((label.count("\n") for label in above), default=0)
    margins = left, right, below, _ = style.beside(wrapped), 0.08, 0 if glance else 0.08, over
    height, width = np.array(grid.shape[:2]) * (0.53 if glance else 1) / DPI
    figure, (axes,) = panel_figure(1, 1, left + width + right, below + height + over, margins, glance)
    axes.imshow(grid)
    if not above:
        axes.set_title("each column: one latent seed", fontsize=8, color=FAINT)
    axes.set_xticks((np.arange(len(above)) + 0.5) * grid.shape[1] / max(1, len(above)), above, fontsize=8, color=INK)
    places = (np.arange(len(labels)) + 0.5) * len(grid) / len(labels)
    axes.set_yticks(places, wrapped, fontsize=8, color=INK, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, path)


def points_grid(path: Path, points: Mapping[str, np.ndarray], reference: np.ndarray) -> None:
    """Write a PNG with a panel for each label of ``points`` (n, 2), over the ``reference`` (n, 2) in grey.

    All panels show one square, which holds 99 % of all coordinates.
    """
    figure, panels = panel_figure(len(points), 5, 2.1, 2.3, (0.08, 0.08, 0.08, 0.28))
    low, high = np.percentile(np.vstack([reference, *points.values()]), (0.5, 99.5))
    view = (low - 0.08 * (high - low), high + 0.08 * (high - low))
    for axes, (label, cloud) in zip(panels, points.items(), strict=True):
        axes.set(xticks=[], yticks=[], xlim=view, ylim=view, aspect="equal")
        axes.set_title(label, loc="left", fontsize=9, color=INK, weight="bold", pad=4)
        axes.spines[:].set_color(FRAME)
        for name, dots, colour in (("real", reference, FAINT), ("generated", cloud, _BLUE)):
            size = np.clip(4000 / len(dots), 1.5, 8)
            axes.scatter(*dots.T, s=size, color=colour, alpha=0.5, linewidths=0, label=name)
    finish(figure, path, markerscale=2)


def class_heatmap(path: Path, shares: np.ndarray) -> None:
    """Write a PNG of the classes' ``shares`` (generations, classes)."""
    extent = (0.5, shares.shape[0] + 0.5, -0.5, shares.shape[1] - 0.5)
    figure, (axes,) = panel_figure(1, 1, 5.6, min(0.9 + 0.26 * shares.shape[1], 7))
    dress(axes, "share of each class", "generation", "class")
    axes.grid(visible=False)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=20)
    picture = axes.imshow(shares.T, "Blues", aspect="auto", interpolation="none", origin="lower", extent=extent, vmin=0)
    bar = figure.colorbar(picture, format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=8, length=0)
    save(figure, path)


def _draw_bands(axes: Any, bands: Mapping[str, Sequence[np.ndarray]], looks: Mapping[str, Any]) -> None:
    """Fill the intervals. The view makes room for them, but at most its own height above and below."""
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(axes.get_ylim())
    for name, band in bands.items():
        x, label = np.arange(1, len(band[0]) + 1), "" if np.isnan(band).all() else "95 % interval over seeds"
        axes.fill_between(x, *band, color=looks[name]["color"], alpha=0.14, lw=0, label=label)
    lowest, highest = scale.transform(axes.get_ylim())
    axes.set_ylim(*scale.inverted().transform((max(lowest, 2 * low - high), min(highest, 2 * high - low))))
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
