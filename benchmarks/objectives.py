"""Every objective on the digits at equal images: what a reward query teaches.

``python -m benchmarks.objectives [DIRECTORY]`` trains each objective with three seeds on 30 steps of
configs/ddpo/digits.yaml (one process, no Ray), or goes on where it was interrupted, prints the held-out accuracy
against reward queries, and draws it to DIRECTORY/objectives.png. Each objective has the settings that it does best with
among those tried (docs/algorithms.md).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.one_process import told, train
from orchestration.config import DdpoConfig, load_config
from orchestration.run import git_commit

SETTINGS = {
    "importance_sampling": [],
    "score_function": ["training.updates_per_step=1", "training.learning_rate=2e-4"],
    "negative_aware": ["training.learning_rate=3e-4"],
    "reward_weighted": ["training.objective_beta=3.0"],
}
LABELS = {
    "importance_sampling": "DDPO_IS",
    "score_function": "DDPO_SF",
    "negative_aware": "DiffusionNFT",
    "reward_weighted": "RWR",
}
SEEDS = 3
RUN = ["training.steps=30", "evaluation.every=5", "evaluation.images=540", "evaluation.interim_images=540"]


def main(directory: Path) -> None:
    """Train what is missing, print, draw."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in SETTINGS}
    for seed in range(SEEDS):
        for objective, own in SETTINGS.items():
            keys = [f"training.objective={objective}", f"seed={seed}", *RUN, *own]
            config = load_config(DdpoConfig, Path("configs/ddpo/digits.yaml"), keys)
            curves[objective].append(curve(directory / f"{objective}-{seed}.jsonl", config))
    print(
        f"commit {git_commit()}\nheld-out accuracy by an independent evaluator, mean of {SEEDS} seeds (lowest, highest)"
    )
    steps = [line["step"] for line in curves["importance_sampling"][0]]
    print(f"{'images':>8}  " + "".join(f"{LABELS[name]:<24}" for name in SETTINGS))
    for row, step in enumerate(steps):
        values = {name: [lines[row]["evaluator/full"] for lines in curves[name]] for name in SETTINGS}
        cells = [f"{np.mean(v):.3f} ({min(v):.3f}, {max(v):.3f})" for v in values.values()]
        print(f"{256 * step:>8}  " + "".join(f"{cell:<24}" for cell in cells))
    costs = {name: np.median([lines[-1]["cpu_seconds"] for lines in curves[name]]) for name in SETTINGS}
    print("CPU s     " + "".join(f"{cost:<24.0f}" for cost in costs.values()))
    draw(directory / "objectives.png", steps, curves)


def curve(record: Path, config: DdpoConfig) -> list[dict[str, Any]]:
    """The evaluations of one run, trained unless they are on record."""
    if not record.exists():
        lines = []
        for line in train(config):
            print(f"{record.stem:<24}{told(line)}", flush=True)
            lines.append(line)
        record.write_text(json.dumps({"commit": git_commit(), "lines": lines}))
    kept: list[dict[str, Any]] = json.loads(record.read_text())["lines"]
    return kept


def draw(path: Path, steps: list[int], curves: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Mean and range of the seeds against reward queries."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    queries = [256 * step for step in steps]
    for name, runs in curves.items():
        values = np.array([[line["evaluator/full"] for line in lines] for lines in runs])
        (drawn,) = axes.plot(queries, values.mean(axis=0), label=LABELS[name])
        axes.fill_between(queries, values.min(axis=0), values.max(axis=0), alpha=0.2, color=drawn.get_color())
    axes.set(xlabel="reward queries", ylabel="held-out accuracy", title=f"digits, {SEEDS} seeds")
    axes.legend(loc="lower right", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/objectives"))
