"""Dragging points of an image that a generator draws to where they should be: DragGAN (Pan et al., 2305.10973).

A point is known by the feature vector that the generator had there. Motion supervision moves the features around it a
step toward its target by gradients of the generator's style; point tracking then looks for where the point went. Places
are (x, y) in pixels of the image, x to the right and y down, with whole numbers at the centres of pixels.

Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

_SPACING = 0.5  # pixels between the places of a region: images are so small that whole pixels would be few or none


class DragSettings(Settings):
    """How points are dragged. Radii are in pixels of the image that is dragged; the paper's are of 512."""

    steps: int = Field(200, ge=1, description="updates of the style, at most")
    learning_rate: float = Field(0.02, gt=0, description="Adam's, of the style")
    step: float = Field(0.5, gt=0, description="pixels by which features are to move in one update")
    supervised: float = Field(1.5, gt=0, description="radius around a point of the features that are moved, r1")
    tracked: float = Field(3.0, gt=0, description="half the side of the window in which a point is looked for, r2")
    stop: float = Field(0.35, gt=0, description="a point that is so near to its target has arrived")
    hold: float = Field(1.0, ge=0, description="weight of what is to stay as it was, λ; the paper: 20")
    tracking: bool = Field(
        True, description="false: a point is believed to be where it was at first, for all steps; a control"
    )


class Moment(NamedTuple):
    """Where drags stand after some updates: ``styles`` (n, …), ``images`` (n, channels, height, width), the ``points``
    (n, points, 2), and whether all of an image's points have ``arrived`` (n,), from when on nothing of it moves."""

    styles: Tensor
    images: Tensor
    points: Tensor
    arrived: Tensor


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """``features`` (n, channels, any, any) for every pixel of an image of ``size`` (height, width)."""
    from torch.nn.functional import interpolate

    return interpolate(features, size, mode="bilinear", align_corners=False)


def at(features: Tensor, places: Tensor) -> Tensor:
    """Features (n, channels, height, width) at ``places`` (n, any, 2), bilinear between pixels: (n, any, channels).
    Beyond the centres of the outermost pixels they are those of these pixels."""
    from torch.nn.functional import grid_sample

    size = places.new_tensor(features.shape[:-3:-1])  # width, height
    grid = (2 * places + 1) / size - 1
    found = grid_sample(features, grid[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def around(radius: float, disc: bool) -> Tensor:
    """Offsets (any, 2) within a disc of this ``radius``, or else within the square around it; 0 is one of them."""
    import torch

    reach = int(radius / _SPACING)
    steps = torch.arange(-reach, reach + 1) * _SPACING
    offsets = torch.cartesian_prod(steps, steps)
    return offsets[offsets.norm(dim=1) <= radius + 1e-6] if disc else offsets


def towards(points: Tensor, targets: Tensor, step: float, stop: float) -> Tensor:
    """The way (n, points, 2) that each of ``points`` has to take now: ``step`` toward its target, 0 if it is there."""
    left = targets - points
    distance = left.norm(dim=-1, keepdim=True)
    return left / distance.clamp(min=1e-12) * step * (distance > stop)


def motion_loss(features: Tensor, points: Tensor, way: Tensor, radius: float) -> Tensor:
    """The paper's equation 1 without its mask, (n,): mean |F(q) − F(q + d)| over the places q around each point and
    all channels, added up over the points that have a way d to go. F(q), what is to be found at q + d, is constant."""
    count, points_each = points.shape[:2]
    places = points[:, :, None] + around(radius, disc=True).to(points)
    there = places + way[:, :, None]
    source = at(features.detach(), places.flatten(1, 2))
    moved = (at(features, there.flatten(1, 2)) - source).abs()
    each = moved.reshape(count, points_each, -1).mean(dim=2)
    return (each * way.ne(0).any(dim=-1)).sum(dim=1)


def track(features: Tensor, points: Tensor, known: Tensor, radius: float) -> Tensor:
    """Where in the window around each of ``points`` (n, points, 2), and within the image, the features are nearest to
    those ``known`` of it (n, points, channels): equation 2."""
    import torch

    places = points[:, :, None] + around(radius, disc=False).to(points)
    last = places.new_tensor(features.shape[:-3:-1]) - 1
    places = torch.minimum(places.clamp(min=0), last)
    found = at(features, places.flatten(1, 2)).reshape(*places.shape[:3], -1)
    nearest = (found - known[:, :, None]).norm(dim=-1).argmin(dim=2)
    return places.gather(2, nearest[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)


def drag(
    render: Callable[[Tensor], tuple[Tensor, Tensor]],
    styles: Tensor,
    handles: Tensor,
    targets: Tensor,
    fixed: Tensor | None,
    settings: DragSettings,
) -> Iterator[Moment]:
    """Drag the ``handles`` (n, points, 2) of n images to the ``targets``, each image by itself; yields the state at
    first and after each update, until all have arrived or all steps are taken.

    ``render`` makes of styles (n, …) images and their features, (n, channels, any, any) both. ``fixed`` (n, height,
    width), 1 where features are to stay as they were at first.
    """
    import torch

    moving = styles.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=settings.learning_rate)
    points, first, known = handles, None, None
    for number in range(settings.steps + 1):
        with torch.enable_grad():
            images, maps = render(moving)
            features = resized(maps, (images.shape[-2], images.shape[-1]))
        if first is None or known is None:
            first = features.detach()
            known = at(first, points)
        elif settings.tracking:
            points = track(features.detach(), points, known, settings.tracked)
        way = towards(points, targets, settings.step, settings.stop)
        arrived = ~way.ne(0).flatten(1).any(dim=1)
        yield Moment(moving.detach().clone(), images.detach(), points, arrived)
        if number == settings.steps or bool(arrived.all()):
            return
        with torch.enable_grad():
            loss = motion_loss(features, points, way, settings.supervised)
            if fixed is not None:
                loss = loss + settings.hold * ((features - first).abs() * fixed[:, None]).flatten(1).mean(dim=1)
        before = moving.detach().clone()
        (moving.grad,) = torch.autograd.grad(loss.sum(), moving)
        optimizer.step()
        with torch.no_grad():
            moving[arrived] = before[arrived]
