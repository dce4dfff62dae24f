"""A DDPO run in one process, without Ray: for a search of settings, when CPU seconds tell more than wall time.

    python -m benchmarks.one_process --config configs/ddpo/digits-lora.yaml [--out FILE] [key=value …]

It computes what ``ouroboros ddpo`` computes (same prompts, seeds, calls and updates), and prints a line an evaluation.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation, fixed_work
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.captioner import Captioner
from pipelines.data.prompts import read_prompts
from pipelines.measures.evaluator import load_evaluator
from pipelines.rewards import load_reward, score
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.trajectory import Trajectory
from pipelines.storage.locations import resolve_model
from policies.common.seeding import PromptSchedule, derive_seed
from policies.rl.advantages import PromptStatistics, advantages, weighted_sum


class OneProcess:
    """Every role of a run, one after another."""

    def __init__(self, config: DdpoConfig) -> None:
        self.config = config
        self.learner = DiffusionLearner(
            config.model, config.sampling, config.training, derive_seed(config.seed, "initialisation")
        )
        self.sampler = DiffusionPolicy(config.model, config.sampling)
        self.frames = self.sampler.family.files.frames
        self.captioner = Captioner(config.captioner, frames=self.frames) if config.captioner.path else None
        rewards = config.reward.functions.items()
        self.rewards = {name: load_reward(name, options, frames=self.frames) for name, options in rewards}
        self.evaluator = load_evaluator(resolve_model(str(config.evaluation.evaluator)))
        self.prompts, self.unseen = read_prompts(config.prompt_files["path"])
        self.spent: dict[str, float] = {"sample": 0.0, "reward": 0.0, "learn": 0.0}

    def draw(
        self, prompts: list[str], seeds: list[int], version: int, to_learn: bool = False
    ) -> tuple[np.ndarray, list[Trajectory]]:
        """Images and trajectories, in a sampler's calls."""
        size, sampling = self.config.actors.images_per_call, self.config.sampling
        policy = self.sampler.by(sampling.at(version if to_learn else 0))
        parts = [
            policy.rollout(prompts[at : at + size], seeds[at : at + size], version)
            for at in range(0, len(prompts), size)
        ]
        return np.concatenate([images for images, _ in parts]), [trajectory for _, trajectory in parts]

    def evaluate(self, count: int) -> Evaluation:
        """The held-out measure of a run."""
        prompts, seeds = fixed_work([*self.prompts, *self.unseen], count)
        images, _ = self.draw(prompts, seeds, 0)
        captions = self.captioner.caption(images) if self.captioner else None
        scores = {name: score(each, images, prompts, captions) for name, each in self.rewards.items()}
        seen = self.evaluator.slots(images) if self.frames == 1 else {}
        verdict = self.evaluator.judge(images, prompts, self.frames), seen
        said = [] if captions is None else [captions]
        return Evaluation(prompts, [images], said, scores, [verdict], self.config.reward, self.unseen)

    def train(self, step: int, prompts: PromptSchedule, history: PromptStatistics) -> dict[str, float]:
        """One step."""
        config, training = self.config, self.config.training
        asked = [prompt for prompt in prompts.batch(step) for _ in range(training.images_per_prompt)]
        seeds = [derive_seed(config.seed, "sampling", step, image) for image in range(len(asked))]
        clock = [time.process_time()]
        images, trajectories = self.draw(asked, seeds, self.learner.weights_version, True)
        clock.append(time.process_time())
        captions = self.captioner.caption(images) if self.captioner else None
        weights = config.reward.weights
        scores = weighted_sum({n: score(self.rewards[n], images, asked, captions) for n in weights}, weights)
        advantage = advantages(scores, asked, config.advantage, history)
        clock.append(time.process_time())
        statistics, _ = self.learner.learn(trajectories, advantage, derive_seed(config.seed, "timesteps", step))
        self.sampler.load(self.learner.weights())
        clock.append(time.process_time())
        for name, seconds in zip(self.spent, np.diff(clock), strict=True):
            self.spent[name] += float(seconds)
        numbers = {"reward": float(scores.mean()), "gradient_norm": statistics.gradient_norm}
        if statistics.first_update_error:  # of the objectives that have a ratio
            numbers |= {"clipped": statistics.clip_fraction or 0.0, "kl": statistics.approximate_kl or 0.0}
            numbers["first_update_error"] = max(statistics.first_update_error.values())
        return numbers


def train(config: DdpoConfig) -> Iterator[dict[str, Any]]:
    """A whole run. Yields a line for each evaluation, the first before anything is learned."""
    run = OneProcess(config)
    training = config.training
    schedule = PromptSchedule(run.prompts, training.prompts_per_step, config.seed)
    history = PromptStatistics(config.advantage.history_size)
    numbers: dict[str, float] = {}
    for step in range(training.steps + 1):
        if step:
            numbers = run.train(step - 1, schedule, history)
        if measured := config.evaluation.size_after(step, training.steps):
            found = run.evaluate(measured).metrics()
            yield {"step": step, "images": measured, **numbers, **found, "cpu_seconds": sum(run.spent.values())}


def told(line: dict[str, Any]) -> str:
    """A line for people."""
    names = ("evaluator/full", "evaluator/digit", "evaluation/reward", "evaluation/diversity", "clipped", "kl")
    shown = "  ".join(f"{name.split('/')[-1]} {line[name]:.3g}" for name in names if name in line)
    return f"step {line['step']:>3}  {shown}  CPU s {line['cpu_seconds']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo/digits-lora.yaml"))
    parser.add_argument("--out", type=Path, help="write every line as JSON to this file, too")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(DdpoConfig, arguments.config, arguments.overrides)
    print(f"commit {git_commit()}, seed {config.seed}, {' '.join(arguments.overrides)}", flush=True)
    for line in train(config):
        print(told(line), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps({"seed": config.seed, "settings": arguments.overrides, **line}) + "\n")


if __name__ == "__main__":
    main()
