"""What half precision does: to what is learned, with and without float32 weights behind it, and to what rewards say.

    python -m benchmarks.half_precision learning [--dtype bfloat16] [--seeds 0 1 2] [--out FILE] [key=value …]
    python -m benchmarks.half_precision scores

``learning`` makes the demonstration's run in one process (benchmarks/one_process.py) in float32, in half precision, and
in half precision with no float32 weights: the optimiser moves the rounded ones. What is in ``--out`` is not run again.
It prints what the judge's accuracy gained over the first model's, by seed, with the claims of issue and documentation:
at least .15 in every seed with float32 weights behind, and less without. ``scores`` asks captioner and rewards about
real digits in float32 and under autocast, here on the CPU, and prints how many captions and how much of scores changes.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.one_process import told, train
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.captioner import Captioner
from pipelines.data.digits import load_split, render
from pipelines.rewards import load_reward, parse_options, score
from pipelines.rl import weights
from pipelines.settings import CaptionerSettings

GAIN = 0.15
WAYS = ("float32", "half", "half, no float32 weights")
REWARDS = ("sentence_cosine", "bertscore_precision", "bertscore_recall", "bertscore_f1")


def learning(chosen: argparse.Namespace) -> int:
    """Run what is missing, and print. Returns 1 where a claim is broken."""
    lines = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    known: dict[tuple[int, str], dict[str, Any]] = {(line["seed"], line["way"]): line for line in lines}
    for seed in chosen.seeds:
        for way in WAYS:
            if (seed, way) not in known:
                known[seed, way] = found = {"seed": seed, "way": way, **run(seed, way, chosen)}
                with chosen.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    print(f"\ncommit {git_commit()}, {chosen.dtype}, {' '.join(chosen.overrides)}")
    print(f"{'accuracy gained':<28}" + "".join(f"  seed {seed}" for seed in chosen.seeds) + "  CPU s each")
    gains: dict[str, list[float]] = {way: [known[seed, way]["gain"] for seed in chosen.seeds] for way in WAYS}
    for way, gained in gains.items():
        spent = np.mean([known[seed, way]["cpu_seconds"] for seed in chosen.seeds])
        print(f"{way:<28}" + "".join(f"  {gain:+.3f}" for gain in gained) + f"  {spent:.0f}")
    kept = {
        f"with float32 weights behind: at least {GAIN} in every seed": min(gains[WAYS[1]]) >= GAIN,
        "without them: not in every seed": min(gains[WAYS[2]]) < GAIN,
        "and less in each seed than with them": all(a < b for a, b in zip(gains[WAYS[2]], gains[WAYS[1]], strict=True)),
    }
    for claim, holds in kept.items():
        print(f"{'kept  ' if holds else 'BROKEN'}  {claim}")
    return 0 if all(kept.values()) else 1


def run(seed: int, way: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """First and last accuracy of the judge, and their difference."""
    dtype = "float32" if way == WAYS[0] else chosen.dtype
    overrides = [f"seed={seed}", f"model.dtype={dtype}", *chosen.overrides]
    config = load_config(DdpoConfig, Path("configs/ddpo/digits.yaml"), overrides)
    values: list[float] = []
    with patch.object(weights, "masters", dict) if way == WAYS[2] else nullcontext():
        for line in train(config):
            print(f"seed {seed}, {way}: {told(line)}", flush=True)
            values.append(line["evaluator/full"])
    return {"values": values, "gain": values[-1] - values[0], "cpu_seconds": line["cpu_seconds"]}


def scores() -> None:
    """Print what changes."""
    images, prompts = render(load_split("test"), np.random.default_rng(0))
    images, prompts = images[:400], prompts[:400]
    print(f"commit {git_commit()}, {len(images)} images of digits")
    captioner = Captioner(CaptionerSettings())
    rewards = {name: load_reward(name, parse_options(name, {})) for name in REWARDS}
    captions = captioner.caption(images)
    shuffled = [captions[index] for index in np.random.default_rng(0).permutation(len(captions))]
    for kind in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", kind):
            other = captioner.caption(images)
        differ = sum(one != two for one, two in zip(captions, other, strict=True))
        print(f"{kind}: {differ} of {len(captions)} captions differ")
        for name, reward in rewards.items():
            plain = score(reward, images, prompts, shuffled)
            fresh = load_reward(name, parse_options(name, {}))  # which remembers no text
            with torch.autocast("cpu", kind):
                half = score(fresh, images, prompts, shuffled)
            apart = np.abs(half - plain)
            print(f"  {name:<22} |Δ| mean {apart.mean():.1e}, most {apart.max():.1e}, of a spread of {plain.std():.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learning", "scores"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/half_precision.jsonl"))
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what == "scores":
        scores()
        return 0
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    return learning(chosen)


if __name__ == "__main__":
    raise SystemExit(main())
