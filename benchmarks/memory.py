"""Does a long run grow? What the object store holds after every step, and each actor's memory on the way.

    python -m benchmarks.memory [--steps 200] [key=value …]

Short steps of the default models. Exit status 1 if the object store does not come back, after every step, to what it
held after the fifth.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.loop import run_ddpo
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.ddpo.worker_group import WorkerGroup
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit

WARM, SLACK = 5, 1.01  # steps before the baseline, and what may be held above it
SHORT = ["training.images_per_step=32", "sampling.steps=4", "evaluation.every=0", "tracking.system_metrics=false"]
SHORT += ["evaluation.images=32", "evaluation.interim_images=32", "actors.images_per_call=16", "checkpoint.every=50"]


def settled() -> float:
    """Bytes in the object store, once Ray reports the same twice: what is in flight at depth 1 is drawn by then."""
    before, now = -1.0, WorkerGroup.footprint()["object_store_bytes"]
    deadline = time.monotonic() + 30
    while now != before and time.monotonic() < deadline:
        time.sleep(0.5)
        before, now = now, WorkerGroup.footprint()["object_store_bytes"]
    return now


def resident() -> dict[str, float]:
    """Megabytes of the driver and of its actors."""
    found: dict[str, float] = defaultdict(float)
    found["driver"] = psutil.Process().memory_info().rss / 1e6
    for child in psutil.Process().children(recursive=True):
        name = child.cmdline()[0] if child.is_running() and child.cmdline() else ""
        if name.startswith("ray::") and "IDLE" not in name and "Agent" not in name:
            found[f"{name.removeprefix('ray::').split('.')[0]} {child.pid}"] = child.memory_info().rss / 1e6
    return dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    held: list[float] = []
    memory: dict[int, dict[str, float]] = {}

    def watch(run: DdpoRun) -> None:
        held.append(settled())
        print(f"step {run.step:>4}  object store {held[-1] / 1e6:.3f} MB", flush=True)
        if run.step in (10, 100, arguments.steps):
            memory[run.step] = resident()

    with tempfile.TemporaryDirectory() as directory:
        own = [f"output_dir={directory}/run", f"training.steps={arguments.steps}", *SHORT, *arguments.overrides]
        run_ddpo(load_config(DdpoConfig, Path("configs/ddpo/digits.yaml"), own), watch)
    print(f"\ncommit {git_commit()}, {' '.join(arguments.overrides)}\nresident memory, MB, after so many steps")
    for name in memory[arguments.steps]:
        print(f"{name:<28}" + "".join(f"{step:>6}: {each.get(name, 0):<7.0f}" for step, each in memory.items()))
    baseline, worst = held[min(WARM, len(held)) - 1], max(held[WARM - 1 :])
    back = worst <= SLACK * baseline
    print(f"object store: {baseline / 1e6:.3f} MB after step {WARM}, {worst / 1e6:.3f} MB at most after it: ", end="")
    print("it comes back" if back else "IT GROWS")
    return 0 if back else 1


if __name__ == "__main__":
    sys.exit(main())
