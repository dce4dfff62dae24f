"""The picture of a study: what every arm and seed measured."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pipelines.figures.style import arm_looks, dress, finish, sheet
from pipelines.storage.atomic import packed
from policies.common.intervals import Scale, interval, scale_of


def arm_values(
    path: Path,
    metrics: Mapping[str, Mapping[str, np.ndarray]],
    scale: Callable[[str], Scale] = scale_of,
    glance: bool = False,
) -> None:
    """Write a PNG with a panel for each of ``metrics``: metric → arm → (seeds,). Seeds are dots; means and intervals
    are on the metric's ``scale``."""
    looks = arm_looks(name for arms in metrics.values() for name in arms)
    figure, panels = sheet(len(metrics), glance)
    for axes, (metric, arms) in zip(panels, metrics.items(), strict=True):
        dress(axes, metric, "")
        for place, (name, values) in enumerate(arms.items()):
            mean, low, high = interval(values, scale(metric))
            colour, marker = looks[name]["color"], looks[name]["marker"]
            axes.scatter(np.full(len(values), place), values, 18, color=colour, alpha=0.35, lw=0)
            ends = [[mean - low], [high - mean]]
            axes.errorbar([place], [mean], ends, fmt=marker, ms=5, capsize=4, color=colour, label=name)
        axes.set_xticks([])
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.title.set_parse_math(False)
    finish(figure, path)


def courses(curves: Mapping[str, Mapping[float, float]], title: str, below: str) -> bytes:
    """A PNG of shares by a number that ``below`` names: name → number → share."""
    figure, (axes,) = sheet(1)
    dress(axes, title, below, integer=False)
    for name, look in arm_looks(curves).items():
        axes.plot(*zip(*sorted(curves[name].items()), strict=True), ms=4, label=name, **look)
    axes.set_ylim(-0.03, 1.03)
    return packed(lambda directory: finish(figure, directory / "courses.png"))["courses.png"]
