"""Which reward teaches the most? Each on the digits at equal images, judged by the evaluator, which none of them knows.

``python -m benchmarks.rewards [DIRECTORY]`` trains with each reward and three seeds on 30 steps of
configs/ddpo/digits.yaml, or goes on where it was interrupted, prints the held-out accuracy against reward queries and
its rise per 1,000 queries, and draws it to DIRECTORY/rewards.png.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.arms import SEEDS, curves, draw, table

REWARDS = ("sentence_cosine", "bertscore_recall", "bertscore_f1", "strict", "jpeg_compressibility")
RUN = ["training.steps=30", "evaluation.every=5", "evaluation.images=540", "evaluation.interim_images=540"]


def main(directory: Path) -> None:
    """Train what is missing, print, draw."""
    arms = {name: [f"reward.function={name}"] for name in REWARDS}
    found = curves(directory, Path("configs/ddpo/digits.yaml"), RUN, arms)
    table(found)
    print(f"\nrise of the accuracy per 1,000 reward queries, median of {SEEDS} seeds [each]")
    for name, runs in found.items():
        queries = 256 * (runs[0][-1]["step"] - runs[0][0]["step"])
        rises = [1000 * (lines[-1]["evaluator/full"] - lines[0]["evaluator/full"]) / queries for lines in runs]
        print(f"{name:<22}{np.median(rises):+.4f} [{', '.join(f'{rise:+.4f}' for rise in rises)}]")
    draw(directory / "rewards.png", {name: (found, name, "evaluator/full") for name in REWARDS}, "digits")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rewards"))
