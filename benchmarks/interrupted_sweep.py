"""A sweep that is killed half way and continued: what was finished is not run again, and nothing is left open.

``python -m benchmarks.interrupted_sweep CONFIG DIRECTORY`` starts the sweep in a process of its own, ends that process
and all its children with SIGKILL once half of the trials are over, and goes on. Given again, it goes on where it was.
"""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from mlflow import MlflowClient

from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.trial import trials_in
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit


def main(config: Path, directory: Path) -> int:
    """Run, kill, continue, print, and return how many promises were broken."""
    settings = load_config(SweepConfig, config)
    half = (len(settings.points) or settings.trials) * settings.seeds // 2
    command = [sys.executable, "-m", "orchestration.cli", "sweep", "--config", str(config), f"output_dir={directory}"]
    if len(_over(directory)) < half:
        first = subprocess.Popen(command)
        while len(_over(directory)) < half and first.poll() is None:
            time.sleep(0.2)
        family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        first.wait()
    before = _over(directory)
    print(f"\nkilled with {len(before)} trials over: {', '.join(before)}\n", flush=True)
    code = subprocess.run(command).returncode
    summary = json.loads((directory / "summary.json").read_text())

    client = MlflowClient(f"sqlite:///{(directory / 'mlflow.db').resolve()}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    ends = Counter(run.info.status for run in runs)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == summary["mlflow_run_id"]]
    print(f"\ncommit {git_commit()}\nMLflow runs {dict(ends)}, {len(below)} directly below the sweep's")
    print(f"trials {dict(Counter(each['status'] for each in summary['trials']))}, best {summary['best']['point']}")
    print(f"confirmation {summary['confirmation']}\n{summary['wall_seconds']} s in all")
    after = _over(directory)
    promises = {
        "the continued sweep ended well": code == 0,
        "no trial that was over was run again": all(after[name] == when for name, when in before.items()),
        "no MLflow run is left open": ends["RUNNING"] == 0,
        "every trial has its run below the sweep's": len(below) == len(summary["trials"]),
        "every trial is over": len(after) == len(summary["trials"]),
    }
    for promise, kept in promises.items():
        print(f"{'kept' if kept else 'BROKEN':<8}{promise}")
    return sum(not kept for kept in promises.values())


def _over(directory: Path) -> dict[str, float]:
    """The trials that are over, and when they last wrote what they measured."""
    written = {}
    for trial in trials_in(directory):
        files = [trial.directory / name for name in ("metrics.jsonl", "summary.json")]
        if trial.over():
            written[trial.name] = max(file.stat().st_mtime for file in files if file.exists())
    return written


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
