"""The picture of a study: what every arm and seed measured."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.figures.style import arm_colours, dress, finish, panel_figure
from policies.common.intervals import Scale, interval, scale_of


def arm_values(
    path: Path, metrics: Mapping[str, Mapping[str, np.ndarray]], scales: Mapping[str, Scale] | None = None
) -> None:
    """Write a PNG with a panel for each of ``metrics``: metric → arm → (seeds,). Seeds are dots; means and intervals
    are on the metric's own scale, unless ``scales`` has another."""
    colours = arm_colours(name for arms in metrics.values() for name in arms)
    figure, panels = panel_figure(len(metrics), 3, 4.3, 2.9)
    for axes, (metric, arms) in zip(panels, metrics.items(), strict=True):
        dress(axes, metric, "")
        for place, (name, values) in enumerate(arms.items()):
            mean, low, high = interval(values, (scales or {}).get(metric, scale_of(metric)))
            axes.scatter(np.full(len(values), place), values, 18, color=colours[name], alpha=0.35, lw=0)
            ends = [[mean - low], [high - mean]]
            axes.errorbar([place], [mean], ends, fmt="D", ms=5, capsize=4, color=colours[name], label=name)
        axes.set_xticks([])
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.title.set_parse_math(False)
    finish(figure, path)
