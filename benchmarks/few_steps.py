"""Images per CPU second of samplers of few steps, beside how many show what was asked for, and how much they differ.

    python -m benchmarks.few_steps [--distilled DIRECTORY] [--images 540] [--rounds 5]

On the default models, one thread, calls of 90 images. ``DIRECTORY`` is a product of the study ``distil``, of the same
model. Ways alternate; CPU seconds are medians, of drawing and decoding; the judge takes no part. Then: how far from
the latents of all steps those are that coarser steps lead to from the same noise, by DPM-Solver++ and by DDIM.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

from actors.worker import keep_memory
from benchmarks.shared_pipelines import DIGITS
from orchestration.experiments.ddpo.evaluation import diversity, fixed_work
from orchestration.runs.manifest import git_commit
from pipelines.data.digits import all_prompts
from pipelines.measures.evaluator import load_evaluator
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.diffusion.schedule import Schedule
from policies.rl.settings import SamplingSettings

CALL = 90
WAYS: dict[str, dict[str, object]] = {
    "DDIM, 20 steps, guidance 2": {"steps": 20, "guidance_scale": 2.0},
    "DDIM, 10 steps, the demonstration's": {"steps": 10},
    "DDIM, 10 steps, noise in the first three": {"steps": 10, "eta": (1.0, 0.0, 0.3)},
    "the same, the others in three by DPM-Solver++": {"steps": (10, 3), "eta": (1.0, 0.0, 0.3)},
    "the same, in two": {"steps": (10, 2), "eta": (1.0, 0.0, 0.3)},
    "noise in the first two, the others in one": {"steps": (10, 1), "eta": (1.0, 0.0, 0.2)},
    "DDIM, 5 steps, noise in the first": {"steps": 5, "eta": (1.0, 0.0, 0.2)},
    "DDIM, 10 steps, cache [2, 0]": {"steps": 10, "cache": (2, 0)},
    "DDIM, 3 steps, noise in the first": {"steps": 3, "eta": (1.0, 0.0, 0.34)},
    "DDIM, 2 steps": {"steps": 2},
    "consistency, 2 calls": {"method": "consistency", "steps": 2},
}
DISTILLED = {f"distilled, {calls} calls": {"steps": calls} for calls in (1, 2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distilled", type=Path)
    parser.add_argument("--images", type=int, default=540)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    judge = load_evaluator(DIGITS.parent / "evaluator")
    prompts, seeds = fixed_work(all_prompts(), given.images)
    policies = {name: _policy(DIGITS, how) for name, how in WAYS.items()}
    if given.distilled:
        policies |= {name: _policy(given.distilled, dict(how)) for name, how in DISTILLED.items()}
    spent: dict[str, list[float]] = {name: [] for name in policies}
    drawn: dict[str, np.ndarray] = {}
    for _ in range(given.rounds):
        for name, policy in policies.items():
            started = time.process_time()
            parts = [slice(first, first + CALL) for first in range(0, len(prompts), CALL)]
            drawn[name] = np.concatenate([policy.rollout(prompts[part], seeds[part])[0] for part in parts])
            spent[name].append(time.process_time() - started)
    base = given.images / median(spent["DDIM, 10 steps, the demonstration's"])
    print(f"commit {git_commit()}: {given.images} images, medians of {given.rounds}")
    for name, images in drawn.items():
        rate, accuracy = given.images / median(spent[name]), judge.judge(images, prompts)["full"].mean()
        spread = f"accuracy {accuracy:.3f}, diversity {diversity(images, prompts) or 0:.3f}"
        print(f"{name:<44}{rate:8.0f} images a CPU second  {rate / base:5.2f}×   {spread}")

    noisy = _policy(DIGITS, {"steps": 10, "eta": (1.0, 0.0, 0.3)})
    whole = _latents(noisy, prompts, seeds)
    print("mean square of what the final latents are off by, behind noise in three of ten steps")
    for few in (4, 3, 2):
        coarse = noisy.by(SamplingSettings(steps=(10, few), eta=(1.0, 0.0, 0.3)))
        second = (_latents(coarse, prompts, seeds) - whole).square().mean()
        with patch.object(Schedule, "second_order", lambda _, latents, output, *others: output):
            first = (_latents(coarse, prompts, seeds) - whole).square().mean()
        print(f"the other seven in {few}: DPM-Solver++ {second:.4f}, DDIM {first:.4f}")


def _latents(policy: DiffusionPolicy, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    parts = [slice(first, first + CALL) for first in range(0, len(prompts), CALL)]
    return torch.cat([policy.denoise(prompts[part], seeds[part])[0] for part in parts])


def _policy(path: Path, how: dict[str, object]) -> DiffusionPolicy:
    return DiffusionPolicy(ModelSettings(path=str(path)), SamplingSettings(**how))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
