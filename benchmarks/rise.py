"""How soon a run's accuracy has risen by .15, in CPU seconds: what is judged is reward per second, not images."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.one_process import OneProcess
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from policies.common.seeding import PromptSchedule
from policies.rl.advantages import PromptStatistics

RISE, JUDGED = 0.15, 1080
Schedule = Callable[[list[str], int, int, PromptStatistics], PromptSchedule]
Curve = list[dict[str, float]]  # steps, CPU seconds so far and accuracy, at each evaluation


def accuracy(run: OneProcess) -> float:
    """Over the held-out images. Its time is not counted."""
    return float(run.evaluate(JUDGED).metrics()["evaluator/full"])


def evaluations(
    configs: Sequence[Path],
    overrides: Sequence[str],
    every: int,
    steps: int,
    schedule: Schedule = lambda prompts, per_step, seed, _: PromptSchedule(prompts, per_step, seed),
) -> Iterator[dict[str, float]]:
    """Those of a run of this project, in one process."""
    config = load_config(DdpoConfig, configs, overrides)
    run = OneProcess(config)
    history = PromptStatistics(config.advantage.history_size)
    prompts = schedule(run.prompts, config.training.prompts_per_step, config.seed, history)
    for step in range(steps + 1):
        if step:
            run.train(step - 1, prompts, history)
        if step % every == 0:
            yield {"steps": step, "cpu": sum(run.spent.values()), "accuracy": accuracy(run)}


def until_risen(lines: Iterator[dict[str, float]], label: str) -> Curve:
    """Evaluations up to the first one that has risen enough."""
    curve: Curve = []
    for line in lines:
        curve.append(line)
        print(f"{label}: step {line['steps']:.0f} accuracy {line['accuracy']:.3f}, {line['cpu']:.1f} CPU s", flush=True)
        if line["accuracy"] >= curve[0]["accuracy"] + RISE:
            break
    return curve


class Record:
    """Curves by label, in a file: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._curves: dict[str, Curve] = json.loads(path.read_text()) if path.exists() else {}

    def curve(self, label: str, lines: Iterator[dict[str, float]]) -> Curve:
        """That of ``label``; ``lines`` are only computed if it is not known."""
        if label not in self._curves:
            self._curves[label] = until_risen(lines, label)
            self._path.write_text(json.dumps(self._curves))
        return self._curves[label]


def seconds_to_rise(curve: Curve) -> float:
    """CPU seconds until the rise, interpolated between two evaluations; infinite if it did not come."""
    goal = curve[0]["accuracy"] + RISE
    if curve[-1]["accuracy"] < goal:
        return float("inf")
    before, after = curve[-2:]
    share = (goal - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
    return before["cpu"] + share * (after["cpu"] - before["cpu"])
