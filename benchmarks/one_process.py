"""A DDPO run in one process, without Ray: for a search of settings, when CPU seconds tell more than wall time.

    python -m benchmarks.one_process --config configs/ddpo/digits-lora.yaml [--out FILE] [key=value …]

It computes what ``ouroboros ddpo`` computes (same prompts, seeds, calls and updates), and prints a line an evaluation.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from orchestration.config import DdpoConfig, load_config
from orchestration.evaluation import Evaluation, fixed_work
from orchestration.preflight import read_prompts
from orchestration.run import git_commit
from pipelines.captioner import Captioner
from pipelines.diffusion import DiffusionPolicy
from pipelines.evaluator import load_evaluator
from pipelines.learning import DiffusionLearner
from pipelines.locations import resolve_model
from pipelines.rewards import load_reward, score
from pipelines.trainable import load_weights
from pipelines.trajectory import Trajectory
from policies.advantages import PromptStatistics, advantages
from policies.streams import PromptSchedule, derive_seed


class OneProcess:
    """Every role of a run, one after another."""

    def __init__(self, config: DdpoConfig) -> None:
        self.config = config
        self.learner = DiffusionLearner(
            config.model, config.sampling, config.training, derive_seed(config.seed, "initialisation")
        )
        self.sampler = DiffusionPolicy(config.model, config.sampling)
        self.captioner = Captioner(config.captioner)
        self.reward = load_reward(config.reward)
        self.evaluator = load_evaluator(resolve_model(str(config.evaluation.evaluator)))
        self.prompts = read_prompts(config.prompts)
        self.spent: dict[str, float] = {"sample": 0.0, "reward": 0.0, "learn": 0.0}

    def draw(self, prompts: list[str], seeds: list[int], version: int) -> tuple[np.ndarray, list[Trajectory]]:
        """Images and trajectories, in a sampler's calls."""
        size = self.config.actors.images_per_call
        parts = [
            self.sampler.rollout(prompts[at : at + size], seeds[at : at + size], version)
            for at in range(0, len(prompts), size)
        ]
        return np.concatenate([images for images, _ in parts]), [trajectory for _, trajectory in parts]

    def evaluate(self, count: int) -> Evaluation:
        """The held-out measure of a run."""
        prompts, seeds = fixed_work(self.prompts, count)
        images, _ = self.draw(prompts, seeds, 0)
        captions = self.captioner.caption(images)
        scores = score(self.reward, images, prompts, captions)
        verdict = self.evaluator.judge(images, prompts), self.evaluator.slots(images)
        return Evaluation.collect(prompts, [images], [captions], [scores], [verdict])

    def train(self, step: int, prompts: PromptSchedule, history: PromptStatistics) -> dict[str, float]:
        """One step."""
        config, training = self.config, self.config.training
        asked = [prompt for prompt in prompts.batch(step) for _ in range(training.images_per_prompt)]
        seeds = [derive_seed(config.seed, "sampling", step, image) for image in range(len(asked))]
        clock = [time.process_time()]
        images, trajectories = self.draw(asked, seeds, self.learner.weights_version)
        clock.append(time.process_time())
        scores = score(self.reward, images, asked, self.captioner.caption(images))
        advantage = advantages(scores, asked, config.advantage, history)
        clock.append(time.process_time())
        statistics, _ = self.learner.learn(
            Trajectory.concatenate(trajectories), advantage, derive_seed(config.seed, "timesteps", step)
        )
        load_weights(self.sampler.network, self.learner.weights())
        clock.append(time.process_time())
        for name, seconds in zip(self.spent, np.diff(clock), strict=True):
            self.spent[name] += float(seconds)
        first = max(statistics.first_update_error.values())
        numbers = {"reward": float(scores.mean()), "first_update_error": first}
        return numbers | {key: getattr(statistics, key) for key in ("clip_fraction", "approximate_kl", "gradient_norm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo/digits-lora.yaml"))
    parser.add_argument("--out", type=Path, help="write every line as JSON to this file, too")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(DdpoConfig, arguments.config, arguments.overrides)
    run = OneProcess(config)
    training = config.training
    schedule = PromptSchedule(run.prompts, training.prompts_per_step, config.seed)
    history = PromptStatistics(config.advantage.history_size, config.advantage.history_minimum)
    print(f"commit {git_commit()}, seed {config.seed}, {' '.join(arguments.overrides)}", flush=True)
    for step in range(training.steps):
        numbers = run.train(step, schedule, history)
        if measured := config.evaluation.size_after(step + 1, training.steps):
            found = run.evaluate(measured).metrics()
            line = {"step": step + 1, "images": measured, **numbers, **found, "cpu_seconds": dict(run.spent)}
            names = ("evaluator/full", "evaluator/digit", "evaluation/reward", "evaluation/diversity")
            shown = "  ".join(f"{name.split('/')[1]} {found[name]:.3f}" for name in names if name in found)
            shown += f"  clipped {numbers['clip_fraction']:.2f}  kl {numbers['approximate_kl']:.2e}"
            shown += f"  ratio off by {numbers['first_update_error']:.1e}"
            print(f"step {step + 1:>3}  {shown}  CPU s {sum(run.spent.values()):.0f}", flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({"seed": config.seed, "settings": arguments.overrides, **line}) + "\n")


if __name__ == "__main__":
    main()
