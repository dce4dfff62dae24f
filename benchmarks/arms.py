"""Runs that differ in a few settings, side by side at equal images.

Each is trained with some seeds in one process, without Ray, unless it is on record: interrupted, it goes on with what
is missing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.one_process import told, train
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit

SEEDS = 3
Curves = dict[str, list[list[dict[str, Any]]]]  # arm → seed → evaluations


def curves(directory: Path, config: Path, common: Sequence[str], arms: Mapping[str, Sequence[str]]) -> Curves:
    """The evaluations of ``config`` with the settings ``common`` and each arm's own."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    found: Curves = {name: [] for name in arms}
    for seed in range(SEEDS):
        for name, own in arms.items():
            settings = load_config(DdpoConfig, config, [*common, *own, f"seed={seed}"])
            found[name].append(_curve(directory / f"{name}-{seed}.jsonl", settings))
    return found


def table(found: Curves, measure: str = "evaluator/full") -> None:
    """Print the measure against images, and what each arm cost."""
    steps = [line["step"] for line in next(iter(found.values()))[0]]
    print(f"commit {git_commit()}\n{measure} of held-out images, mean of {SEEDS} seeds (lowest, highest)")
    print(f"{'images':>8}  " + "".join(f"{name:<24}" for name in found))
    for row, step in enumerate(steps):
        values = {name: [lines[row][measure] for lines in runs] for name, runs in found.items()}
        cells = [f"{np.mean(v):.3f} ({min(v):.3f}, {max(v):.3f})" for v in values.values()]
        print(f"{256 * step:>8}  " + "".join(f"{cell:<24}" for cell in cells))
    costs = {name: np.median([lines[-1]["cpu_seconds"] for lines in runs]) for name, runs in found.items()}
    print("CPU s     " + "".join(f"{cost:<24.0f}" for cost in costs.values()))


def draw(path: Path, found: Mapping[str, tuple[Curves, str, str]], title: str) -> None:
    """Mean and range of the seeds against reward queries; ``found``: label → curves, arm, measure."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for label, (runs, arm, measure) in found.items():
        values = np.array([[line[measure] for line in lines] for lines in runs[arm]])
        queries = [256 * line["step"] for line in runs[arm][0]]
        (drawn,) = axes.plot(queries, values.mean(axis=0), label=label)
        axes.fill_between(queries, values.min(axis=0), values.max(axis=0), alpha=0.2, color=drawn.get_color())
    axes.set(xlabel="reward queries", ylabel="held-out accuracy", title=f"{title}, {SEEDS} seeds")
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)


def _curve(record: Path, config: DdpoConfig) -> list[dict[str, Any]]:
    if not record.exists():
        lines = []
        for line in train(config):
            print(f"{record.stem:<24}{told(line)}", flush=True)
            lines.append(line)
        record.write_text(json.dumps({"commit": git_commit(), "lines": lines}))
    kept: list[dict[str, Any]] = json.loads(record.read_text())["lines"]
    return kept
