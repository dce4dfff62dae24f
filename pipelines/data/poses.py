"""Digits of :mod:`pipelines.data.digits` moved, scaled and slanted by chance, for what is to learn poses.

Importable without torch, as settings are read without it.
"""

import numpy as np
from pydantic import Field

from pipelines.data.digits import DIGITS, GROUNDS, IMAGE_SIZE, INKS, Split, caption, load_split, tint
from policies.rl.settings import Settings


class PosingSettings(Settings):
    """How digits are placed and tinted, each by chance."""

    inks: tuple[str, ...] = Field(("yellow", "orange"), min_length=1, description="of digits.INKS")
    grounds: tuple[str, ...] = Field(("black",), min_length=1, description="of digits.GROUNDS")
    rounds: int = Field(12, ge=1, description="poses and tints of each of the 1,000 digits")
    shift: tuple[float, float] = Field((2.0, 0.7), description="pixels by which one is moved, at most, across and down")
    scale: tuple[float, float] = Field((0.8, 1.0), description="its size, of what it was: least and most")
    slant: float = Field(0.3, ge=0, le=1, description="pixels across for each down, at most, either way")
    warp: float = Field(0.7, ge=0, description="pixels by which parts of it are moved against one another, typically")

    def check(self, key: str) -> None:
        """Raise ValueError for colours that there are not; ``key`` is that of these settings."""
        for name, known in (("inks", INKS), ("grounds", GROUNDS)):
            if wrong := [word for word in getattr(self, name) if word not in known]:
                raise ValueError(f"{key}.{name}: {wrong[0]!r} is none of {', '.join(known)}")


def posed(
    posing: PosingSettings, split: Split, rounds: int, rng: np.random.Generator, width: int = IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every digit of a split in so many random poses and tints: images (n, 16, ``width``, 3) uint8, labels (n,),
    captions."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample, interpolate

    strokes, labels = (np.concatenate([each] * rounds) for each in load_split(split))
    count, (across, down) = len(labels), posing.shift
    size, slant = (rng.uniform(*ends, count) for ends in (posing.scale, (-posing.slant, posing.slant)))
    pose = np.zeros((count, 2, 3), np.float32)  # where in the digit a pixel of the image comes from
    pose[:, 0, 0], pose[:, 1, 1] = width / strokes.shape[-1] / size, 1 / size
    pose[:, 0, 1] = slant / size
    pose[:, :, 2] = rng.uniform(-1, 1, (count, 2)) * np.array([across, down]) * 2 / strokes.shape[-1]
    grid = affine_grid(torch.from_numpy(pose), [count, 1, strokes.shape[1], width], align_corners=False)
    if posing.warp:
        bends = rng.standard_normal((count, 2, 4, 4), np.float32) * posing.warp * 2 / strokes.shape[-1]
        smooth = interpolate(torch.from_numpy(bends), (strokes.shape[1], width), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    posed = grid_sample(torch.from_numpy(strokes)[:, None], grid, align_corners=False)[:, 0]
    strokes = (posed * 1.5 - 0.25).clamp(0, 1).numpy()  # as sharp as before: sampling has smoothed edges
    inks, grounds = (rng.choice(words, count).tolist() for words in (posing.inks, posing.grounds))
    words = zip((DIGITS[label] for label in labels), inks, grounds, strict=True)
    return tint(strokes, inks, grounds), labels, [caption(*each) for each in words]
