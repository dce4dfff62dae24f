"""Supervised training, as every small model here is trained: AdamW down a loss that is new at each step.

Several processes that do the same task can share it (:mod:`pipelines.sharing`): all draw the same batches, and each
computes its rows of them.
"""

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from pipelines.sharing import sharing

Draw = Callable[[], tuple[Tensor, ...]]  # a new batch: what is drawn at random is drawn here, a row for each example
Loss = Callable[..., Tensor]  # of the network and a batch, or some rows of it: their mean


def descend(
    network: nn.Module,
    draw: Draw,
    loss_of: Loss,
    steps: int,
    optimizer: Optimizer,
    schedule: Any,
    clip: float = inf,
    divisible: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Take ``steps`` steps with gradients of norm ``clip`` at most; yields the number and the loss of each.

    ``divisible``: whether the loss is a mean over rows, so that it can be computed in parts; that of a network with
    batch normalisation is none.
    """
    group = sharing().group
    divisible &= not any(isinstance(module, _BatchNorm) for module in network.modules())
    for step in range(1, steps + 1):
        batch = draw()
        optimizer.zero_grad()
        if group.size == 1 or not divisible:
            loss = loss_of(network, *batch)
            (loss / group.size if group.sharded else loss).backward()  # a sharded network adds up all gradients
        else:
            rows, own = group.share(*batch)
            part = own / len(batch[0])  # a sharded network is called even for none
            loss = loss_of(network, *(column[: max(own, 1)] for column in rows)) * part
            loss.backward()
            group.sum_gradients(network.parameters())
            loss = group.gather(loss.detach()[None]).sum()
        if clip < inf:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        schedule.step()
        yield step, loss.detach()


def train(
    network: nn.Module,
    draw: Draw,
    loss_of: Loss,
    steps: int,
    rate: float,
    tell: Callable[[str], None] | None = None,
    warmup: float = 0.3,
    clip: float = inf,
    divisible: bool = True,
    **options: Any,
) -> None:
    """Descend on a one-cycle schedule that peaks at ``rate`` after the share ``warmup`` of ``steps``.

    ``options`` are AdamW's own; ``tell`` hears of the loss every 250 steps.
    """
    with sharing().placed(network) as held:
        optimizer = torch.optim.AdamW(held.parameters(), lr=rate, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
        course = sharing().course(held, optimizer, schedule, steps)
        for _ in range(course.done):  # what follows is drawn as if nothing had been interrupted
            draw()
        left = steps - course.done
        for step, loss in descend(held, draw, loss_of, left, optimizer, schedule, clip, divisible):
            course.advance()
            if tell and (step + steps - left) % 250 == 0:
                tell(f"step {step + steps - left}/{steps}, loss {loss.item():.4f}")
