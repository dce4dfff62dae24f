"""Does the demonstration keep its promise? Runs it with three seeds and prints what each gained, and the verdicts.

    python -m benchmarks.demo_acceptance [--output runs/acceptance] [--seeds 0 1 2] [key=value …]

A seed whose summary.json is there is not run again; one that was interrupted is resumed (its wall time is then a sum).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestration.runs.manifest import git_commit
from pipelines.storage.locations import CHECKOUT

# As ``make demo`` has it.
DEMO = ["--config", str(CHECKOUT / "configs/ddpo/digits.yaml")]
DEMO += ["--config", str(CHECKOUT / "configs/recipes/five-calls.yaml"), "training.steps=25"]
MINUTES, MEDIAN_GAIN, LEAST_GAIN, AGREEMENT_LOSS, BASE_RANGE = 8, 0.15, 0.10, 0.02, (0.45, 0.70)


def run(directory: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The summary of one seed's run, started, resumed or read."""
    path = directory / "summary.json"
    if not path.exists():
        if (directory / "manifest.json").exists():
            arguments = ["resume", str(directory)]
        else:
            arguments = ["ddpo", *DEMO, f"seed={seed}", f"output_dir={directory}", *overrides]
        subprocess.run([sys.executable, "-m", "orchestration.cli", *arguments], check=True, cwd=CHECKOUT)
    return json.loads(path.read_text())


def verdicts(summaries: list[dict[str, Any]]) -> dict[str, bool]:
    """Each promise, and whether these runs keep it."""
    gains = [s["evaluator_accuracy_after"] - s["evaluator_accuracy_before"] for s in summaries]
    bases = [s["evaluator_accuracy_before"] for s in summaries]
    losses = [s["agreement_before"] - s["agreement_after"] for s in summaries]
    return {
        f"at most {MINUTES} minutes each": max(s["wall_seconds"] for s in summaries) <= 60 * MINUTES,
        "at least 1,000 images judged": min(s["evaluation_images"] for s in summaries) >= 1000,
        f"base accuracy in {BASE_RANGE}": all(BASE_RANGE[0] <= base <= BASE_RANGE[1] for base in bases),
        f"median gain at least {MEDIAN_GAIN}": statistics.median(gains) >= MEDIAN_GAIN,
        f"every gain at least {LEAST_GAIN}": min(gains) >= LEAST_GAIN,
        f"agreement falls by at most {AGREEMENT_LOSS}": max(losses) <= AGREEMENT_LOSS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    summaries = [run(arguments.output / f"seed-{seed}", seed, arguments.overrides) for seed in arguments.seeds]

    print(f"\ncommit {git_commit()}")
    print("seed  accuracy            gain    agreement           reward              wall s   CPU s")
    for s in summaries:
        names = ("evaluator_accuracy", "agreement", "reward")
        pairs = [f"{s[f'{name}_before']:.3f} → {s[f'{name}_after']:.3f}" for name in names]
        gain = s["evaluator_accuracy_after"] - s["evaluator_accuracy_before"]
        print(f"{s['seed']:>4}  {pairs[0]:<18}  {gain:+.3f}  {pairs[1]:<18}  {pairs[2]:<18}", end="")
        print(f"  {s['wall_seconds']:>6.1f}  {s['cpu_seconds']:>6.1f}")
    results = verdicts(summaries)
    for promise, kept in results.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
