"""What it takes to give a sampler new weights of Stable Diffusion 1.5's network: by the object store, and by broadcast.

    python -m benchmarks.publish [--dtype float32] [--lora-rank 16] [--samplers 1] [--rounds 3]

The actors of a run, without its steps: the learner gives its weights as they are, the samplers take them. On CPUs the
broadcast is Gloo's, which a run takes for cards alone, where it is NCCL's. Medians; the first round is left out.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from benchmarks.footprint import SETTINGS, SMALLER
from benchmarks.gpu_shapes import build_sd15
from orchestration.experiments.ddpo import worker_group
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import load_config
from orchestration.runs.display import Display
from orchestration.runs.manifest import git_commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--samplers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        pipeline = Path(place, "pipeline")  # made elsewhere: its memory is not the driver's
        with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
            elsewhere.submit(build_sd15, pipeline, "cpu", torch.float32).result()
        prompts = Path(place, "prompts.txt")
        prompts.write_text("a red seven\na blue two\n")
        asked = [f"model.path={pipeline}", f"model.lora_rank={given.lora_rank}", f"model.dtype={given.dtype}"]
        asked += [f"prompts={prompts}", f"actors.samplers={given.samplers}", "training.ema_decay=0"]
        config = load_config(DdpoConfig, None, [*SETTINGS, *SMALLER, *asked])
        kind = f"LoRA of rank {given.lora_rank}" if given.lora_rank else "whole"
        print(f"commit {git_commit()}: 860 M parameters, {kind}, {given.dtype}, samplers: {given.samplers}")
        for way, linkable in (("object store", worker_group.linkable), ("broadcast", lambda _: True)):
            worker_group.linkable = linkable
            print(f"{way:<14}" + measured(config, given.rounds), flush=True)


def measured(config: DdpoConfig, rounds: int) -> str:
    plan = preflight_ddpo(config)
    spent: list[tuple[float, float, float]] = []
    with worker_group.WorkerGroup(config, plan, Display(config.name, 1)) as workers:
        for number in range(rounds + 1):
            before, started = _cpu(workers), time.monotonic()
            update, weights = workers._learner("weights", "weights", "current")
            given = time.monotonic()
            workers._send(worker_group.PolicyVersion(number + 1, update.checksum, weights))
            workers.check_receipts()
            taken = time.monotonic()
            spent.append((given - started, taken - given, _cpu(workers) - before))
            stored = workers.footprint()["object_store_bytes"]
    out, into, cpu = (median(each[column] for each in spent[1:]) for column in range(3))
    rest = f"{cpu:6.1f} CPU s, {stored / 1e6:,.0f} MB in the object store"
    return f"the learner gives {out:6.2f} s, the samplers take {into:6.2f} s, {rest}"


def _cpu(workers: worker_group.WorkerGroup) -> float:
    return sum(
        each.cpu_seconds for name, each in workers.accounts().items() if name.split()[0] in ("learner", "sampler")
    )


if __name__ == "__main__":
    main()
