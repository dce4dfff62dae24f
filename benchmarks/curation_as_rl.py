"""Is a curated loop what reinforcement learning with a KL weight of 1/t finds, on a real text-to-image model?

``python -m benchmarks.curation_as_rl RUN`` reads a finished run of configs/mad/reward_gap.yaml, whose curated samples
hold the rewards of all candidates, and prints for t = 0, 1, … the mean reward of what generation 1 + t draws, beside
what t generations of curation make of generation 1's own samples by the exact law, if every model drew just what it was
fed, and beside the optimum p e^{tr} of reinforcement learning with a KL weight of 1/t to that model. Means and 95 %
intervals are over seeds. The laws hold for each prompt by itself, whose candidates (six, in the mean) stand for its
distribution.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from datasets import load_from_disk

from orchestration.runs.manifest import git_commit
from policies.common.intervals import interval
from policies.loops.curation import curated_categorical, tilted_categorical

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompts (n,), rewards of what was kept (n,), of candidates (n, K)


def main(run: Path) -> None:
    """Print all."""
    found: dict[int, dict[int, Rows]] = defaultdict(dict)  # generation → seed → rows
    for path in (run / "tasks").glob("[0-9a-f]*/manifest.json"):
        task = json.loads(path.read_text())
        about = task["parameters"]
        if task["kind"] == "sample" and about.get("selection") and about["count"] == 400:  # the arm without real data
            rows = load_from_disk(str(path.parent))
            prompt, reward, candidates = (np.array(rows[name]) for name in ("caption", "reward", "candidates"))
            found[about["generation"]][about["seeds"][0]] = prompt, reward, candidates
    first = found[min(found)]
    many = next(iter(first.values()))[2].shape[1]
    print(f"commit {git_commit()}, {len(first)} seeds, {many} candidates of a prompt")
    print(f"{'t':>2}{'drawn':>26}{'law of curation':>26}{'RL, KL weight 1/t':>26}{'kept of what is drawn':>26}{'z':>7}")
    for t, (_, seeds) in enumerate(sorted(found.items())):
        drawn = [rows[2].mean() for rows in seeds.values()]
        by_law = [_after(first[seed], t, partial(curated_categorical, candidates=many)) for seed in seeds]
        by_rl = [_after(first[seed], 1, partial(tilted_categorical, generations=t)) for seed in seeds]
        kept = [rows[1].mean() for rows in seeds.values()]
        print(f"{t:>2}{_told(drawn)}{_told(by_law)}{_told(by_rl)}{_told(kept)}{_deviation(list(seeds.values())):>7.2f}")


def _after(rows: Rows, times: int, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """The mean reward once the candidates' distribution has been changed so many times, prompt by prompt."""
    prompts, _, candidates = rows
    total = 0.0
    for prompt in np.unique(prompts):
        own = candidates[prompts == prompt]
        values, counts = np.unique(own, return_counts=True)
        p = counts / counts.sum()
        for _ in range(times):
            p = change(p, values)
        total += float(p @ values) * len(own) / len(prompts)
    return total


def _deviation(all_rows: list[Rows]) -> float:
    """Of the rewards of what was kept from their expectation given the candidates, in standard errors."""
    sums = np.zeros(2)
    for _, kept, candidates in all_rows:
        chances = np.exp(candidates - candidates.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        mean = (chances * candidates).sum(axis=1)
        sums += (kept - mean).sum(), (chances * (candidates - mean[:, None]) ** 2).sum()
    return float(sums[0] / np.sqrt(sums[1]))


def _told(values: list[float]) -> str:
    mean, low, high = (float(each) for each in interval(np.array(values)))
    return f"{f'{mean:.3f} [{low:.3f}, {high:.3f}]':>26}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
