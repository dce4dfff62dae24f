"""Changing what a GAN of the loop draws by its styles: features to look at, and the styles of a given image."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipelines.generators.adversarial import Adversarial, Styles
from pipelines.measures.evaluator import to_network_input


def renderer(generator: Adversarial, styles: Styles) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What draws with other w and the conditions of ``styles``: images, and the finest of their features that are
    coarser than they: those of the pixels' own resolution know little more than their colours."""

    def render(w: Tensor) -> tuple[Tensor, Tensor]:
        images, maps = generator.render(Styles(w, styles.conditions))
        coarser = [each for each in maps if each.shape[-1] < images.shape[-1]]
        return images, (coarser or maps)[-1]

    return render


def invert(
    generator: Adversarial, images: np.ndarray, candidates: Styles, steps: int = 300, learning_rate: float = 0.05
) -> tuple[Styles, np.ndarray]:
    """The styles (n, …) that draw ``images`` (n, height, width, channels) uint8 best, each by Adam from the best of its
    ``candidates`` (several · n, …), which are those of the images in turn, so that each may be of its own caption; and
    what is left, the mean |error| (n,) of pixels in [0, 1]."""
    wanted = to_network_input(images).to(generator.device)
    with torch.no_grad():
        drawn = generator.render(candidates)[0]
        apart = (drawn.unflatten(0, (-1, len(wanted))) - wanted).flatten(2).norm(dim=2)  # (several, n)
        nearest = apart.argmin(dim=0) * len(wanted) + torch.arange(len(wanted), device=apart.device)
    conditions = {name: each[nearest] for name, each in candidates.conditions.items()}
    w = candidates.w[nearest].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=learning_rate)
    for _ in range(steps):
        loss = (generator.render(Styles(w, conditions))[0] - wanted).square().flatten(1).mean(dim=1).sum()
        (w.grad,) = torch.autograd.grad(loss, w)
        optimizer.step()
    with torch.no_grad():
        left = (generator.render(Styles(w, conditions))[0] - wanted).abs().flatten(1).mean(dim=1) / 2
    return Styles(w.detach(), conditions), left.cpu().numpy()


def as_bytes(images: Tensor) -> np.ndarray:
    """Images (n, channels, height, width) in [-1, 1] as uint8 (n, height, width, channels)."""
    found: np.ndarray = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return found
