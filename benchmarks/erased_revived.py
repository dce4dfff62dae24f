"""Does reinforcement learning bring an erased concept back? Steps and reward queries until it does.

    python -m benchmarks.erased_revived MODEL [--concept red] [--base PIPELINE] [--seeds 1] [--steps 60]
                                        [--out DIRECTORY] [key=value …]

Trains configs/ddpo/digits.yaml on MODEL, such as runs/NAME/products/esd-x-seed0/red, with the prompts that name the
concept, until the evaluator, which rewards nothing, sees it in more than half as many of their images as in the base's.
One process, without Ray. Evaluations on record in DIRECTORY are not made again; a run that was interrupted begins anew.
"""

import argparse
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from benchmarks.one_process import OneProcess
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.data.prompts import read_prompts
from pipelines.storage.locations import fingerprint
from pipelines.studies.erase import Prompts
from policies.common.seeding import PromptSchedule, derive_seed
from policies.rl.advantages import PromptStatistics

CONFIG, JUDGED, EVERY = Path("configs/ddpo/digits.yaml"), 240, 2
Line = dict[str, float]  # steps, queries (of the reward) and rate


def rate(run: OneProcess, concept: str) -> float:
    """The share of images of the run's prompts in which the evaluator sees the concept."""
    asked = [run.prompts[image % len(run.prompts)] for image in range(JUDGED)]
    images, _ = run.draw(asked, [derive_seed(0, "revived", image) for image in range(JUDGED)], 0)
    seen = run.evaluator.slots(images)
    slot = next(name for name, words in run.evaluator.classes.items() if concept in words)
    return float(np.mean([word == concept for word in seen[slot]]))


def evaluations(overrides: list[str], concept: str, steps: int) -> Iterator[Line]:
    """Before the first step, and after every second."""
    config = load_config(DdpoConfig, CONFIG, overrides)
    run, history = OneProcess(config), PromptStatistics(config.advantage.history_size)
    prompts = PromptSchedule(run.prompts, config.training.prompts_per_step, config.seed)
    for step in range(steps + 1):
        if step:
            run.train(step - 1, prompts, history)
        if step % EVERY == 0:
            yield {"steps": step, "queries": step * config.training.images_per_step, "rate": rate(run, concept)}


def curve(file: Path, lines: Iterator[Line], goal: float) -> list[Line]:
    """The evaluations until the goal is passed or steps are over, of the file if it holds them whole."""
    if file.exists():
        return json.loads(file.read_text())
    found: list[Line] = []
    for line in lines:
        found.append(line)
        print(f"{file.stem}: {line['steps']} steps, {line['queries']} queries, rate {line['rate']:.3f}", flush=True)
        if line["rate"] > goal:
            break
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--concept", default="red")
    parser.add_argument("--base", default="models/digits/pipeline")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/revived"))
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    named = Prompts.of(arguments.concept, read_prompts("configs/prompts/digits.txt")[0]).named
    prompts = arguments.out / f"{arguments.concept}.txt"
    prompts.write_text("\n".join(named) + "\n")

    def lines(model: str, seed: int, steps: int) -> Iterator[Line]:
        own = [f"model.path={model}", f"prompts={prompts}", f"seed={seed}", *overrides]
        return evaluations(own, arguments.concept, steps)

    def record(model: str, seed: int, steps: int) -> Path:
        """Where the evaluations of a model are kept: a name for all that they depend on."""
        known = [fingerprint(model)["sha256"], CONFIG.read_text(), named, seed, steps, overrides]
        return arguments.out / f"{arguments.concept}-{sha256(json.dumps(known).encode()).hexdigest()[:12]}.json"

    base = curve(record(arguments.base, 0, 0), lines(arguments.base, 0, 0), 1.0)[0]["rate"]
    print(f"commit {git_commit()}: {arguments.concept} in {arguments.model}, back at a rate above {base / 2:.3f}")
    for seed in range(arguments.seeds):
        place = str(arguments.model), seed, arguments.steps
        found = curve(record(*place), lines(*place), base / 2)
        last = found[-1]
        back = "back" if last["rate"] > base / 2 else "not back"
        spent = f"{last['steps']} steps, {last['queries']} reward queries"
        print(f"seed {seed}: {found[0]['rate']:.3f} at first; {back} after {spent}: {last['rate']:.3f}")


if __name__ == "__main__":
    main()
