"""Does a run learn its prompts, or what they ask for? Combinations of digit, ink and ground that were never trained on.

``python -m benchmarks.generalisation [DIRECTORY]`` trains the demonstration with three seeds on 144 of the 180
combinations (configs/prompts/digits_unseen.txt), or goes on where it was interrupted, prints the accuracy on those and
on the other 36 apart, and draws both to DIRECTORY/generalisation.png.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.arms import curves, draw, table

RUN = ["prompts=configs/prompts/digits_unseen.txt", "evaluation.every=10", "evaluation.interim_images=1080"]
PARTS = {"trained on": "seen/full", "never trained on": "unseen/full"}


def main(directory: Path) -> None:
    """Train what is missing, print, draw."""
    found = curves(directory, Path("configs/ddpo/digits.yaml"), RUN, {"digits": []})
    for measure in PARTS.values():
        table(found, measure)
    for label, measure in PARTS.items():
        gains = [lines[-1][measure] - lines[0][measure] for lines in found["digits"]]
        print(f"gain, {label:<18}{np.mean(gains):+.3f} [{', '.join(f'{gain:+.3f}' for gain in gains)}]")
    draw(directory / "generalisation.png", {label: (found, "digits", each) for label, each in PARTS.items()}, "digits")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/generalisation"))
