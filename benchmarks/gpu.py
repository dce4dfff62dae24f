"""What there is to know about a card, in an order and within a time.

    python -m benchmarks.gpu DIRECTORY [--minutes 12] [--trl-python VENV/bin/python]
    python -m benchmarks.gpu DIRECTORY --rehearse              # the same parts, tiny and on the CPU

Each part is a process of its own, with what is left of the time as its limit; what it printed is in DIRECTORY. A part
that was finished is not done again, so that the same command goes on where time ended. In this order: steps of the
demonstration through Ray, and a resumed run that has to end as the whole one did; what rounding does to
log-probabilities, by type, guidance and calls; whole steps of Stable Diffusion 1.5's shape with TRL beside it;
the same with other kernels; 3's. Where Ray is not installed, its part says so.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import SHAPES
from orchestration.runs.manifest import git_commit
from pipelines.rl.learning import DiffusionLearner
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS

LEAST_SECONDS = 20.0  # less is not worth the start of a part
TYPES, GUIDANCE = ("float32", "bfloat16", "float16"), (1.0, 4.5)


def parts_of(chosen: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Names and words for Python, in order."""
    device, shape = ("cpu", "tiny") if chosen.rehearse else ("cuda", "sd15")
    own, steps = ["-m", "benchmarks.gpu", str(chosen.directory), "--only"], ["-m", "benchmarks.gpu_steps"]
    tail = ["--rehearse"] if chosen.rehearse else []
    small = ["--device", device, "--rounds", "1" if chosen.rehearse else "2"]
    trl = ["--trl-python", str(chosen.trl_python)] if chosen.trl_python else []
    first, others = ("bfloat16-lora", "bfloat16-whole"), ("float32-lora", "float32-lora-strict", "float16-lora")
    fast = ("bfloat16-lora-channels_last", "bfloat16-lora-compiled", "bfloat16-lora-graphs")
    return [
        ("loop", [*own, "loop", *tail]),
        ("rounding", [*own, "rounding", *tail]),
        ("steps", [*steps, "--shape", shape, *small, "--settings", *first, *trl]),
        ("types", [*steps, "--shape", shape, *small, "--settings", *others]),
        ("kernels", [*steps, "--shape", shape, *small, "--settings", *(fast[:1] if chosen.rehearse else fast)]),
        *([] if chosen.rehearse else [("sd3", [*steps, "--shape", "sd3", *small, "--settings", "bfloat16-lora"])]),
    ]


def run_parts(parts: Sequence[tuple[str, list[str]]], directory: Path, minutes: float) -> bool:
    """Do what is not done, while there is time. Returns whether all is done."""
    end, known_in = time.monotonic() + 60 * minutes, directory / "parts.json"
    done: dict[str, Any] = json.loads(known_in.read_text()) if known_in.exists() else {}
    for name, words in parts:
        left, log = end - time.monotonic(), directory / f"{name}.txt"
        if done.get(name, {}).get("status") != 0:
            if left < LEAST_SECONDS:
                print(f"== {name}: no time left")
                continue
            began = time.monotonic()
            with log.open("wb") as file:
                try:
                    command = [sys.executable, *words]
                    status = subprocess.run(command, stdout=file, stderr=file, timeout=left).returncode
                except subprocess.TimeoutExpired:
                    status = 124
            done[name] = {"status": status, "seconds": round(time.monotonic() - began, 1), "commit": git_commit()}
            known_in.write_text(json.dumps(done, indent=1))
        state = done[name]
        print(f"== {name}: status {state['status']} after {state['seconds']} s, commit {state['commit']}")
        print(log.read_text(errors="replace")[-6000:], flush=True)
    return all(done.get(name, {}).get("status") == 0 for name, _ in parts)


def loop(directory: Path, rehearse: bool) -> None:
    """Two steps of the demonstration, and the second of them again from the first's commit."""
    if importlib.util.find_spec("ray") is None:
        print("Ray is not installed here: the loop through Ray was not run")
        return
    from orchestration.experiments.ddpo.config import DdpoConfig
    from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo
    from orchestration.experiments.ddpo.run import DdpoRun
    from orchestration.runs.config import load_config

    place = directory / f"loop-{time.time_ns()}"
    size = ["training.steps=2", "checkpoint.keep=2", "checkpoint.every=1", "evaluation.images=64", "seed=1"]
    size += ["evaluation.interim_images=64"] + (
        ["training.images_per_step=32"] if rehearse else ["model.dtype=bfloat16"]
    )
    config = load_config(DdpoConfig, Path("configs/ddpo/digits.yaml"), [*size, f"output_dir={place / 'whole'}"])
    began = time.monotonic()
    whole = json.loads(run_ddpo(config).read_text())
    print(f"two steps through Ray: {time.monotonic() - began:.1f} s, stages {whole['seconds_by_stage']}")
    for name, peak in whole["peak_memory_bytes"].items():
        print(f"  {name:<12} {peak['memory'] / 1e9:.2f} GB, on the card {peak['gpu_memory'] / 1e9:.2f} GB")
    again = json.loads(
        resume_ddpo(DdpoRun.fork(place / "whole", [f"output_dir={place / 'again'}"], step=1)).read_text()
    )
    same = again["weights_sha256"] == whole["weights_sha256"]
    print(f"resumed after step 1: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}")
    if not same:
        raise SystemExit(1)


def rounding(directory: Path, rehearse: bool) -> None:
    """|Δ log p| between a sampler's call and a learner's, with the same weights on the same device."""
    device, images = ("cpu", 4) if rehearse else ("cuda", 8)
    pipelines = {"digits": Path("models/digits/pipeline")}
    if not rehearse:
        pipelines["sd15"] = SHAPES["sd15"][0](directory / "sd15", device, torch.float32)
    print(f"{'model':<8}{'type':<10}{'guidance':>9}{'learner':>9}{'mean':>10}{'99 %':>10}{'most':>10}  nats")
    for shape, path in pipelines.items():
        for kind in TYPES:
            for guidance in GUIDANCE:
                for calls, micro_batch in (("equal", images), ("unequal", 3 * images // 2)):
                    sampling = SamplingSettings(steps=10, guidance_scale=guidance)
                    training = TrainingSettings(images_per_step=images, images_per_prompt=1, micro_batch=micro_batch)
                    model = ModelSettings(path=str(path), dtype=kind)  # type: ignore[arg-type]
                    learner = DiffusionLearner(model, sampling, training, 0, device)
                    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(images)]
                    found = learner.rounding(prompts).cpu()
                    told = (found.mean(), found.quantile(0.99), found.max())
                    values = "".join(f"{float(each):>10.1e}" for each in told)
                    print(f"{shape:<8}{kind:<10}{guidance:>9}{calls:>9}{values}", flush=True)
                    del learner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL 0.23.1")
    parser.add_argument("--rehearse", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument("--only", choices=("loop", "rounding"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not (chosen.rehearse or torch.cuda.is_available()):
        print("there is no GPU here; to try the command itself: --rehearse", file=sys.stderr)
        return 2
    chosen.directory.mkdir(parents=True, exist_ok=True)
    if chosen.only:
        {"loop": loop, "rounding": rounding}[chosen.only](chosen.directory, chosen.rehearse)
        return 0
    return 0 if run_parts(parts_of(chosen), chosen.directory, chosen.minutes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
