"""Trains the independent judge on the split reserved for it, on images varied and degraded as generated ones are."""

from collections.abc import Callable

import torch
from torch.nn import functional

from pipelines.digits import CHOICES, IMAGE_SIZE, SLOTS
from pipelines.evaluator import Evaluator, EvaluatorNetwork
from pipelines.recipe.batches import DigitBatches, degrade

CHANNELS = 24
STEPS = 1200
BATCH_SIZE = 64
LEARNING_RATE = 3e-3


def train_evaluator(seed: int, progress: Callable[[str], None]) -> Evaluator:
    """The judge after ``STEPS`` steps on the ``evaluator`` split; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = DigitBatches("evaluator")
    classes = {slot: list(CHOICES[slot]) for slot in SLOTS}
    network = EvaluatorNetwork(classes, CHANNELS, IMAGE_SIZE).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(1, STEPS + 1):
        images, slots = batches.draw(BATCH_SIZE, generator, max_shift=1.5)
        logits = network(degrade(images, generator))
        losses = {
            slot: functional.cross_entropy(logits[slot], slots[:, i], label_smoothing=0.05)
            for i, slot in enumerate(SLOTS)
        }
        optimizer.zero_grad()
        (losses["digit"] + losses["ink"] + losses["ground"]).backward()
        optimizer.step()
        schedule.step()
        if step % 400 == 0:
            progress(f"evaluator: step {step}/{STEPS}, digit loss {losses['digit'].item():.3f}")
    return Evaluator(network, classes, IMAGE_SIZE)
