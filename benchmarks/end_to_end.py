"""What Ray, MLflow and the rewards add: steps of real runs beside the bare network's arithmetic for the same.

    python -m benchmarks.end_to_end [--out runs/end-to-end] [--steps 8] [--guidance 5]

A run of ``ouroboros ddpo`` with one sampler, one learner, BLIP and sentence similarity, against a real MLflow server
over its port. After each step, while the actors idle, this process computes the floor: forward passes for sampling,
forward and backward passes for learning, in calls of the best size, one thread. The first two steps are not counted,
nor is starting up. CPU seconds are those of the driver, every actor and all of Ray's and MLflow's processes. Prints
medians over steps and the ratio floor / step by wall clock and by CPU, and asks for .90.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from actors.worker import keep_memory
from benchmarks.ddpo_vs_trl import IMAGES, RANK, STEPS, UPDATES
from benchmarks.floor import Floor
from benchmarks.shared_pipelines import SIZES, random_pipeline
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.loop import run_ddpo
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from tests.servers import MlflowServer

LEAST, COLD = 0.90, 2


def settings(pipeline: Path, lora: bool, guidance: float, steps: int, uri: str, directory: Path) -> DdpoConfig:
    """The same step as ``benchmarks.ddpo_vs_trl``, as a user would ask for it."""
    return load_config(
        DdpoConfig,
        None,
        [
            "name=end-to-end",
            f"output_dir={directory}",
            f"model.path={pipeline}",
            f"model.lora_rank={RANK * lora}",
            f"sampling.steps={STEPS}",
            f"sampling.guidance_scale={guidance}",
            f"training.steps={steps}",
            f"training.images_per_step={IMAGES}",
            f"training.updates_per_step={UPDATES}",
            "training.ratio_tolerance=1e-3",
            "evaluation.evaluator=null",
            "evaluation.images=8",
            "evaluation.interim_images=8",
            "evaluation.every=0",
            "checkpoint.every=1000",
            "actors.samplers=1",
            "actors.threads.learner=1",
            "actors.images_per_call=32",  # the first half is captioned and scored while the second is drawn
            f"tracking.uri={uri}",
        ],
    )


def tree_cpu_seconds() -> float:
    """CPU time of this process and of all below it, the dead ones apart."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure(config: DdpoConfig) -> list[dict[str, float]]:
    """Each counted step of a run, with the floor after it."""
    transitions = IMAGES // UPDATES * STEPS
    floor = Floor(config.model, config.sampling, IMAGES, transitions)
    rows: list[dict[str, float]] = []
    clock: list[float] = []

    def watch(run: DdpoRun) -> None:
        cpu, wall = tree_cpu_seconds(), time.perf_counter()
        bare = floor.sampling() + floor.learning()
        if clock and run.step > COLD:
            step = {"step cpu": cpu - clock[0], "step wall": wall - clock[1]}
            rows.append({**step, "floor cpu": bare.cpu, "floor wall": bare.wall})
        clock[:] = tree_cpu_seconds(), time.perf_counter()

    run_ddpo(config, watch)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/end-to-end"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    out = arguments.out.resolve() / git_commit()[:12] / time.strftime("%H%M%S")
    out.mkdir(parents=True)
    server = MlflowServer(out).start()
    rows: list[dict[str, Any]] = []
    try:
        for size, channels in SIZES.items():
            pipeline = random_pipeline(channels, out / size)
            for kind in ("whole", "LoRA"):
                steps, lora = arguments.steps + COLD, kind == "LoRA"
                directory = out / f"{size}-{kind}"
                found = measure(settings(pipeline, lora, arguments.guidance, steps, server.uri, directory))
                row = {name: median(step[name] for step in found) for name in found[0]}
                for kind_of_time in ("wall", "cpu"):
                    row[f"floor / step {kind_of_time}"] = median(
                        step[f"floor {kind_of_time}"] / step[f"step {kind_of_time}"] for step in found
                    )
                rows.append({"pipeline": size, "trained": kind, **row})
    finally:
        server.kill()
    print(f"commit {git_commit()}, {os.cpu_count()} cores, medians of {arguments.steps} steps")
    print("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{f'{v:.3f}' if isinstance(v, float) else v:>17}" for v in row.values()))
    (out / "table.json").write_text(json.dumps({"commit": git_commit(), "rows": rows}, indent=1))
    missed = sum(row["floor / step wall"] < LEAST for row in rows)
    print(f"{'kept' if not missed else 'MISSED'}: floor / step by wall clock ≥ {LEAST}")
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
