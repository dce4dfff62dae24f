"""One run by two states of this repository, in turns: CPU seconds, seconds of each stage, memory, the object store.

    git worktree add /tmp/before 4f89436
    python -m benchmarks.before_after /tmp/before [--rounds 3] [--channels 704 1120] [key=value …]

``/tmp/before`` is another checkout, run in its own environment (``make .venv/.ready`` there) or in this one. By default
twenty steps of the demonstration; with ``--channels`` two steps of a Stable Diffusion of random weights, as
benchmarks/footprint.py makes them. Medians of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.footprint import SETTINGS
from benchmarks.shared_pipelines import random_pipeline
from orchestration.runs.manifest import git_commit
from pipelines.storage.locations import CHECKOUT

DEMONSTRATION = ["--config", "configs/ddpo/digits.yaml", "training.steps=20", "evaluation.every=20"]
DEMONSTRATION += ["evaluation.images=216", "tracking.system_metrics=false"]


def measured(checkout: Path, words: list[str], directory: Path) -> dict[str, float]:
    """Figures of one run by a checkout."""
    own = checkout / ".venv/bin/python"
    command = [
        str(own) if own.exists() else sys.executable,
        "-m",
        "orchestration.cli",
        "ddpo",
        *words,
        f"output_dir={directory}",
    ]
    subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True, capture_output=True
    )
    summary = json.loads((directory / "summary.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {"CPU seconds": summary["cpu_seconds"], "accuracy": summary.get("evaluator_accuracy_after", 0.0)}
    found |= {f"{stage} s": seconds for stage, seconds in summary["seconds_by_stage"].items()}
    found |= {f"{name} GB": peak["memory"] / 1e9 for name, peak in summary["peak_memory_bytes"].items()}
    return found | {"object store GB": max(line.get("object_store_bytes", 0.0) for line in lines) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs=2)
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("before", "now")}
    with tempfile.TemporaryDirectory() as place:
        words = DEMONSTRATION
        if chosen.channels:
            (prompts := Path(place, "prompts.txt")).write_text("a red seven\na blue two\n")
            with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
                elsewhere.submit(random_pipeline, tuple(chosen.channels), Path(place, "pipeline")).result()
            words = [*SETTINGS, f"prompts={prompts}", f"model.path={place}/pipeline", "training.ratio_tolerance=1e-3"]
        for number in range(chosen.rounds):
            for name, checkout in (("before", chosen.before.resolve()), ("now", CHECKOUT)):
                found = measured(checkout, [*words, *chosen.overrides], Path(place, f"{name}{number}"))
                for key, value in found.items():
                    rows[name][key].append(value)
                print(f"round {number}, {name}: {found['CPU seconds']:.1f} CPU s", flush=True)
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=chosen.before, capture_output=True, text=True)
    print(f"\nbefore: {told.stdout.strip()}, now: {git_commit()[:7]}; medians of {chosen.rounds} {chosen.overrides}")
    for key in rows["now"]:
        old, new = (statistics.median(rows[name][key]) if key in rows[name] else float("nan") for name in rows)
        print(f"{key:<20}{old:>10.3f}{new:>10.3f}{new / old if old else float('nan'):>8.2f}")


if __name__ == "__main__":
    main()
