"""A small CLIPModel of the digits: ``python -m benchmarks.small_clip DIRECTORY [--seed 0] [--steps 2500]`` trains
it and prints its zero-shot accuracy on digits that nothing was trained on."""

import argparse
import sys
import time
from pathlib import Path

import torch

from orchestration.runs.manifest import git_commit
from pipelines.default_models.clip import build_clip

WANTED = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    found = build_clip(given.directory, given.seed, given.steps)
    told = "  ".join(f"{slot} {share:.3f}" for slot, share in found.items())
    print(f"commit {git_commit()}\nzero-shot on the test split: {told}; {time.process_time() - begun:.0f} CPU s")
    print(f"{'kept  ' if found['full'] >= WANTED else 'BROKEN'}  at least {WANTED} in full")
    sys.exit(0 if found["full"] >= WANTED else 1)


if __name__ == "__main__":
    main()
