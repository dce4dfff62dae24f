"""Images that a score is pleased with, whatever they show: what gradients, or nothing but queries, find.

Inversion by gradients as of CLIP by Kazemi et al., "What do we learn from inverting CLIP models?" (2403.02580): the
mean of the score over randomly moved views, a penalty of total variation, Adam with a bounded gradient. Without
gradients a (μ/μ_w, λ) evolution strategy with cumulative step-size adaptation (Hansen, "The CMA Evolution Strategy: A
Tutorial", 1604.00772, with C = I).

Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Generator, Tensor


class InvertingSettings(Settings):
    """How images are searched for that a reward is pleased with."""

    steps: int = Field(200, ge=1, description="Adam's; the paper: 3,400")
    learning_rate: float = Field(0.05, gt=0, description="Adam's, in pixels of [0, 1]; the paper: 0.1")
    clip: float = Field(1.0, gt=0, description="largest norm of an image's gradient")
    variation: float = Field(0.005, ge=0, description="weight of the total variation")
    views: int = Field(0, ge=0, description="moved and scaled views an image and step; 0: the image as it is")
    shift: float = Field(3.0, ge=0, description="pixels that a view is moved by, at most, each way")
    scale: tuple[float, float] = Field((0.7, 1.2), description="how large a view shows the image")
    colour: float = Field(0.2, ge=0, le=1, description="how far a view's channels are stretched; half, shifted")
    noise: float = Field(0.3, ge=0, description="largest deviation of a view's noise, in pixels of [0, 1]; paper: 0")
    queries: int = Field(2000, ge=20, description="scores an image that a search without gradients may ask for")


def total_variation(images: Tensor) -> Tensor:
    """L2 norms of the differences of ``images`` (batch, channels, height, width) along rows, columns and both
    diagonals, added up: (batch,)."""
    parts = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    # A flat image has no gradient of its norm; this far below one step of 8 bits it may be any.
    return sum((part.square().sum(dim=(1, 2, 3)) + 1e-8).sqrt() for part in parts)  # type: ignore[return-value]


def seen_anew(images: Tensor, settings: InvertingSettings, random: Generator) -> Tensor:
    """``settings.views`` views of each of ``images`` (batch, channels, height, width), (views · batch, …), those of an
    image ``batch`` apart: moved and scaled by chance, with the border's colours beyond the border, then in another
    light and with noise. ``random`` is of the CPU, so that it draws the same for any device."""
    import torch
    from torch.nn import functional

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(copies), *shape, generator=random).to(images)

    copies = images.repeat(settings.views, 1, 1, 1)
    low, high = settings.scale
    larger, nothing = low + (high - low) * uniform(), copies.new_zeros(len(copies))
    across, along = ((2 * uniform() - 1) * 2 * settings.shift / side for side in (images.shape[-1], images.shape[-2]))
    affine = torch.stack([1 / larger, nothing, across, nothing, 1 / larger, along], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, list(copies.shape), align_corners=False)
    views = functional.grid_sample(copies, grid, padding_mode="border", align_corners=False)
    stronger, brighter = (settings.colour * (2 * uniform(images.shape[1], 1, 1) - 1) for _ in range(2))
    noise = torch.randn(views.shape, generator=random).to(images)
    return views * (1 + stronger) + brighter / 2 + settings.noise * uniform(1, 1, 1) * noise


def bounded(gradient: Tensor, norm: float) -> Tensor:
    """``gradient`` (batch, …), each of which has at most this norm: one image's search does not depend on others."""
    return gradient / (gradient.flatten(1).norm(dim=1) / norm).clamp(min=1).view(-1, *[1] * (gradient.ndim - 1))


def evolve(
    score: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    queries: int,
    rng: np.random.Generator,
    sigma: float = 1.0,
) -> np.ndarray:
    """What scores most of all that was asked, for each of many searches at once.

    ``start``: where each begins, (searches, numbers). ``score`` of (searches, population, numbers) is (searches,
    population), and is asked about ``queries`` of each search at most. Returns (searches, numbers).
    """
    searches, size = start.shape
    population = min(4 + int(3 * np.log(size)), queries)
    parents = population // 2
    weights = (ranks := np.log(parents + 0.5) - np.log(np.arange(1, parents + 1))) / ranks.sum()
    effective = 1 / (weights**2).sum()
    rate = (effective + 2) / (size + effective + 5)
    damping = 1 + 2 * max(0.0, np.sqrt((effective - 1) / (size + 1)) - 1) + rate
    expected = np.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))  # E‖N(0, I)‖
    mean, path, spread = start.copy(), np.zeros_like(start), np.full((searches, 1), sigma)
    best, best_score = start.copy(), np.full(searches, -np.inf)
    for _ in range(queries // population):
        steps = rng.standard_normal((searches, population, size))
        asked = mean[:, None] + spread[..., None] * steps
        found = score(asked)
        order = np.argsort(-found, axis=1, kind="stable")
        better, first = found.max(axis=1) > best_score, order[:, 0]
        best[better], best_score[better] = asked[better, first[better]], found.max(axis=1)[better]
        step = (np.take_along_axis(steps, order[:, :parents, None], axis=1) * weights[:, None]).sum(axis=1)
        mean = mean + spread * step
        path = (1 - rate) * path + np.sqrt(rate * (2 - rate) * effective) * step
        length = np.linalg.norm(path, axis=1, keepdims=True)
        spread = np.minimum(spread * np.exp(rate / damping * (length / expected - 1)), 2 * sigma)
    return best


def verdict(fooled: np.ndarray) -> tuple[str, float, float]:
    """What is said of a reward that these images of independent searches fooled (n,) bool, or not; and the ends of the
    exact 95 % interval of their share (Clopper and Pearson): the whole of it is .5 or more, or .2 or less."""
    from scipy.stats import binomtest

    low, high = map(float, binomtest(int(fooled.sum()), len(fooled)).proportion_ci(0.95, "exact"))
    said = "easily fooled" if low >= 0.5 else "not fooled by this search" if high <= 0.2 else "undecided"
    return said, low, high
