"""Training batches of the digit world, drawn without end: mild handwriting variation, colours, and image faults.

Every function takes the generator that decides its randomness, so a recipe gives the same batches again.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.data.digits import GROUNDS, IMAGE_SIZE, INKS, Split, load_split


class DigitBatches:
    """Draws batches from one split: digits slightly rotated, scaled and shifted, in uniformly drawn colours."""

    def __init__(self, split: Split) -> None:
        digits = load_split(split)
        self.strokes = torch.from_numpy(digits.strokes)[:, None]
        self.labels = torch.from_numpy(digits.labels)
        self.inks = torch.tensor(list(INKS.values())) / 127.5 - 1.0
        self.grounds = torch.tensor(list(GROUNDS.values())) / 127.5 - 1.0

    def draw(
        self, size: int, generator: torch.Generator, max_shift: float = 0.6, width: int = IMAGE_SIZE
    ) -> tuple[Tensor, Tensor]:
        """Images (size, 3, 16, ``width``) in [-1, 1], shifted by up to ``max_shift`` pixels, and slots (size, 3) int64.

        On a wider canvas a digit stands anywhere. Slots are indices into ``CHOICES``, in the order of ``SLOTS``.
        """
        index = torch.randint(len(self.labels), (size,), generator=generator)
        inks = torch.randint(len(self.inks), (size,), generator=generator)
        grounds = torch.randint(len(self.grounds), (size,), generator=generator)
        coverage = _vary(self.strokes[index], max_shift, generator, width)
        ink, ground = self.inks[inks][:, :, None, None], self.grounds[grounds][:, :, None, None]
        return ground + (ink - ground) * coverage, torch.stack([self.labels[index], inks, grounds], dim=1)


def prompt_indices(slots: Tensor) -> Tensor:
    """Positions (n,) of the captions of ``slots`` (n, 3) in ``all_prompts()``."""
    return (slots[:, 0] * len(INKS) + slots[:, 1]) * len(GROUNDS) + slots[:, 2]


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """The faults generated images have, a random amount of each: blur, brightness, contrast, colour cast and noise.

    Images (n, 3, height, width) in [-1, 1] on both sides.
    """

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(images), channels, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(0.0, 0.6))
    images = images * uniform(0.85, 1.1) + uniform(-0.1, 0.1) + uniform(-0.08, 0.08, channels=3)
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.15)
    return (images + noise).clamp(-1.0, 1.0)


def _vary(strokes: Tensor, max_shift: float, generator: torch.Generator, width: int) -> Tensor:
    """Rotates by up to 8 degrees, scales by up to 7 % and shifts by up to ``max_shift`` pixels, then puts each anywhere
    on a canvas of ``width``: (n, 1, h, ``width``)."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(strokes), generator=generator) - 1)

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.07)
    shift = 2 * max_shift / strokes.shape[-1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, uniform(shift), sin, cos, uniform(shift)], dim=1).view(-1, 2, 3)
    if wider := width / strokes.shape[-1] - 1:
        # A column of the canvas is that of a digit further left; both are counted from -1 to 1 over their own width.
        placed = torch.eye(3).repeat(len(strokes), 1, 1)
        placed[:, 0, 0], placed[:, 0, 2] = 1 + wider, uniform(wider)
        affine = affine @ placed
    grid = functional.affine_grid(affine, [*strokes.shape[:-1], width], align_corners=False)
    return functional.grid_sample(strokes, grid, align_corners=False)
