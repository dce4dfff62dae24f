"""What a large model costs where it passes through: memory of each process, the object store, seconds of each stage.

    python -m benchmarks.footprint [--channels 704 1120] [--sd15] [--pipeline DIRECTORY] [--lora-rank 16] [--guidance 5]

Two steps of ``ouroboros ddpo`` on a Stable Diffusion of random weights, of some size or of 1.5's shape at 512 pixels,
or on a pipeline that is there, with a commit after each, one sampler and one learner. Memory is resident memory at its
highest, shared pages of the object store among it, beside what the plan foresaw; the object store's is what it holds
after a step.
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.gpu_shapes import build_sd15
from benchmarks.shared_pipelines import random_pipeline
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.loop import run_ddpo
from orchestration.experiments.ddpo.memory_plan import foreseen_activations, memory_lines, memory_of
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit

SETTINGS = ["name=footprint", "reward.function=tests.rewards:redness", "captioner.path=null", "sampling.steps=3"]
SETTINGS += ["training.steps=2", "training.images_per_step=4", "training.images_per_prompt=2", "checkpoint.every=1"]
SETTINGS += ["training.updates_per_step=1", "training.ema_decay=0.5", "evaluation.evaluator=null", "actors.samplers=1"]
SETTINGS += [
    "evaluation.images=4",
    "evaluation.interim_images=4",
    "evaluation.every=0",
    "tracking.system_metrics=false",
]
# A call of 1.5's shape takes seconds on two cores: one step of few images tells what it holds.
SMALLER = ["training.steps=1", "training.images_per_step=2", "sampling.steps=2", "evaluation.images=1"]
SMALLER += ["evaluation.interim_images=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs=2, default=(704, 1120))
    parser.add_argument("--sd15", action="store_true")
    parser.add_argument("--pipeline", type=Path)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        if not (pipeline := given.pipeline):
            pipeline = directory / "pipeline"  # made elsewhere: its memory is not the driver's
            with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
                shape = (build_sd15, pipeline, "cpu", torch.float32)
                made = elsewhere.submit(*(shape if given.sd15 else (random_pipeline, tuple(given.channels), pipeline)))
                made.result()
        size = sum(path.stat().st_size for path in pipeline.rglob("*.safetensors"))
        prompts = directory / "prompts.txt"
        prompts.write_text("a red seven\na blue two\n")
        asked = [f"output_dir={directory / 'run'}", f"model.path={pipeline}", f"model.lora_rank={given.lora_rank}"]
        asked += [f"prompts={prompts}", f"sampling.guidance_scale={given.guidance}", "training.ratio_tolerance=1e-3"]
        config = load_config(DdpoConfig, None, [*SETTINGS, *asked, *(SMALLER if given.sd15 else [])])
        plan = preflight_ddpo(config)
        with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
            activations = elsewhere.submit(foreseen_activations, config, plan.roles).result()
        known = memory_of(config, plan.roles, plan.offers, activations)
        print("\n".join(memory_lines(known)))
        foreseen = {each["role"]: each["process"] for each in known["roles"]}
        summary = json.loads(run_ddpo(config).read_text())
        lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
        commits = sum(file.stat().st_size for file in (directory / "run" / "checkpoints").rglob("*.safetensors")) / 2
        kind = f"LoRA of rank {given.lora_rank}" if given.lora_rank else "whole"
        print(f"\ncommit {git_commit()}, {size / 1e9:.2f} GB of weights, {kind}, a commit of {commits / 1e6:,.0f} MB")
        for process, peak in summary["peak_memory_bytes"].items():
            planned = foreseen.get(process.split()[0])
            told = f"   planned {planned / 1e9:6.2f}, {peak['memory'] / planned - 1:+.0%}" if planned else ""
            print(f"{process:<12}{peak['memory'] / 1e9:8.2f} GB{told}")
        print(f"{'store':<12}{lines[-1]['object_store_bytes'] / 1e9:8.2f} GB")
        print("CPU seconds in all", summary["cpu_seconds"])
        print("seconds", {stage: round(each, 1) for stage, each in summary["seconds_by_stage"].items()})


if __name__ == "__main__":
    main()
