"""Is a run that goes too far stopped, and are its best weights kept? The digits at three times the learning rate.

``python -m benchmarks.over_optimisation [--output DIRECTORY]`` trains (or goes on, or reads) a run that commits every
five steps and is measured with 540 images there, measures every commit with 1,080 other ones, and prints the verdict.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.one_process import OneProcess
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import validate
from orchestration.runs.manifest import git_commit
from pipelines.storage.checkpoint import CheckpointStore, LearnerState
from pipelines.storage.locations import CHECKOUT
from policies.common.seeding import derive_seed

SETTINGS = ["training.learning_rate=3e-4", "training.steps=160", "evaluation.every=5", "evaluation.interim_images=540"]
IMAGES, TOLERANCE = 1080, 0.02


def run(directory: Path) -> None:
    """The run, begun, gone on with, or there."""
    if (directory / "summary.json").exists():
        return
    begin = ["ddpo", "--config", str(CHECKOUT / "configs/ddpo/digits.yaml"), *SETTINGS, "checkpoint.keep=100"]
    begin += [f"output_dir={directory}", "evaluation.images=540"]
    go_on = ["resume", str(directory)]
    words = go_on if (directory / "manifest.json").exists() else begin
    subprocess.run([sys.executable, "-m", "orchestration.cli", *words], check=True, cwd=CHECKOUT)


def measure(directory: Path) -> dict[int, float]:
    """Accuracy of every commit over images that no evaluation of the run has drawn."""
    torch.set_num_threads(1)
    config = validate(DdpoConfig, json.loads((directory / "manifest.json").read_text())["config"])
    record = directory / "every_commit.json"
    known = {int(step): value for step, value in json.loads(record.read_text()).items()} if record.exists() else {}
    workers, store = OneProcess(config), CheckpointStore(directory / "checkpoints")
    order = np.random.default_rng(derive_seed(1, "order")).permutation(len(workers.prompts))
    prompts = [workers.prompts[order[number % len(order)]] for number in range(IMAGES)]
    seeds = [derive_seed(1, "every commit", number) for number in range(IMAGES)]
    for step in store.steps():
        if step in known:
            continue
        commit = store.load(step)
        workers.learner.restore(LearnerState(commit.tensors, commit.state["weights_version"]))
        workers.sampler.load(workers.learner.weights())
        images, _ = workers.draw(prompts, seeds, 0)
        known[step] = float(workers.evaluator.judge(images, prompts)["full"].mean())
        record.write_text(json.dumps(known))
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/over_optimisation"))
    directory = parser.parse_args().output.resolve()
    run(directory)
    summary, found = json.loads((directory / "summary.json").read_text()), measure(directory)
    journal = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    print(f"commit {git_commit()}\n{'step':>5}  {IMAGES} other images  the run's own  reward  KL to the base")
    for line in journal:
        if line["step"] in found and "evaluator/full" in line:
            own, reward, kl = (
                line[f"{name}"] for name in ("evaluator/full", "evaluation/reward", "evaluation/kl_to_base")
            )
            print(f"{line['step']:>5}  {found[line['step']]:>17.3f}  {own:>13.3f}  {reward:>6.3f}  {kl:>14.1f}")
    kept, best = summary["kept_step"], max(found, key=lambda step: found[step])
    print(f"stopped: {summary['stopped']}")
    print(f"kept: step {kept}, {found[kept]:.3f}; best of all: step {best}, {found[best]:.3f}")
    promises = {
        "stopped by the held-out measure": summary["stopped"] is not None,
        f"kept within {TOLERANCE} of the best": found[best] - found[kept] <= TOLERANCE,
    }
    for promise, is_kept in promises.items():
        print(f"{'kept  ' if is_kept else 'BROKEN'}  {promise}")
    sys.exit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main()
