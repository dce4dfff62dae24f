"""What it takes to fit a text-to-image model with one worker, and with two of Ray Train that share it.

    python -m benchmarks.train_workers DIRECTORY [KEY=VALUE ...]

One generation of ``configs/mad/text_to_image.yaml`` in turns, a CPU for each worker: seconds and processor seconds of
the fit without its start, how far the weights are apart, and what the judge says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.storage.tasks import TaskStore

SETTINGS = ["arms={}", "generations=1", "seeds=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    print(f"commit {git_commit()} {' '.join(given.overrides)}")
    first: dict[str, np.ndarray] = {}
    for workers in (1, 2):
        place = given.directory / str(workers)
        asked = [*SETTINGS, *given.overrides, f"output_dir={place}", f"workers.train_workers={workers}"]
        summary = json.loads(run_mad(load_config(MadConfig, Path("configs/mad/text_to_image.yaml"), asked)).read_text())
        about, weights = fit(place)
        first = first or weights
        apart = max(float(np.abs(weights[name] - first[name]).max()) for name in weights)
        spent = f"{about['wall_seconds']:.1f} s, {about['cpu_seconds']:.1f} CPU s"
        (metrics,) = (arm["metrics"] for arm in summary["arms"].values())
        said = {name: metrics[name]["mean"][-1] for name in ("fid", "recall", "prompt_accuracy")}
        print(f"{workers} worker(s): {spent}, weights apart by at most {apart:.1e}, {said}", flush=True)


def fit(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What is known of the only fit of a run, and its weights."""
    store = TaskStore(directory / "tasks")
    (key,) = [each.name for each in store.directory.iterdir() if store.about(each.name)["kind"] == "fit"]
    return store.about(key), load_file(store.path(key) / "trained.safetensors")


if __name__ == "__main__":
    main()
