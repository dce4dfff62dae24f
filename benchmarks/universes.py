"""Gaussian universes: how many universe-generations a second the loop's tasks make, against a plain NumPy loop.

    python -m benchmarks.universes [--universes 1000] [--generations 20] [--rounds 7]

Both draw from the same streams and do the same arithmetic to the same four metrics; the figures are compared before
the times are. The loop does one universe after the other; the tasks run as a MAD run runs them, seed block by seed
block, with their manifests, packed models and JSON, in this process. One thread, alternating, CPU seconds, medians.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np

from orchestration.experiments.mad.config import ArmSettings
from orchestration.experiments.mad.loop import chain
from orchestration.experiments.mad.preflight import seed_blocks
from orchestration.runs.manifest import git_commit
from pipelines.mad.graph import RealSource
from pipelines.mad.tasks import perform
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import in_order
from policies.common.seeding import derive_seed
from policies.loops.training_sets import training_sets

METRICS = ("w2_squared", "variance", "mean_square", "log_det")
LOOPS: dict[str, dict[str, Any]] = {
    "fully synthetic, d = 1, n = 50": {"rule": "fully_synthetic", "dimension": 1, "n_ini": 50, "n_synthetic": 50},
    "fully synthetic, d = 3, n = 20": {"rule": "fully_synthetic", "dimension": 3, "n_ini": 20, "sampling_bias": 0.9},
    "fresh, d = 3, n = 5 + 15": {"rule": "fresh", "dimension": 3, "n_ini": 10, "n_real": 5, "n_synthetic": 15},
    "fresh, d = 30, n = 50 + 50": {"rule": "fresh", "dimension": 30, "n_ini": 100, "n_real": 50, "n_synthetic": 50},
}


def as_tasks(arm: ArmSettings, generations: int, universes: int) -> np.ndarray:
    """Metrics (4, universes, generations) as the tasks of a run make them."""
    together = []
    for seeds in seed_blocks(list(range(universes)), arm, training_sets(arm.loop, generations, None)):
        results: dict[str, Files] = {}
        found = []
        for generation in chain("arm", arm, seeds, generations, RealSource(100)):
            for task in in_order([generation.measure]):
                if task.key not in results:
                    inputs = [results[each.key] for each in task.inputs]
                    results[task.key] = perform(task.kind, task.parameters, inputs, "cpu")
            found.append(json.loads(results[generation.measure.key]["metrics.json"])["metrics"])
        together.append([[each[name] for each in found] for name in METRICS])
    return np.concatenate([np.array(block).swapaxes(1, 2) for block in together], axis=1)


def as_loop(arm: ArmSettings, generations: int, universes: int) -> np.ndarray:
    """The same metrics, one universe and generation after the other."""
    found = np.empty((4, universes, generations))
    for seed in range(universes):
        mean, covariance, used = np.zeros(0), np.zeros(0), 0
        for number in range(1, generations + 1):
            real, drawn = (arm.loop.initial(), 0) if number == 1 else arm.loop.sizes(number, generations)
            parts = []
            if real:
                stream = np.random.default_rng(derive_seed(seed, "real", used))
                parts.append(stream.standard_normal((real, arm.dimension)))
                used += real
            if drawn:
                stream = np.random.default_rng(derive_seed(seed, "sampling", number - 1, 0))
                root = np.linalg.cholesky(arm.sampling_bias * covariance)
                parts.append(mean + stream.standard_normal((drawn, arm.dimension)) @ root.T)
            data = np.concatenate(parts)
            mean, covariance = data.mean(axis=0), np.atleast_2d(np.cov(data.T))
            eigenvalues = np.linalg.eigvalsh(covariance)
            w2_squared = mean @ mean + np.sum((np.sqrt(eigenvalues) - 1) ** 2)
            found[:, seed, number - 1] = w2_squared, eigenvalues.mean(), np.mean(mean**2), np.log(eigenvalues).sum()
    return found


def main() -> None:
    """Print universe-generations a second of both, and how far apart their figures are at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--universes", type=int, default=1000)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    print(f"commit {git_commit()}, numpy {np.__version__}, one thread, {chosen.rounds} rounds")
    print("universe-generations a CPU second         NumPy loop       tasks   ratio   largest difference")
    for name, settings in LOOPS.items():
        arm = ArmSettings(family="gaussian", **settings)
        makers, spent = (as_loop, as_tasks), {as_loop: [], as_tasks: []}  # type: ignore[var-annotated]
        loop, tasks = (make(arm, 3, 20) for make in makers)  # nobody's first call is timed
        for _ in range(chosen.rounds):
            figures = []
            for make in makers:
                began = time.process_time()
                figures.append(make(arm, chosen.generations, chosen.universes))
                spent[make].append(time.process_time() - began)
            loop, tasks = figures
        apart = np.abs(tasks - loop).max() / np.abs(loop).max()
        if not apart < 1e-9:
            raise SystemExit(f"{name}: the figures differ by {apart:.1e} of the largest one, so times mean nothing")
        rates = [chosen.universes * chosen.generations / statistics.median(spent[make]) for make in makers]
        print(f"{name:<40}{rates[0]:>12,.0f}{rates[1]:>12,.0f}{rates[1] / rates[0]:>8.2f}   {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()
