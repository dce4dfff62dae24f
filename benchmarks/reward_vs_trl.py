"""CPU time until the evaluator's accuracy has risen by .15: Ouroboros and TRL 0.23.1, same base, prompts and reward.

    python -m benchmarks.reward_vs_trl [--out runs/reward-vs-trl] [--seeds 3]

Both learn on the default models from the same captioner and sentence similarity, 256 images a step, and are judged by
the same sampler and evaluator on the same 1,080 held-out images every few steps; judging is not counted. TRL gets its
best batches (sampling in one call, training in calls of 64 or 32 images) and each of several hyperparameters with one
seed; the best of them is repeated with the other seeds. A run that has not risen after 24 steps counts as
if it rose then: what is printed for TRL is then a lower bound. One thread each. What is on record is not run again.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from actors.worker import keep_memory
from benchmarks.one_process import OneProcess
from benchmarks.peer import Trl, environment
from benchmarks.rise import RISE, Curve, Record, accuracy, evaluations, seconds_to_rise
from benchmarks.shared_pipelines import DIGITS, portable_copy
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.rewards import score
from pipelines.rl.weights import load_weights

FACTOR, BATCH = 2.0, 256
CONFIG, RECIPES = Path("configs/ddpo/digits.yaml"), Path("configs/recipes")
NFT = RECIPES / "diffusion-nft.yaml"

OURS: dict[str, tuple[Sequence[Path], int]] = {  # configs, steps between evaluations
    "DDPO_IS": ([CONFIG], 4),
    "DDPO_IS, noise at first": ([CONFIG, RECIPES / "noise-at-first.yaml"], 1),
    "DDPO_IS, five calls": ([CONFIG, RECIPES / "five-calls.yaml"], 1),
    "DDPO_IS, three calls": ([CONFIG, RECIPES / "three-calls.yaml"], 1),
    "DiffusionNFT": ([CONFIG, NFT], 1),
    "DiffusionNFT, five steps": ([CONFIG, RECIPES / "diffusion-nft-5-steps.yaml"], 1),
}
LEADING = {"timestep_spacing": "leading"}
TRIES: dict[str, dict[str, Any]] = {
    "lr 1e-4 clip 2e-4": {},
    "lr 1e-4 clip 2e-4 half the timesteps": {"train_timestep_fraction": 0.5},
    "lr 1e-4 clip 2e-4 all images normalised together": {"per_prompt_stat_tracking": False},
    "lr 1e-4 clip 1e-3": {"train_clip_range": 1e-3},
    "lr 3e-4 clip 2e-4": {"train_learning_rate": 3e-4},
    "lr 3e-4 clip 1e-4": {"train_learning_rate": 3e-4, "train_clip_range": 1e-4},
    "lr 3e-4 clip 1e-3 half the timesteps": {
        "train_learning_rate": 3e-4,
        "train_clip_range": 1e-3,
        "train_timestep_fraction": 0.5,
    },
    "lr 1e-4 clip 2e-4 eight updates": {"train_batch_size": BATCH // 8},
    "lr 1e-3 clip 1e-3": {"train_learning_rate": 1e-3, "train_clip_range": 1e-3},
    # TRL takes the last of the digits' trailing timesteps for a step of tiny σ, whose gradient outweighs all others'.
    "lr 1e-4 clip 2e-4 leading timesteps": {"scheduler": LEADING},
    "lr 3e-4 clip 2e-4 leading timesteps": {"train_learning_rate": 3e-4, "scheduler": LEADING},
}
TRL_EVERY, TRL_STEPS = 4, 24


def trls(own: dict[str, Any], seed: int, out: Path) -> Iterator[dict[str, float]]:
    """The same with TRL. Its rewards are computed here, by the same code, and count."""
    config = load_config(DdpoConfig, CONFIG, [f"seed={seed}"])
    judge = OneProcess(config)
    pipeline = portable_copy(DIGITS, out / "digits")
    name = config.reward.title
    answered = 0.0

    def scores(images: np.ndarray, prompts: list[str]) -> Sequence[float]:
        nonlocal answered
        began = time.process_time()
        found = score(judge.rewards[name], images, prompts, judge.captioner.caption(images))
        answered += time.process_time() - began
        return found.tolist()

    ddpo = {
        "seed": seed,
        "sample_num_steps": config.sampling.calls,
        "sample_eta": config.sampling.eta,
        "sample_guidance_scale": config.sampling.guidance_scale,
        "train_cfg": False,
        "sample_batch_size": BATCH,
        "sample_num_batches_per_epoch": 1,
        "train_batch_size": BATCH // 4,
        "train_gradient_accumulation_steps": 1,
        "train_learning_rate": 1e-4,
        "train_adam_weight_decay": 1e-4,
        "train_adv_clip_max": 10,
        "train_clip_range": 2e-4,
        "per_prompt_stat_tracking": True,  # of this step's images alone, as here
        "per_prompt_stat_tracking_buffer_size": config.training.images_per_prompt,
        "per_prompt_stat_tracking_min_count": config.training.images_per_prompt,
        **{key: value for key, value in own.items() if key != "scheduler"},
    }
    given = {"pipeline": str(pipeline), "lora": False, "ddpo": ddpo, "prompts": judge.prompts}
    given |= {"images_per_prompt": config.training.images_per_prompt, "scheduler": own.get("scheduler", {})}
    spent = 0.0
    with Trl(environment(out / "trl"), given, out / "trl.log", scores) as peer:
        for step in range(TRL_STEPS + 1):
            if step:
                times = peer.epoch()
                spent += times["all cpu"]
            if step % TRL_EVERY == 0:
                if step:
                    peer.save(out / "learned")
                    load_weights(
                        judge.sampler.network,
                        load_file(out / "learned" / "unet" / "diffusion_pytorch_model.safetensors"),
                    )
                yield {"steps": step, "cpu": spent + answered, "accuracy": accuracy(judge)}


def at_least(curve: Curve) -> float:
    """CPU seconds until the rise; if it did not come, those in which it did not: a lower bound."""
    return min(seconds_to_rise(curve), curve[-1]["cpu"])


def order(curve: Curve) -> tuple[float, float]:
    """By how soon the rise came; without it, by what was reached."""
    return seconds_to_rise(curve), -curve[-1]["accuracy"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward-vs-trl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--known", choices=TRIES, help="TRL's best, where it is known: no others are tried")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    out = arguments.out.resolve()
    record, tried = Record(out / "curves.json"), dict[str, Curve]()
    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):  # alternating, so that a busy hour disturbs all alike
        for name, (configs, every) in OURS.items():
            lines = evaluations(configs, [f"seed={seed}"], every, TRL_STEPS)
            seconds.setdefault(name, []).append(at_least(record.curve(f"{name} seed {seed}", lines)))
        if seed == 0:
            tries = {name: own for name, own in TRIES.items() if arguments.known in (None, name)}
            tried = {name: record.curve(f"TRL {name} seed 0", trls(own, 0, out)) for name, own in tries.items()}
            best = min(tried, key=lambda name: order(tried[name]))
        curve = record.curve(f"TRL {best} seed {seed}", trls(TRIES[best], seed, out))
        seconds.setdefault("TRL", []).append(at_least(curve))
    print(f"commit {git_commit()}: CPU seconds until accuracy has risen by {RISE} ({arguments.seeds} seeds)")
    for name, curve in tried.items():
        bound, reached = at_least(curve), curve[-1]["accuracy"]
        sign = " " if seconds_to_rise(curve) < float("inf") else ">"
        print(f"TRL {name:<50} {sign}{bound:7.1f}  reached {reached:.3f}  (seed 0)")
    for name, all_seeds in seconds.items():
        ratio = median(seconds["TRL"]) / median(all_seeds)
        shown = ", ".join(f"{each:.1f}" for each in all_seeds)
        print(f"{f'TRL, {best}' if name == 'TRL' else name:<54} {median(all_seeds):8.1f}  [{shown}]  {ratio:.2f}×")
    kept = max(median(seconds["TRL"]) / median(seconds[name]) for name in OURS) >= FACTOR
    print(f"{'kept' if kept else 'MISSED'}: at least {FACTOR}× less than TRL's best")
    return not kept


if __name__ == "__main__":
    raise SystemExit(main())
