"""The signatures of self-consuming loops (MAD, 2307.01850) on images, held against an experiment that shows them.

``python -m benchmarks.mad_signatures [CONFIG] [DIRECTORY]`` runs the experiment, or goes on with it, and prints what it
finds beside what is expected, with 95 % intervals over paired seeds, and the CPU seconds of each generation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.experiments.mad.analysis import limit
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from policies.common.intervals import interval, paired_ratio

SAME = 1.2  # a ratio within 20 % either way counts as the same level


def main(config: Path, directory: Path) -> int:
    """Run, print, and return how many signatures are missing."""
    summary = json.loads(run_mad(load_config(MadConfig, config, [f"output_dir={directory}"])).read_text())
    arms = {name: arm["metrics"] for name, arm in summary["arms"].items()}
    print(f"\ncommit {git_commit()}\n{summary['wall_seconds']:.0f} s wall, {len(summary['seeds'])} seeds")
    print(f"\n{'arm':<32}{'metric':<12}" + "".join(f"{'G' + str(g + 1):>8}" for g in range(summary["generations"])))
    for name, metrics in arms.items():
        for metric in ("fid", "precision", "recall"):
            print(f"{name:<32}{metric:<12}" + "".join(f"{value:8.3f}" for value in metrics[metric]["mean"]))
    print(f"{'real against real':<32}{summary['floor']}")
    print("\nmean CPU seconds of a task, by generation")
    for kind, seconds in summary["seconds_by_generation"].items():
        print(f"{kind:<32}{'':<12}" + "".join(f"{value:8.2f}" for value in seconds))
    total = {
        stage: f"{seconds:.0f}" for stage, seconds in summary["seconds_by_stage"].items() if stage.endswith("/cpu")
    }
    print(f"in all {total}\n")
    kept = [*signatures({name: {m: np.array(v["values"]) for m, v in arm.items()} for name, arm in arms.items()})]
    for good, text in kept:
        print(f"{'kept' if good else 'MISSED':<8}{text}")
    return sum(not good for good, _ in kept)


def signatures(arms: dict[str, dict[str, np.ndarray]]) -> Any:
    """(whether it shows, what was found) for each signature whose arms are there."""
    plain = arms["fully synthetic"]
    _, above, _ = interval(plain["fid"][:, -1], "logarithm")
    apart = f"against fully synthetic's from {above:.2f} on, apart expected"

    growth, low, high = paired_ratio(plain["fid"][:, -1], plain["fid"][:, 0])
    yield low > 2, f"1. fully synthetic: FID grows {growth:.2f}-fold [{low:.2f}, {high:.2f}], several-fold expected"
    for metric in ("precision", "recall"):
        change, low, high = interval(plain[metric][:, -1] - plain[metric][:, 0])
        text = f"{metric} changes by {change:+.3f} [{low:+.3f}, {high:+.3f}], a fall expected"
        yield high < 0, f"1. fully synthetic: {text}"

    for name, biased in arms.items():
        if name.startswith("fully synthetic, "):
            change, low, high = interval(biased["precision"][:, -1] - biased["precision"][:, 0])
            text = f"2. {name}: precision changes by {change:+.3f} [{low:+.3f}, {high:+.3f}]"
            ratio, low, high = paired_ratio(biased["precision"][:, -1], biased["precision"][:, 0])
            yield low > 1 / SAME, f"{text}, {ratio:.3f} [{low:.3f}, {high:.3f}]-fold; no fall by 20 % expected"
            share, low, high = interval(np.minimum(biased["recall"][:, -1] / biased["recall"][:, 0], 1), "share")
            yield (
                high < 0.5,
                f"2. {name}: {share:.3f} [{low:.3f}, {high:.3f}] of the recall is left, a collapse expected",
            )

    if "augmentation" in arms:
        fid = arms["augmentation"]["fid"]
        worse, low, high = paired_ratio(fid[:, -1], fid[:, 0])
        text = f"{worse:.2f} [{low:.2f}, {high:.2f}] times generation 1's, worse expected"
        yield low > 1, f"3. augmentation: FID {text}"
        _, low, high = interval(fid[:, -1], "logarithm")
        yield high < above, f"3. augmentation: final FID [{low:.2f}, {high:.2f}] {apart}"

    if "fresh, small n_ini" in arms:
        small, large = arms["fresh, small n_ini"]["fid"], arms["fresh, large n_ini"]["fid"]
        ratio, low, high = paired_ratio(limit(small), limit(large))
        text = f"{ratio:.3f} [{low:.3f}, {high:.3f}], within 20 % expected"
        yield 1 / SAME < ratio < SAME, f"4. fresh data: final FID from a small over a large n_ini {text}"
        _, low, high = interval(limit(large), "logarithm")
        yield high < above, f"4. fresh data: final FID [{low:.2f}, {high:.2f}] {apart}"


if __name__ == "__main__":
    chosen = [Path(argument) for argument in sys.argv[1:]]
    defaults = [Path("configs/mad/digits.yaml"), Path("runs/mad-digits")]
    sys.exit(main(*chosen, *defaults[len(chosen) :]))
