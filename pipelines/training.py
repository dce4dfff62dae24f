"""Supervised training, as every small model here is trained: AdamW down a loss that is new at each step."""

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Loss = Callable[[], Tensor]  # of a new batch


def descend(
    network: nn.Module, loss_of: Loss, steps: int, optimizer: Optimizer, schedule: Any, clip: float = inf
) -> Iterator[tuple[int, Tensor]]:
    """Take ``steps`` steps with gradients of norm ``clip`` at most; yields the number and the loss of each."""
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        if clip < inf:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        schedule.step()
        yield step, loss.detach()


def train(
    network: nn.Module,
    loss_of: Loss,
    steps: int,
    rate: float,
    tell: Callable[[str], None] | None = None,
    warmup: float = 0.3,
    clip: float = inf,
    **options: Any,
) -> None:
    """Descend on a one-cycle schedule that peaks at ``rate`` after the share ``warmup`` of ``steps``.

    ``options`` are AdamW's own; ``tell`` hears of the loss every 250 steps.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
    for step, loss in descend(network, loss_of, steps, optimizer, schedule, clip):
        if tell and step % 250 == 0:
            tell(f"step {step}/{steps}, loss {loss.item():.4f}")
