"""Whether less work gives the same reward: CPU seconds until the accuracy has risen by .15, of DDPO_IS on the digits.

    python -m benchmarks.less_work [--out runs/less-work] [--seeds 2] [--only WORDS ...]

Shares and windows of the timesteps, noise in some of them alone, fewer steps, images per prompt, and prompts drawn by
how much their rewards vary (a prompt's chance is its rewards' deviation over the last steps; unseen ones go first),
each against the demonstration's own settings but all timesteps. One thread; judging is not counted. What is on record
is not run again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from actors.worker import keep_memory
from benchmarks.rise import RISE, Curve, Record, evaluations, seconds_to_rise
from orchestration.runs.manifest import git_commit
from policies.common.seeding import PromptSchedule, derive_seed
from policies.rl.advantages import PromptStatistics

CONFIG, STEPS = Path("configs/ddpo/digits.yaml"), 40
FAST = ["training.learning_rate=3e-4", "training.clip_range=6e-4"]
ARMS: dict[str, list[str]] = {
    "all timesteps": ["training.timestep_fraction=1.0"],
    "half of them": [],
    "a quarter": ["training.timestep_fraction=0.25"],
    "the noisier half": ["training.timestep_fraction=1.0", "training.timestep_window=[0,0.5]"],
    "the noisiest three": ["training.timestep_fraction=1.0", "training.timestep_window=[0,0.3]"],
    "the cleaner half": ["training.timestep_fraction=1.0", "training.timestep_window=[0.5,1]"],
    "the noisier half, 16 images a prompt": [
        *("training.timestep_fraction=1.0", "training.timestep_window=[0,0.5]", "training.images_per_prompt=16")
    ],
    "half, 4 images a prompt": ["training.images_per_prompt=4"],
    "half, 16 images a prompt": ["training.images_per_prompt=16"],
    "half, prompts by variance": [],
    "noise in the noisier half alone": ["training.timestep_fraction=1.0", "sampling.eta=[1.0,0,0.5]"],
    "noise in the noisiest three": ["training.timestep_fraction=1.0", "sampling.eta=[1.0,0,0.3]"],
    "the same, three times the rate": ["training.timestep_fraction=1.0", "sampling.eta=[1.0,0,0.3]", *FAST],
    "the noisiest three, three times the rate": [
        *("training.timestep_fraction=1.0", "training.timestep_window=[0,0.3]"),
        *FAST,
    ],
    "half of them, three times the rate": FAST,
    "3 steps, noise in one, three times the rate": [
        *("training.timestep_fraction=1.0", "sampling.steps=3", "sampling.eta=[1.0,0,0.34]"),
        *FAST,
    ],
    **{
        f"noise in the first {noisy} of 10, the others in {few}, three times the rate": [
            *("training.timestep_fraction=1.0", f"sampling.steps=[10,{few}]", f"sampling.eta=[1.0,0,0.{noisy}]"),
            *FAST,
        ]
        for noisy, few in ((1, 1), (2, 1), (3, 2), (3, 3))
    },
    "noise in three that slide, three times the rate": [
        *("training.timestep_fraction=1.0", "sampling.eta={sliding: [1.0, 0.3, 2]}"),
        *FAST,
    ],
    "noise in three anywhere, three times the rate": [
        *("training.timestep_fraction=1.0", "sampling.eta={random: [1.0, 0.3, 1]}"),
        *FAST,
    ],
    "5 steps, noise in two, three times the rate": [
        *("training.timestep_fraction=1.0", "sampling.steps=5", "sampling.eta=[1.0,0,0.4]"),
        *FAST,
    ],
}


class ByVariance(PromptSchedule):
    """Prompts drawn without replacement, by the deviation of their rewards."""

    def __init__(self, prompts: Sequence[str], per_step: int, run_seed: int, history: PromptStatistics) -> None:
        super().__init__(prompts, per_step, run_seed)
        self.history = history

    def batch(self, step: int) -> list[str]:
        known = self.history.state()
        weights = np.array([np.std(known[prompt]) + 1e-3 if prompt in known else 1e3 for prompt in self.prompts])
        draw = np.random.default_rng(derive_seed(self.run_seed, "prompts", step))
        chosen = draw.choice(len(self.prompts), self.per_step, replace=False, p=weights / weights.sum())
        return [self.prompts[index] for index in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/less-work"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="arms whose names hold one of these words, and the first")
    arguments = parser.parse_args()
    first, words = next(iter(ARMS)), arguments.only or [""]
    arms = {name: how for name, how in ARMS.items() if name == first or any(word in name for word in words)}
    torch.set_num_threads(1)
    keep_memory()
    record, curves = Record(arguments.out / "curves.json"), dict[str, Curve]()
    for seed in range(arguments.seeds):
        for name, overrides in arms.items():
            how = {"schedule": ByVariance} if "variance" in name else {}
            label = f"{name} seed {seed}"
            every = 1 if "rate" in name else 4
            lines = evaluations([CONFIG], [*overrides, f"seed={seed}"], every, STEPS, **how)
            curves[label] = record.curve(label, lines)
    print(f"commit {git_commit()}: CPU seconds until accuracy has risen by {RISE}, {arguments.seeds} seeds")
    base = median(seconds_to_rise(curves[f"{first} seed {seed}"]) for seed in range(arguments.seeds))
    for name in arms:
        found = [curves[f"{name} seed {seed}"] for seed in range(arguments.seeds)]
        seconds, steps = [seconds_to_rise(curve) for curve in found], [curve[-1]["steps"] for curve in found]
        shown = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"{name:<70}{median(seconds):8.1f} [{shown}]  {base / median(seconds):5.2f}×  by step {max(steps):.0f}")


if __name__ == "__main__":
    main()
