"""Do keypoints of what is drawn move when a model goes on learning?

    python -m benchmarks.keypoint_drift TOKENS BEFORE AFTER… [--only "(yellow|orange) .* black"] [--images 6]

TOKENS is a product of the study of keypoints. BEFORE and AFTER are diffusers directories or finished runs of
reinforcement. They draw the same prompts from the same noise, so that images
can be held against one another one by one: ``moved`` is the mean distance in pixels between their keypoints, beside
that of two images of one prompt by BEFORE from other noise (``other noise``). ``shifted`` is how far the mean place of
a keypoint has gone, beside the same of other noise, and ``variety`` the root mean square distance of keypoints from
their mean places, the whole figure's place taken out. ``check`` is how far keypoints are from where they should be in
the same images, moved by one pixel: what less than that says is noise. 95 % intervals over seeds of the noise.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from orchestration.runs.manifest import git_commit
from pipelines.data.prompts import read_prompts
from pipelines.denoisers import load_family
from pipelines.keypoints import Keypoints
from pipelines.studies.distil import draw
from policies.common.intervals import interval


def drawn(path: Path, asked: Sequence[str], seed: int, steps: int) -> np.ndarray:
    """What a pipeline, or the result of a run, draws of prompts: uint8 (n, height, width, 3)."""
    at = path / "pipeline" if (path / "manifest.json").is_file() else path
    pipeline = load_family(str(at), torch.float32).pipeline
    return draw(pipeline, asked, seed, num_inference_steps=steps, eta=1.0, guidance_scale=1.0)


def variety(points: np.ndarray) -> float:
    """Of keypoints (n, keypoints, 2): how much figures differ, wherever they stand."""
    shape = points - points.mean(axis=1, keepdims=True)
    return float(np.sqrt(((shape - shape.mean(axis=0)) ** 2).sum(axis=2).mean()))


def shift(points: np.ndarray, before: np.ndarray) -> float:
    """Mean distance between the mean places of keypoints."""
    return float(np.linalg.norm(points.mean(axis=0) - before.mean(axis=0), axis=1).mean())


def told(values: Sequence[float]) -> str:
    mean, low, high = interval(np.array(values))
    return f"{mean:5.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Print a line for each of AFTER."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="+")
    parser.add_argument("--prompts", default="configs/prompts/digits.txt")
    parser.add_argument("--only", default=".", help="a regular expression that prompts are to hold")
    parser.add_argument("--images", type=int, default=6, help="of each prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of DDIM, at η = 1")
    given = parser.parse_args()
    find = Keypoints(given.tokens)
    asked = [each for each in read_prompts(given.prompts)[0] if re.search(given.only, each)] * given.images
    prompts = len(asked) // given.images
    print(f"commit {git_commit()}; {given.images} images of {prompts} prompts, {given.seeds} seeds; in pixels")
    known, other, check = [], [], []
    for seed in range(given.seeds):
        images = drawn(given.before, asked, seed, given.steps)
        known.append(find(images))
        other.append(find(drawn(given.before, asked, 1000 + seed, given.steps)))
        aside = np.concatenate([images[:, :, :1], images[:, :, :-1]], axis=2)
        check.append(float(np.linalg.norm(find(aside) - known[-1] - [1, 0], axis=2).mean()))
    print(f"check {told(check)}")

    def line(name: str, found: Sequence[np.ndarray]) -> None:
        pairs = list(zip(found, known, strict=True))
        moved = told([float(np.linalg.norm(a - b, axis=2).mean()) for a, b in pairs])
        shifted, varied = told([shift(a, b) for a, b in pairs]), told([variety(a) / variety(b) for a, b in pairs])
        print(f"{name}: moved {moved}, shifted {shifted}, variety {varied} of before")

    line("other noise", other)
    for path in given.after:
        line(str(path), [find(drawn(path, asked, seed, given.steps)) for seed in range(given.seeds)])


if __name__ == "__main__":
    main()
