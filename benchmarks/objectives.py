"""Every objective on the digits at equal images: what a reward query teaches.

``python -m benchmarks.objectives [DIRECTORY]`` trains each objective with three seeds on 30 steps of
configs/ddpo/digits.yaml, or goes on where it was interrupted, prints the held-out accuracy against reward queries, and
draws it to DIRECTORY/objectives.png. Each objective has the settings that it does best with among those tried
(docs/algorithms.md).
"""

import sys
from pathlib import Path

from benchmarks.arms import curves, draw, table

ARMS = {
    "importance_sampling": [],
    "score_function": ["training.updates_per_step=1", "training.learning_rate=2e-4"],
    "negative_aware": ["training.learning_rate=3e-4"],
    "reward_weighted": ["training.objective={reward_weighted: 3.0}"],
}
LABELS = {
    "importance_sampling": "DDPO_IS",
    "score_function": "DDPO_SF",
    "negative_aware": "DiffusionNFT",
    "reward_weighted": "RWR",
}
RUN = ["training.steps=30", "evaluation.every=5", "evaluation.images=540", "evaluation.interim_images=540"]


def main(directory: Path) -> None:
    """Train what is missing, print, draw."""
    arms = {name: [f"training.objective={name}", *own] for name, own in ARMS.items()}
    found = curves(directory, Path("configs/ddpo/digits.yaml"), RUN, arms)
    table(found)
    named = {label: (found, name, "evaluator/full") for name, label in LABELS.items()}
    draw(directory / "objectives.png", named, "digits")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/objectives"))
