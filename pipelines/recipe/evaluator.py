"""Trains the independent judge on the split reserved for it, on images varied and degraded as generated ones are."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from pipelines.digits import CHOICES, IMAGE_SIZE, SLOTS
from pipelines.evaluator import Evaluator, EvaluatorNetwork
from pipelines.recipe.batches import DigitBatches, degrade
from pipelines.training import train

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

    def loss() -> torch.Tensor:
        images, slots = batches.draw(BATCH_SIZE, generator, max_shift=1.5)
        logits = network(degrade(images, generator))
        losses = [cross_entropy(logits[slot], slots[:, i], label_smoothing=0.05) for i, slot in enumerate(SLOTS)]
        return losses[0] + losses[1] + losses[2]

    train(network, loss, STEPS, LEARNING_RATE, progress, warmup=0.1, weight_decay=0.05)
    return Evaluator(network, classes, IMAGE_SIZE)
