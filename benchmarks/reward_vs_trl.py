"""CPU time until the evaluator's accuracy has risen by .15: Ouroboros and TRL 0.23.1, same base, prompts and reward.

    python -m benchmarks.reward_vs_trl [--out runs/reward-vs-trl] [--seeds 3]

Both learn on the default models from the same captioner and sentence similarity, 256 images a step, and are judged by
the same sampler and evaluator on the same 1,080 held-out images every few steps; judging is not counted. TRL gets its
best batches (sampling in one call, training in calls of 64 or 32 images) and each of several hyperparameters with one
seed; the best of them is repeated with the other seeds. One thread each. What is on record is not run again.
"""

import argparse
import json
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
from benchmarks.shared_pipelines import DIGITS, portable_copy
from orchestration.config import DdpoConfig, load_config
from orchestration.run import git_commit
from pipelines.rewards import score
from pipelines.trainable import load_weights
from policies.advantages import PromptStatistics
from policies.streams import PromptSchedule

RISE, FACTOR = 0.15, 2.0
BATCH, JUDGED = 256, 1080
CONFIG, NFT = Path("configs/ddpo/digits.yaml"), Path("configs/recipes/diffusion-nft.yaml")
Curve = list[dict[str, float]]  # steps, CPU seconds so far and accuracy, at each evaluation

OURS: dict[str, tuple[Sequence[Path], int]] = {  # configs, steps between evaluations
    "DDPO_IS": ([CONFIG], 4),
    "DiffusionNFT": ([CONFIG, NFT], 1),
}
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
}
TRL_EVERY, TRL_STEPS = 4, 48


def ours(configs: Sequence[Path], every: int, seed: int) -> Iterator[dict[str, float]]:
    """Evaluations until the accuracy has risen."""
    config = load_config(DdpoConfig, configs, [f"seed={seed}"])
    run = OneProcess(config)
    schedule = PromptSchedule(run.prompts, config.training.prompts_per_step, seed)
    history = PromptStatistics(config.advantage.history_size)
    for step in range(TRL_STEPS + 1):
        if step:
            run.train(step - 1, schedule, history)
        if step % every == 0:
            yield {"steps": step, "cpu": sum(run.spent.values()), "accuracy": _accuracy(run)}


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
        "sample_num_steps": config.sampling.steps,
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
        **own,
    }
    given = {"pipeline": str(pipeline), "lora": False, "ddpo": ddpo, "prompts": judge.prompts}
    given["images_per_prompt"] = config.training.images_per_prompt
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
                yield {"steps": step, "cpu": spent + answered, "accuracy": _accuracy(judge)}


def _accuracy(run: OneProcess) -> float:
    return float(run.evaluate(JUDGED).metrics()["evaluator/full"])


def until_risen(evaluations: Iterator[dict[str, float]], label: str) -> Curve:
    """Evaluations up to the first one that has risen enough."""
    curve: Curve = []
    for line in evaluations:
        curve.append(line)
        print(f"{label}: step {line['steps']:.0f} accuracy {line['accuracy']:.3f}, {line['cpu']:.1f} CPU s", flush=True)
        if line["accuracy"] >= curve[0]["accuracy"] + RISE:
            break
    return curve


def seconds_to_rise(curve: Curve) -> float:
    """CPU seconds until the rise, interpolated between two evaluations; infinite if it did not come."""
    goal = curve[0]["accuracy"] + RISE
    if curve[-1]["accuracy"] < goal:
        return float("inf")
    before, after = curve[-2:]
    share = (goal - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
    return before["cpu"] + share * (after["cpu"] - before["cpu"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward-vs-trl"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "curves.json"
    curves: dict[str, Curve] = json.loads(record.read_text()) if record.exists() else {}

    def known(label: str, evaluations: Iterator[dict[str, float]]) -> float:
        if label not in curves:
            curves[label] = until_risen(evaluations, label)
            record.write_text(json.dumps(curves))
        return seconds_to_rise(curves[label])

    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):  # alternating, so that a busy hour disturbs all alike
        for name, (configs, every) in OURS.items():
            seconds.setdefault(name, []).append(known(f"{name} seed {seed}", ours(configs, every, seed)))
        if seed == 0:
            tried = {name: known(f"TRL {name} seed 0", trls(own, 0, out)) for name, own in TRIES.items()}
            best = min(tried, key=lambda name: tried[name])
        seconds.setdefault("TRL", []).append(known(f"TRL {best} seed {seed}", trls(TRIES[best], seed, out)))
    print(f"commit {git_commit()}: CPU seconds until accuracy has risen by {RISE} ({arguments.seeds} seeds)")
    for name, spent in tried.items():
        print(f"TRL {name:<50} {spent:8.1f}  (seed 0)")
    for name, all_seeds in seconds.items():
        ratio = median(seconds["TRL"]) / median(all_seeds)
        shown = ", ".join(f"{each:.1f}" for each in all_seeds)
        print(f"{f'TRL, {best}' if name == 'TRL' else name:<54} {median(all_seeds):8.1f}  [{shown}]  {ratio:.2f}×")
    kept = max(median(seconds["TRL"]) / median(seconds[name]) for name in OURS) >= FACTOR
    print(f"{'kept' if kept else 'MISSED'}: at least {FACTOR}× less than TRL's best")
    return not kept


if __name__ == "__main__":
    raise SystemExit(main())
