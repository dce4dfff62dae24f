"""Whole DDPO steps on one card: images a second, share of the card's arithmetic in use, memory, and TRL beside it.

    python -m benchmarks.gpu_steps [--shape sd3] [--out gpu.json] [--trl-python VENV/bin/python]

Builds Stable Diffusion 1.5's shape (``--shape sd3``: Stable Diffusion 3 medium's, without T5) and BLIP-base's with
random weights. Every setting in ``--settings`` draws images, captions them, learns from them, and sends the sampler
what was learned, all roles on one card. A setting is words joined by "-": bfloat16, float16 or float32; lora or whole;
and, if wished, strict (float32 products not in TF32) and what ``model.kernels`` knows. The largest |Δ log p| of the
first update says whether sampler and learner still compute the same.

Utilisation is the network's own arithmetic (counted by torch, without what checkpointing computes twice) over the
card's nominal rate for bfloat16, or over the fastest matrix product measured here. ``--trl-python`` is the Python of an
environment with TRL 0.23.1 (``benchmarks/peer.py`` lists it): it trains on the same pipeline at its default batches of
1/1 and at larger ones until memory ends. Needs diffusers, transformers and, for lora, peft; neither Ray nor a network.
``--shape tiny --device cpu`` goes the same way in a minute.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_shapes import SHAPES
from benchmarks.peer import Trl
from benchmarks.shared_pipelines import portable_copy
from pipelines.captioner import Captioner
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import CaptionerSettings, ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests import models

NOMINAL = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bfloat16, dense
SETTINGS = {
    "cuda": (
        *("bfloat16-lora", "bfloat16-lora-channels_last", "bfloat16-lora-compiled", "bfloat16-lora-graphs"),
        *("bfloat16-lora-channels_last-compiled", "bfloat16-whole", "float32-lora", "float32-lora-strict"),
    ),
    "cpu": ("float32-lora", "float32-whole", "float32-lora-channels_last", "bfloat16-lora"),
}
KERNELS = ("channels_last", "compiled", "graphs")
WORDS = {"bfloat16", "float16", "float32", "lora", "whole", "strict", *KERNELS}
TRL_BATCHES = ((1, 1), (8, 2), (16, 4), (32, 8), (64, 16))
RANK = 4  # TRL's


@dataclass
class Stages:
    """Seconds (one value a round) and peak bytes of what is done."""

    cuda: bool
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
            self.memory[name] = max(self.memory.get(name, 0), torch.cuda.max_memory_allocated())
        self.seconds[name].append(time.perf_counter() - began)

    def median(self, name: str) -> float:
        """Of the rounds but the first, which finds kernels and memory."""
        return statistics.median(self.seconds[name][1:])


def step_of(setting: str, pipeline: Path, captioner_path: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Whole steps in one setting: seconds and peak bytes by stage, FLOPs, and what came of it."""
    words, device = setting.split("-"), chosen.device
    if unknown := set(words) - WORDS:
        raise SystemExit(f"--settings: {setting} has {sorted(unknown)}; known are {sorted(WORDS)}")
    torch.set_float32_matmul_precision("high" if "tf32" in words else "highest")
    sampling = SamplingSettings(steps=chosen.steps, eta=chosen.eta, guidance_scale=chosen.guidance)
    training = TrainingSettings(
        images_per_step=chosen.images,
        images_per_prompt=4,
        updates_per_step=chosen.updates,
        ratio_tolerance=1.0,  # what precision does to the ratio is printed, not judged
    )
    kernels: Any = tuple(word for word in words if word in KERNELS)
    rank = RANK if "lora" in words else 0
    model = ModelSettings(path=str(pipeline), dtype=words[0], lora_rank=rank, kernels=kernels)
    sampler, learner = DiffusionPolicy(model, sampling, device), DiffusionLearner(model, sampling, training, 0, device)
    torch.set_float32_matmul_precision("highest" if "strict" in words else "high")
    half = words[0] != "float32"
    captioner = Captioner(CaptionerSettings(path=str(captioner_path), max_new_tokens=8), device, half)
    flops = {"sampling": marginal_flops(sampler, False), "learning": marginal_flops(learner.policy, True)}
    prompts = [models.PROMPTS[index // 4 % len(models.PROMPTS)] for index in range(chosen.images)]
    stages = Stages(device.startswith("cuda"))
    noise = learner.rounding(prompts[: chosen.images_per_call]).max().item()
    for number in range(chosen.rounds + 1):
        parts = []
        with stages("sampling"):
            for start in range(0, chosen.images, chosen.images_per_call):
                some = slice(start, start + chosen.images_per_call)
                seeds = list(range(number * chosen.images, (number + 1) * chosen.images))[some]
                parts.append(sampler.rollout(prompts[some], seeds, learner.weights_version))
        images = np.concatenate([each for each, _ in parts])
        with stages("captioning"):
            captions = captioner.caption(images)
        scores = images.mean(axis=(1, 2, 3)) + np.array([len(caption) for caption in captions])
        advantage = (scores - scores.mean()) / (scores.std() + 1e-6)
        trajectory = type(parts[0][1]).concatenate([each for _, each in parts])
        with stages("learning"):
            statistics_, changed = learner.learn(trajectory, advantage, seed=number)
        with stages("sending"):
            sampler.load(learner.weights())
    work = chosen.images * chosen.steps
    return {
        "setting": setting,
        "micro_batch": learner.micro_batch,
        "checkpointing": bool(getattr(learner.policy.network, "is_gradient_checkpointing", False)),
        "seconds": {name: stages.median(name) for name in stages.seconds},
        "first_round": {name: seconds[0] for name, seconds in stages.seconds.items()},
        "peak_bytes": stages.memory,
        "flops": {"sampling": flops["sampling"] * work, "learning": flops["learning"] * work},
        "noise": noise,
        "first_update_error": max(statistics_.first_update_error.values()),
        "changed_tensors": changed,
    }


def marginal_flops(policy: DiffusionPolicy, backward: bool) -> float:
    """FLOPs of one image-step more in a call, guidance included; forward, or forward and backward."""
    network, shape, counted = policy.network, policy.family.latent_shape, []
    checkpointing = getattr(network, "is_gradient_checkpointing", False)
    if checkpointing:
        network.disable_gradient_checkpointing()
    for count in (1, 2):
        times, told = policy.schedule.timesteps[:1].repeat(count), policy.embed([""] * count)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = policy.predict(torch.zeros(count, *shape, device=policy.device), times, told)
            if backward:
                output.sum().backward()
        counted.append(counter.get_total_flops())
    network.zero_grad(set_to_none=True)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return float(counted[1] - counted[0])


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of ten large matrix products."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    stages = Stages(device.startswith("cuda"))
    for _ in range(10):
        with stages("product"):
            a @ b
    return float(2 * size**3 / min(stages.seconds["product"]))


def peak_of(setting: str, device: str) -> tuple[float, str]:
    """FLOPs a second that the card could do in a setting's precision, and where that figure is from."""
    if setting.startswith("bfloat16") and device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        if known := [rate for card, rate in NOMINAL.items() if all(word in name for word in card.split())]:
            return known[0], "nominal"
    torch.set_float32_matmul_precision("highest" if "strict" in setting else "high")
    return measured_peak(device, getattr(torch, setting.split("-")[0])), "matrix product"


def trl_epochs(pipeline: Path, lora: bool, batches: tuple[int, int], chosen: argparse.Namespace, log: Path) -> float:
    """Median seconds of TRL's epochs, rewards left out. Raises RuntimeError if it ends, for want of memory say."""
    sample, train = batches
    ddpo = {
        "sample_num_steps": chosen.steps,
        "sample_eta": chosen.eta,
        "sample_guidance_scale": chosen.guidance,
        "train_cfg": chosen.guidance > 1,
        "sample_batch_size": sample,
        "sample_num_batches_per_epoch": chosen.images // sample,
        "train_batch_size": train,
        "train_gradient_accumulation_steps": chosen.images // chosen.updates // train,
        "train_learning_rate": 1e-4,
        "per_prompt_stat_tracking": False,
        "mixed_precision": "bf16" if chosen.device.startswith("cuda") else "no",
    }
    given = {"pipeline": str(pipeline), "lora": lora, "ddpo": ddpo, "prompts": list(models.PROMPTS)}
    with Trl(chosen.trl_python, given | {"images_per_prompt": 4}, log) as trl:
        answers = [trl.epoch() for _ in range(chosen.rounds + 1)]
    return statistics.median(answer["all wall"] - answer["reward wall"] for answer in answers[1:])


def compare_with_trl(rows: list[dict[str, Any]], pipeline: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """TRL's seconds an epoch at each of its batch sizes, over those of every setting that trains the same."""
    found = []
    for kind in ("lora", "whole"):
        mine = {row["setting"]: _loop_seconds(row) for row in rows if kind in row["setting"]}
        for batches in TRL_BATCHES if mine else ():
            if chosen.images % batches[0] or chosen.images // chosen.updates % batches[1]:
                continue
            log = pipeline.with_name(f"trl-{kind}-{batches[0]}.log")
            try:
                seconds = trl_epochs(pipeline, kind == "lora", batches, chosen, log)
            except RuntimeError:
                print(f"TRL {kind} {batches[0]}/{batches[1]} ended: {log.read_text().strip().splitlines()[-1:]}")
                break
            ratios = {name: seconds / own for name, own in mine.items()}
            found.append({"kind": kind, "batches": batches, "seconds": seconds, "ratios": ratios})
            told = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in ratios.items())
            print(f"TRL {kind} {batches[0]}/{batches[1]}: {seconds:.2f} s an epoch = {told}", flush=True)
    return found


def _loop_seconds(row: dict[str, Any]) -> float:
    return float(sum(row["seconds"][stage] for stage in ("sampling", "learning", "sending")))


def report(row: dict[str, Any], images: int) -> None:
    """One setting's lines."""
    peak, source = row["peak"], row["peak_source"]
    print(f"{row['setting']}: micro-batch {row['micro_batch']}, checkpointing {row['checkpointing']}")
    for stage, seconds in row["seconds"].items():
        used = f"{row['flops'][stage] / seconds / peak:6.1%} of {source}" if stage in row["flops"] else ""
        memory = f"{row['peak_bytes'][stage] / 1e9:6.1f} GB" if stage in row["peak_bytes"] else ""
        first = row["first_round"][stage]
        print(f"  {stage:<11}{seconds:9.2f} s (first {first:8.2f}) {images / seconds:9.2f} images/s  {memory}  {used}")
    error = row["first_update_error"]
    print(f"  changed {row['changed_tensors']} tensors, first update |Δ log p| ≤ {error:.1e} nats, ", end="")
    print(f"of the learner's own calls {row['noise']:.1e}", flush=True)


def main() -> int:
    """Print every setting's figures, then TRL's, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="sd15")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--settings", nargs="+", help="by default all that the device is asked about")
    parser.add_argument("--images", type=int, help="a step; by default 64, or 8 of tiny")
    parser.add_argument("--images-per-call", type=int, default=8, help="of the sampler")
    parser.add_argument("--updates", type=int, default=1, help="a step")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the shape's")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL 0.23.1")
    parser.add_argument("--out", type=Path, help="file for all figures as JSON")
    chosen = parser.parse_args()
    cuda = chosen.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("there is no GPU here; to try the command itself: --shape tiny --device cpu", file=sys.stderr)
        return 2
    build, captioner_of, steps, chosen.eta, chosen.guidance = SHAPES[chosen.shape]
    chosen.steps = chosen.steps or steps
    chosen.images = chosen.images or (8 if chosen.shape == "tiny" else 64)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit or 'unknown'}, torch {torch.__version__}, {card}, {chosen.shape}")
    print(
        f"{chosen.images} images × {chosen.steps} steps, {chosen.images_per_call} a call, guidance {chosen.guidance:g}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as place:
        captioner = captioner_of(Path(place) / "captioner")
        pipeline = build(Path(place) / "pipeline", chosen.device, torch.bfloat16 if cuda else torch.float32)
        for setting in chosen.settings or SETTINGS["cuda" if cuda else "cpu"]:
            row = step_of(setting, pipeline, captioner, chosen)
            gc.collect()  # the models are gone: the next setting has the card for itself
            if cuda:
                torch.cuda.empty_cache()
            row["peak"], row["peak_source"] = peak_of(setting, chosen.device)
            rows.append(row)
            report(row, chosen.images)
        uses_trl = chosen.trl_python and chosen.shape != "sd3"  # whose trainer knows Stable Diffusion 1 and 2 only
        trl = compare_with_trl(rows, portable_copy(pipeline, pipeline), chosen) if uses_trl else []
    if chosen.out:
        about = {"commit": commit, "torch": torch.__version__, "card": card, "shape": chosen.shape}
        sizes = {name: getattr(chosen, name) for name in ("images", "steps", "images_per_call", "updates", "rounds")}
        chosen.out.write_text(json.dumps({**about, **sizes, "settings": rows, "trl": trl}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
