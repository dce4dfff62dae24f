"""A learner and a sampler on a card that is not there, or on one that is, and the same on the CPU: run by
tests/test_devices.py, as a process of its own, because torch takes a kind of device for good.

    python -m tests.on_pretend_card PIPELINE LORA_RANK OBJECTIVE [cuda]

prints what differs and how often the card was waited for, as JSON.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import Weights
from pipelines.settings import ModelSettings
from pipelines.storage.checkpoint import LearnerState
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS
from tests.pretend_card import KIND, pretend_card

IMAGES = 6
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])


class Waits:
    """How often a card was waited for, by what was being done."""

    def __init__(self, counted: Counter[str]) -> None:
        self.counted, self.by_part = counted, dict[str, int]()

    def after(self, part: str) -> None:
        self.by_part[part] = sum(self.counted.values())
        self.counted.clear()


def two_steps(
    model: ModelSettings, objective: str, device: str, waits: Waits, first: LearnerState | None = None
) -> dict[str, Any]:
    """From a ``first`` state: draw, learn, publish; commit, restore and do it once more."""
    nft = objective == "negative_aware"
    cache = (2, 0) if model.lora_rank and not nft else None
    sampling = SamplingSettings(steps=4, guidance_scale=1.0 if nft else 2.0, cache=cache)
    training = TrainingSettings(
        images_per_step=IMAGES,
        images_per_prompt=2,
        updates_per_step=2,
        micro_batch=8,
        objective=objective,
        kl_weight=0.0 if nft else 0.1,
        ema_decay=0.5,
        learning_rate=1e-3,
    )
    sampler, learner = DiffusionPolicy(model, sampling, device), DiffusionLearner(model, sampling, training, 0, device)
    first = first or learner.state()
    learner.restore(first)
    waits.after("start")
    learner.find_ratio_bound(PROMPTS[:2])
    waits.after("rounding")
    prompts, images = [PROMPTS[index // 2] for index in range(IMAGES)], []
    for step in range(2):
        drawn, trajectory = sampler.rollout(prompts, range(IMAGES), step)
        images.append(drawn)
        waits.after("draw")
        statistics, changed = learner.learn(trajectory, ADVANTAGE, seed=step)
        waits.after("learn")
        sampler.load(learner.weights())
        waits.after("publish")
        if not step:
            state = learner.state()
            waits.after("commit")
            learner = DiffusionLearner(model, sampling, training, 1, device)
            waits.after("start")
            learner.restore(state)
            waits.after("restore")
    divergence = sampler.divergence(trajectory)
    moments = [value for each in learner.learner.moments() for value in each.values()]
    held = [*learner.policy.network.parameters(), *learner.masters.values(), *learner.average.values(), *moments]
    found = {"images": images, "loss": statistics.loss, "changed": changed, "divergence": divergence}
    return found | {
        "first": first,
        "weights": learner.weights(),
        "on card": sum(each.device.type != "cpu" for each in held) / len(held),
    }


def apart(one: Weights, other: Weights) -> float:
    """The largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def main(pipeline: str, rank: str, objective: str, device: str = KIND) -> None:
    torch.set_num_threads(1)
    model = ModelSettings(path=pipeline, lora_rank=int(rank))
    here = two_steps(model, objective, "cpu", Waits(Counter()))
    with pretend_card() if device == KIND else nullcontext(Counter[str]()) as counted:
        waits = Waits(counted)
        there = two_steps(model, objective, device, waits, here["first"])
    levels = [np.abs(a.astype(int) - b).max() for a, b in zip(here["images"], there["images"], strict=True)]
    found = {"images": int(max(levels)), "weights": apart(here["weights"], there["weights"]), "waits": waits.by_part}
    found |= {name: (here[name], there[name]) for name in ("loss", "changed", "on card")}
    found["divergence"] = float(np.abs(here["divergence"] - there["divergence"]).max())
    print(json.dumps(found | {"tensors": len(here["weights"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
