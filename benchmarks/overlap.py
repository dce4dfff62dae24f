"""Depth 0 against depth 1: seconds a step, CPU seconds, who is busy, and what is learned.

    python -m benchmarks.overlap [DIRECTORY] [--steps 12] [--rounds 5] [key=value …]

Each round runs every arm once, with the round as the seed, as ``ouroboros ddpo`` of configs/ddpo/digits.yaml; one that
is on record is not run again, one that was interrupted goes on. Prints medians over the rounds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.runs.manifest import git_commit
from orchestration.runs.timeline import nested, read_spans, steps_of
from pipelines.storage.atomic import read_lines

ARMS = {
    f"depth {depth}, {samplers} sampler{'s' * (samplers > 1)}": [
        f"training.depth={depth}",
        f"actors.samplers={samplers}",
    ]
    for samplers in (1, 2)
    for depth in (0, 1)
}
COMMON = ["evaluation.every=0", "evaluation.images=540", "tracking.system_metrics=false", "checkpoint.every=4"]


def measure(directory: Path, settings: list[str]) -> dict[str, Any]:
    """What a run cost and gave. It is made, or finished, if it is not there."""
    if not (directory / "summary.json").exists():
        new = ["ddpo", "--config", "configs/ddpo/digits.yaml", f"output_dir={directory}", *settings]
        words = ["resume", str(directory)] if (directory / "manifest.json").exists() else new
        subprocess.run([sys.executable, "-m", "orchestration.cli", *words], check=True, stdout=subprocess.DEVNULL)
    summary, lanes = json.loads((directory / "summary.json").read_text()), read_spans(directory)
    steps = steps_of(lanes)[1:-1]  # the first warms up, the last evaluates
    begin, end = steps[0][1], steps[-1][2]
    busy = {
        name: sum(max(0.0, min(b, end) - max(a, begin)) for _, a, b, depth, _ in nested(spans) if not depth)
        for name, spans in lanes.items()
        if name != "driver"
    }
    return {
        "seconds": float(np.median([ended - began for _, began, ended in steps])),
        "cpu": summary["cpu_seconds"] / summary["steps"],
        "accuracy": summary["evaluator_accuracy_after"],
        "gain": summary["evaluator_accuracy_after"] - summary["evaluator_accuracy_before"],
        "clipped": float(np.mean([line["policy/clip_fraction"] for line in read_lines(directory / "metrics.jsonl")])),
        **{f"busy {name}": seconds / (end - begin) for name, seconds in busy.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/overlap"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for number in range(arguments.rounds):
        for name, own in ARMS.items():
            settings = [*COMMON, *own, f"training.steps={arguments.steps}", f"seed={number}", *overrides]
            place = arguments.directory / f"{name.replace(', ', '-').replace(' ', '')}-{number}"
            found[name].append(measure(place, settings))
            print(name, number, {key: round(value, 3) for key, value in found[name][-1].items()}, flush=True)
    print(f"\ncommit {git_commit()}, {arguments.steps} steps, medians of {arguments.rounds} {' '.join(overrides)}")
    columns = ["seconds", "cpu", "accuracy", "gain", "clipped"]
    print(f"{'':<22}" + "".join(f"{column:>12}" for column in columns) + "   busy")
    for name, runs in found.items():
        values = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        shares = ", ".join(f"{key[5:]} {value:.0%}" for key, value in values.items() if key.startswith("busy"))
        print(f"{name:<22}" + "".join(f"{values[column]:>12.3f}" for column in columns) + f"   {shares}")


if __name__ == "__main__":
    main()
