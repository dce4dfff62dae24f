"""What remembering several models is worth (MAD, 2307.01850, figure 30), held against the memory loop's exact law.

    python -m benchmarks.memory_law [--config configs/mad/memory.yaml] [--seeds 100]

The tasks of a run, one after the other in this process. Of the last quarter of the generations it prints E W2² and the
law's, how many standard errors they are apart, n_e/n_r with its 95 % interval over seeds, the law's, and where that
tends to. Exits with 1 if one is more than 3 apart.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np

from orchestration.experiments.mad.analysis import effective_samples, laws, limit
from orchestration.experiments.mad.config import ArmSettings, MadConfig
from orchestration.experiments.mad.loop import chain
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.mad.graph import RealSource
from pipelines.mad.tasks import perform
from pipelines.storage.atomic import Files


def distances(arm: ArmSettings, seeds: list[int], generations: int) -> np.ndarray:
    """W2² (seeds, generations), nan before the last quarter."""
    fitted: dict[str, Files] = {}
    found = np.full((len(seeds), generations), np.nan)
    for each in chain("arm", arm, seeds, generations, RealSource(100)):
        fitted[each.fit.key] = perform(
            "fit", each.fit.parameters, [fitted[task.key] for task in each.fit.inputs], "cpu"
        )
        if each.number > generations - generations // 4:
            files = perform("measure", each.measure.parameters, [fitted[each.fit.key]], "cpu")
            found[:, each.number - 1] = json.loads(files["metrics.json"])["metrics"]["w2_squared"]
    return found


def main() -> int:
    """Print a line an arm; returns how many disagree with the law."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/mad/memory.yaml"))
    parser.add_argument("--seeds", type=int, default=100)
    chosen = parser.parse_args()
    config = load_config(MadConfig, chosen.config, [f"seeds={chosen.seeds}"])
    print(
        f"commit {git_commit()}, {chosen.seeds} seeds, {config.generations} generations, dimension {config.dimension}"
    )
    print("               E W2²     law   apart  n_e/n_r     95 % interval     law   limit  CPU seconds")
    wrong = 0
    for name, arm in config.resolved_arms.items():
        began = time.process_time()
        values = distances(arm, config.seed_list, config.generations)
        reached, exact = limit(values), float(limit(laws(arm, config.generations)["w2_squared"][None])[0])
        apart = (reached.mean() - exact) / (reached.std(ddof=1) / np.sqrt(len(reached)))
        worth = effective_samples(arm, {"w2_squared": values}, config)["n_e_over_n_r"]
        n_real, _ = arm.loop.sizes(2, config.generations)
        law, end = (arm.dimension / each / n_real for each in (exact, laws(arm, 2000)["w2_squared"][-1]))
        interval = f"[{worth['low']:.2f}, {worth['high']:.2f}]"
        print(
            f"{name:<12}{reached.mean():8.4f}{exact:8.4f}{apart:+8.2f}{worth['value']:9.3f}{interval:>18}{law:8.3f}{end:8.3f}"
            f"{time.process_time() - began:13.0f}",
            flush=True,
        )
        wrong += int(not abs(apart) <= 3)  # nan, of one seed or no generation, agrees with nothing
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main()))
