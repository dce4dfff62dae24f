"""Keypoints without labels: places at which learned text tokens look, wherever in an image what they look for stands.

StableKeypoints (Hedlin et al., 2312.00065). A token's attention map is to be one peak, and to move with the image. Maps
are (n, tokens, height, width); places are (x, y) in cells of a map, or pixels of an image, x to the right and y down,
with whole numbers at their centres. An affine map of an image onto itself is (n, 2, 3), in torch's coordinates of a
grid (−1 to 1 from edge to edge), and says where in the old image each place of the new one comes from.

Importable without torch, as settings are read without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class KeypointSettings(Settings):
    """How tokens are learned, and keypoints found by them. Numbers of the paper are of SD 1.5 at 512 × 512."""

    tokens: int = Field(100, ge=2, description="learned, which compete for every place; the paper: 500")
    keypoints: int = Field(6, ge=2, description="of an image, and tokens that a loss is taken of; the paper: 10")
    candidates: int = Field(8, ge=2, description="tokens whose maps are nearest to a peak, to choose from; 25")
    steps: int = Field(200, ge=0, description="Adam's; the paper: 500")
    batch: int = Field(8, ge=1, description="images of a step; the paper: 4")
    learning_rate: float = Field(0.2, gt=0, description="the paper: 5e-3")
    equivariance: float = Field(30.0, ge=0, description="weight of that loss beside the other's 1; the paper: 10")
    peak: float = Field(1.0, gt=0, description="width σ of a peak, in cells of a map; the paper: 2 of 128")
    resolution: int = Field(2, ge=1, description="cells of a map for each of an attention layer's, along one side")
    layers: int = Field(1, ge=1, description="of cross-attention that are looked at, the last ones on the way up")
    timestep: int = Field(10, ge=0, description="of the noise in images; the paper: that of a sampler's last step")
    rotation: float = Field(15.0, ge=0, le=180, description="degrees by which an image is turned, at most, either way")
    zoom: tuple[float, float] = Field((0.8, 1.0), description="its size then, of what it was: least and most")
    shift: float = Field(0.15, ge=0, lt=1, description="of a side by which it is moved, at most, across and down")
    images: int = Field(100, ge=1, description="by whose maps it is chosen which tokens find keypoints")
    views: int = Field(5, ge=1, description="turned and moved copies over which an image's maps are averaged")
    spread: bool = Field(True, description="choose candidates far apart; false: those nearest to a peak; a control")


def turns(count: int, settings: KeypointSettings, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """So many affine maps of images of a ``size`` (height, width), drawn by chance."""
    import torch

    angle = np.deg2rad(rng.uniform(-settings.rotation, settings.rotation, count))
    zoom, move = rng.uniform(*settings.zoom, count), 2 * rng.uniform(-settings.shift, settings.shift, (count, 2))
    cos, sin, (height, width) = np.cos(angle) / zoom, np.sin(angle) / zoom, size
    linear = np.array([[cos, sin * height / width], [-sin * width / height, cos]]).transpose(2, 0, 1)
    return torch.from_numpy(np.concatenate([linear, -linear @ move[..., None]], axis=2)).float()


def inverse(maps: Tensor) -> Tensor:
    """The affine maps that undo ``maps``."""
    import torch

    linear = maps[:, :, :2].inverse()
    return torch.cat([linear, -linear @ maps[:, :, 2:]], dim=2)


def warped(images: Tensor, maps: Tensor, padding: str = "border") -> Tensor:
    """``images`` (n, any, height, width) after an affine map each; what was outside is as the edge, or ``zeros``."""
    from torch.nn.functional import affine_grid, grid_sample

    grid = affine_grid(maps, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode=padding, align_corners=False)


def carried(points: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Where ``points`` (n, any, 2) of images of a ``size`` (height, width) are after the affine maps."""
    sides = points.new_tensor(size[::-1])
    back = inverse(maps)
    moved = ((2 * points + 1) / sides - 1) @ back[:, :, :2].transpose(1, 2) + back[:, None, :, 2]
    found: Tensor = ((moved + 1) * sides - 1) / 2
    return found


def unwarped(maps: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """Attention ``maps`` of turned images, turned back; and where these hold anything, (n, 1, height, width) of 0 and
    1: the rest was not in the turned image."""
    back = inverse(turned)
    inside = warped(maps.new_ones(len(maps), 1, *maps.shape[2:]), back, "zeros")
    return warped(maps, back), (inside > 0.999).to(maps)


def peaks(maps: Tensor) -> Tensor:
    """The place (n, tokens, 2) at which each map is highest, in cells."""
    import torch

    at = maps.flatten(2).argmax(dim=2)
    return torch.stack([at % maps.shape[3], at // maps.shape[3]], dim=2).to(maps)


def bumps(places: Tensor, size: tuple[int, int], width: float) -> Tensor:
    """Gaussians of height 1 and deviation ``width`` at ``places`` (n, tokens, 2): maps of a ``size``."""
    import torch

    y, x = torch.meshgrid(*(torch.arange(side, device=places.device) for side in size), indexing="ij")
    across, down = (places[..., each, None, None] for each in (0, 1))
    return (-((x - across) ** 2 + (y - down) ** 2) / (2 * width**2)).exp()


def divergence(maps: Tensor, width: float) -> Tensor:
    """How far each map is from one peak, (n, tokens): KL(Gaussian at its highest place ‖ softmax of the map). As
    values are in [0, 1], a softmax is nearly flat: what counts is how high a map is at its peak and how low elsewhere,
    so that one which is faint everywhere cannot pass for a peak by its shape."""
    wanted = bumps(peaks(maps), (maps.shape[2], maps.shape[3]), width).flatten(2)
    wanted = wanted / wanted.sum(dim=2, keepdim=True)
    found: Tensor = (wanted * (wanted.clamp(min=1e-30).log() - maps.flatten(2).log_softmax(dim=2))).sum(dim=2)
    return found


def far_apart(places: Tensor, order: Tensor, count: int) -> Tensor:
    """Of ``order`` (n, candidates), tokens from the best on, ``count`` whose ``places`` (n, tokens, 2) are far apart:
    the best, and each time the one that is farthest from those chosen before. (n, count)"""
    import torch

    at = places.gather(1, order[..., None].expand(-1, -1, 2))
    apart, chosen = torch.cdist(at, at), [torch.zeros(len(at), dtype=torch.long, device=at.device)]
    nearest = apart[:, 0].clone()
    nearest[:, 0] = -1
    for _ in range(count - 1):
        chosen.append(nearest.argmax(dim=1))
        rows = apart[torch.arange(len(at)), chosen[-1]]
        nearest = torch.minimum(nearest, rows).scatter(1, chosen[-1][:, None], -1.0)
    return order.gather(1, torch.stack(chosen, dim=1))


def choose(maps: Tensor, settings: KeypointSettings, places: Tensor | None = None) -> Tensor:
    """The tokens (n, keypoints) whose maps say most clearly where something is, at ``places`` far apart: by default
    their highest ones."""
    order = divergence(maps, settings.peak).argsort(dim=1, stable=True)
    if not settings.spread:
        return order[:, : settings.keypoints]
    return far_apart(peaks(maps) if places is None else places, order[:, : settings.candidates], settings.keypoints)


def losses(maps: Tensor, turned: Tensor, how: Tensor, settings: KeypointSettings) -> tuple[Tensor, Tensor]:
    """The paper's two: localisation, that a map is a Gaussian at its highest place; and equivariance, that the maps of
    images after affine maps ``how``, turned back, are those of the images. Of the chosen tokens alone, and of a turned
    image only what is in it: a mean over the places that are."""
    chosen = choose(maps.detach(), settings, peaks(turned.detach()))
    index = chosen[..., None, None].expand(-1, -1, *maps.shape[2:])
    kept, other = maps.gather(1, index), turned.gather(1, index)
    wanted = bumps(peaks(kept.detach()), (maps.shape[2], maps.shape[3]), settings.peak)
    back, inside = unwarped(other, how)
    moved = ((kept - back).square() * inside).sum() / (inside.sum() * kept.shape[1]).clamp(min=1)
    return (kept - wanted).square().mean(), moved


def regression(points: np.ndarray, landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The linear map (2 · keypoints, 2 · landmarks), without a bias, of least squares from keypoints (n, any, 2) to
    landmarks (n, any, 2), both as shares of an image of ``size`` less a half: the only use of labels."""
    return np.linalg.pinv(centred(points, size)) @ centred(landmarks, size)


def centred(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Places (n, any, 2) in pixels as shares of the sides less a half, (n, 2 · any)."""
    return ((points + 0.5) / np.array(size[::-1]) - 0.5).reshape(len(points), -1)


def regressed(points: np.ndarray, weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Landmarks (n, any, 2) in pixels by a :func:`regression`."""
    found = (centred(points, size) @ weights).reshape(len(points), -1, 2)
    return (found + 0.5) * np.array(size[::-1]) - 0.5


def mean_distance(points: np.ndarray) -> float:
    """Of the keypoints (n, keypoints, 2) of an image from one another: mean over pairs, and images."""
    apart = np.linalg.norm(points[:, :, None] - points[:, None], axis=3)
    return float(apart.sum(axis=(1, 2)).mean() / max(1, math.perm(points.shape[1], 2)))
