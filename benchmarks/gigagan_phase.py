"""A self-consuming loop in words as a plane: the share of fresh data × the sampling bias, by a GAN.

``python -m benchmarks.gigagan_phase DIRECTORY [KEY=VALUE …]`` runs configs/mad/gigagan_phase.yaml there, or goes on
with it; prints the first and the last generation of every arm, and what is claimed of MAD's first two signatures and
of fresh data, each with its 95 % interval over paired seeds; and draws DIRECTORY/figures/phase.png.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from policies.common.claims import Claim, judge
from policies.common.intervals import interval, scale_of

METRICS = ("fid", "precision", "recall", "prompt_accuracy")
PLAIN, BIASED, FRESH = "0 fresh, bias 1", "0 fresh, bias 0.5", "0.5 fresh, bias 1"
Plane = dict[str, dict[str, np.ndarray]]  # arm → metric → (seeds, generations)


def main(directory: Path, *changes: str) -> None:
    """Run, print, draw."""
    config = load_config(MadConfig, Path("configs/mad/gigagan_phase.yaml"), [f"output_dir={directory}", *changes])
    summary = json.loads(run_mad(config).read_text())
    arms: Plane = {
        name: {metric: np.array(arm["metrics"][metric]["values"]) for metric in METRICS if metric in arm["metrics"]}
        for name, arm in summary["arms"].items()
    }
    count = len(arms) * len(summary["seeds"]) * summary["generations"]
    cpu = sum(value for stage, value in summary["seconds_by_stage"].items() if stage.endswith("/cpu"))
    print(
        f"\ncommit {git_commit()}\n{count} generations, {summary['wall_seconds']:.0f} s wall, {cpu:.0f} CPU s of tasks"
    )
    print(f"{'':<24}" + "".join(f"{metric:>36}" for metric in METRICS))
    for name, metrics in arms.items():
        print(f"{name:<24}" + "".join(f"{_told(metric, metrics.get(metric)):>36}" for metric in METRICS))
    found = {name: _ends(metrics) for name, metrics in arms.items()}
    for claim in CLAIMS:
        held = judge(claim, found)
        print(f"{held.outcome:<10} {claim.sentence}: {held.value:.3f} [{held.low:.3f}, {held.high:.3f}] {held.reason}")
    draw(directory / "figures" / "phase.png", config, arms)


def _told(metric: str, values: np.ndarray | None) -> str:
    if values is None:
        return ""
    mean, low, high = (float(each) for each in interval(values[:, -1], scale_of(metric)))
    return f"{values[:, 0].mean():.3f} → {mean:.3f} [{low:.3f}, {high:.3f}]"


def _ends(metrics: dict[str, np.ndarray]) -> dict[str, Sequence[float]]:
    """What claims speak of, a value a seed: what is left of the first generation's."""
    found = {f"{metric}/left": values[:, -1] / values[:, 0] for metric, values in metrics.items()}
    lasting = {f"{metric}/last": values[:, -1] for metric, values in metrics.items()}
    gap = {"recall/behind": found["precision/left"] - found["recall/left"]}
    return {name: values.tolist() for name, values in (found | lasting | gap).items()}


CLAIMS = [
    Claim("1. without fresh data FID grows twofold at least", "fid/left", PLAIN, "at least", 2, scale="logarithm"),
    Claim("1. precision falls", "precision/left", PLAIN, "at most", 1, scale="logarithm"),
    Claim("1. recall falls", "recall/left", PLAIN, "at most", 1, scale="logarithm"),
    Claim("1. of recall less is left than of precision", "recall/behind", PLAIN, "at least", 0, scale="plain"),
    Claim("2. a bias keeps precision, within 20 %", "precision/left", BIASED, "at least", 1 / 1.2, scale="logarithm"),
    Claim("2. and loses half of recall at least", "recall/left", BIASED, "at most", 0.5, scale="logarithm"),
    Claim(
        "2. with a bias more is lost of recall than of precision", "recall/behind", BIASED, "at least", 0, scale="plain"
    ),
    Claim("half fresh: FID ends below that without fresh data", "fid/last", FRESH, "at most", 1, PLAIN, "ratio"),
    Claim(
        "half fresh: the words keep their meaning", "prompt_accuracy/left", FRESH, "at least", 0.9, scale="logarithm"
    ),
    Claim(
        "without fresh data words lose theirs sooner",
        "prompt_accuracy/last",
        PLAIN,
        "at most",
        0.0,
        FRESH,
        "difference",
    ),
]


def draw(path: Path, config: MadConfig, arms: Plane) -> None:
    """A panel a metric: its value in the last generation, for each share of fresh data and each bias."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    known = {name: (arm.loop.fresh_fraction, arm.loop.sampling_bias) for name, arm in config.resolved_arms.items()}
    shares, biases = (sorted({pair[axis] for pair in known.values()}) for axis in (0, 1))  # type: ignore[type-var]
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(3.1 * len(METRICS), 3.2), layout="constrained")
    for panel, metric in zip(panels, METRICS, strict=True):
        plane = np.full((len(biases), len(shares)), np.nan)
        for name, (share, bias) in known.items():
            if metric in arms[name]:
                mean: Any = interval(arms[name][metric][:, -1], scale_of(metric)).mean
                plane[biases.index(bias), shares.index(share)] = mean
        panel.imshow(plane, origin="lower", cmap="viridis_r" if metric == "fid" else "viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(plane):
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color="white", fontweight="bold")
        panel.set(title=metric, xlabel="fresh share")
        panel.set_xticks(range(len(shares)), [f"{share:g}" for share in shares])
        panel.set_yticks(range(len(biases)), [f"{bias:g}" for bias in biases])
    panels[0].set_ylabel(f"generation {config.generations}: sampling bias λ")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
