"""Adversarial examples by projected gradient descent in the L2 ball.

Madry et al. (1706.06083) for the attack and for training against it; Ilyas et al., "Adversarial Examples Are Not Bugs,
They Are Features" (1905.02175), section 3, for what the examples are made into. Images are (n, channels, height, width)
in [0, 1], and so are a classifier's inputs here: what it normalises, it normalises itself. Importable without torch, as
settings are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Generator, Tensor

Classify = Callable[["Tensor"], "Tensor"]  # images → logits (n, classes), differentiable


class AttackSettings(Settings):
    """A descent within the ball."""

    steps: int = Field(30, ge=1, description="gradients of an attack")
    reach: float = Field(2.5, gt=0, description="length of all steps together, in radii of the ball")


class LearningSettings(Settings):
    """How each network is trained: AdamW, cross-entropy, one cycle."""

    updates: int = Field(500, ge=1, description="of each network")
    batch: int = Field(64, ge=2, description="images an update")
    learning_rate: float = Field(3e-3, gt=0, description="at its peak")
    attack_steps: int = Field(5, ge=1, description="gradients of an attack in adversarial training")


class InversionSettings(Settings):
    """How an image is made that has another one's features; there is no ball."""

    steps: int = Field(60, ge=1, description="gradients; the paper: 1,000")
    step: float = Field(0.2, gt=0, description="L2 length of a step")


def pgd(loss_of: Classify, images: Tensor, eps: float, steps: int, step: float, start: Tensor | None = None) -> Tensor:
    """The images with the least loss that ``steps`` steps of length ``step`` down its normalised gradient meet, of
    those that lie within ``eps`` (L2; inf: anywhere) of ``images`` and in [0, 1].

    ``loss_of`` gives one loss an image (n,), which depends on that image alone. ``start``, else ``images``, is where it
    begins, and counts.
    """
    import torch
    from torch.nn.functional import normalize

    def within(moved: Tensor) -> Tensor:
        if eps < inf:
            moved = images + (moved - images).renorm(2, 0, eps)
        return moved.clamp(0, 1)  # towards the images, which lie in there: it leaves no ball

    here = within(images if start is None else start)
    best, least = here, torch.full((len(images),), inf, device=images.device)
    for left in range(steps, -1, -1):
        with torch.enable_grad():
            losses = loss_of(leaf := here.detach().requires_grad_())
            slope = torch.autograd.grad(losses.sum(), leaf)[0] if left else None
        better = (losses := losses.detach()) < least
        best, least = torch.where(better[:, None, None, None], here, best), torch.where(better, losses, least)
        if slope is not None:
            here = within(here - step * normalize(slope.flatten(1)).view_as(slope))
    return best


def attack(
    classify: Classify, images: Tensor, labels: Tensor, eps: float, settings: AttackSettings, towards: bool = False
) -> Tensor:
    """Images that look to the classifier like anything but ``labels`` (n,): their least margin; or, ``towards`` them,
    their greatest. The cross-entropy of the papers has no gradient left once the classifier is sure: this makes use of
    all of the ball."""
    step, sign = settings.reach * eps / settings.steps, -1 if towards else 1
    return pgd(lambda x: sign * margin(classify(x), labels), images, eps, settings.steps, step)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the logit of each label leads all others (n,); 0 or less: it is not what is answered."""
    others = logits.scatter(1, labels[:, None], -inf).amax(dim=1)
    return logits.gather(1, labels[:, None])[:, 0] - others


def accuracy_under(
    classify: Classify, images: Tensor, labels: Tensor, eps: Sequence[float], settings: AttackSettings
) -> list[float]:
    """The share of ``images`` that any differentiable classifier answers as ``labels`` (n,), by the L2 norm ``eps`` of
    what an attacker who knows its weights may add. 0: as they are. An upper bound: a better attack may find more.
    """
    import torch

    found = []
    for each in eps:
        seen = attack(classify, images, labels, each, settings) if each else images
        with torch.no_grad():
            found.append((margin(classify(seen), labels) > 0).float().mean().item())
    return found


def noised(images: Tensor, eps: float, random: Generator) -> Tensor:
    """The control: normal noise of L2 norm ``eps``, mirrored where it would leave [0, 1], so that its norm stays."""
    import torch
    from torch.nn.functional import normalize

    noise = torch.randn(images.shape, generator=random).to(images.device)
    noise = eps * normalize(noise.flatten(1)).view_as(images)
    moved = images + noise
    return torch.where(moved == moved.clamp(0, 1), moved, images - noise).clamp(0, 1)
