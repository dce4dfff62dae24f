"""What a step's objective sees: images with the paths that led to them, their advantages, and the network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from policies.common.seeding import derive_seed
from policies.diffusion.schedule import Reduction, Schedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (batch, channels, height, width), denoising steps (batch,), image indices (batch,)) → the network's output."""


class Latents(Protocol):
    """(images, T + 1, channels, height, width), of which only rows are asked for: a tensor, or what reads as one."""

    def __getitem__(self, where: tuple[Tensor, Tensor | int], /) -> Tensor:
        """Of images (batch,) the latents after so many denoising steps, (batch,) or one number."""


Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(image indices (batch,), denoising steps (batch,)) → the loss of each transition (batch,), and, where the objective
knows them, log p_θ − log p of the weights that drew (batch,)."""


@dataclass(frozen=True)
class Rollouts:
    """A step's images. ``latents`` (images, T + 1, channels, height, width), ``log_probs`` (images, T) in nats under
    the weights that drew them, ``advantage`` (images,). ``network`` is the one that learns; ``reference`` and
    ``behaviour`` are the same with the first weights of all, and with those that drew the images; without gradient.
    ``proximal``, too, with the weights that the step began with, where others drew the images, or ``recomputed``, where
    ``log_probs`` are too coarse and count for nothing; it answers None as long as ``network`` still holds these.
    ``epoch``: which pass over the images is being made, from 0.
    """

    schedule: Schedule
    latents: Latents
    log_probs: Tensor
    advantage: Tensor
    network: Network
    reference: Network
    behaviour: Network
    seed: int
    reduction: Reduction = "mean"
    proximal: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None = None
    recomputed: bool = False
    epoch: Callable[[], int] = lambda: 0

    def noised(self, images: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, ε and x_t of the forward process (batch, …). ε follows from the seed, the pass over the images, the
        image and the step alone: every pass has noise of its own."""
        clean = self.latents[images, -1]
        generator, stream = torch.Generator(), f"noise{self.epoch() or ''}"
        drawn = [
            torch.randn(clean.shape[1:], generator=generator.manual_seed(derive_seed(self.seed, stream, image, step)))
            for image, step in zip(images.tolist(), steps.tolist(), strict=True)
        ]
        noise = torch.stack(drawn).to(clean)
        return clean, noise, self.schedule.diffuse(clean, noise, steps).to(clean.dtype)


@torch.no_grad()
def replayed(rollouts: Rollouts, network: Network, images: Tensor, steps: Tensor) -> Tensor:
    """log p of stored transitions under ``network`` − log p of the weights that drew them (batch,)."""
    before, after = rollouts.latents[images, steps], rollouts.latents[images, steps + 1]
    output = network(before, steps, images)
    return (
        rollouts.schedule.log_prob(before, after, output, steps, rollouts.reduction) - rollouts.log_probs[images, steps]
    )
