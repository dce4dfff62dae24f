"""Digits that move sideways on a wide canvas, with the truth about where and what they are.

What this module promises: in all frames of a video the digit is the same pixels, moved by whole ones; the returned
columns are those that :func:`pipelines.measures.places.columns` finds, to the rounding of colours; equal seeds give
equal videos. Importable without torch.
"""

from typing import NamedTuple, Self

import numpy as np

from pipelines.data.digits import CHOICES, DIGITS, IMAGE_SIZE, Split, caption, load_split, tint
from pipelines.measures.places import columns
from policies.common.seeding import derive_seed

CANVAS = 2 * IMAGE_SIZE  # its width; a digit is as high as the canvas
NEAREST = IMAGE_SIZE / 2  # to an edge of the canvas, in pixels, that a path may come


class Videos(NamedTuple):
    """``videos`` (n, frames, 16, 32, 3) uint8, their ``captions``, in which column the ink's centre of gravity is,
    ``columns`` (n, frames), and which digits of the split they show, ``rows`` (n,)."""

    videos: np.ndarray
    captions: list[str]
    columns: np.ndarray
    rows: np.ndarray

    def taken(self, chosen: np.ndarray) -> Self:
        """Only those of these indices."""
        captions = [self.captions[each] for each in chosen]
        return self._replace(
            videos=self.videos[chosen], captions=captions, columns=self.columns[chosen], rows=self.rows[chosen]
        )


def paths(count: int, frames: int, seed: int, most: float = 2.0) -> np.ndarray:
    """Columns (count, frames), in pixels from the left edge: at a steady speed of up to ``most`` pixels a frame, at
    least half of it, from where chance puts it, and back from where the canvas ends."""
    rng = np.random.default_rng(derive_seed(seed, "paths"))
    room = CANVAS - 2 * NEAREST
    speed = rng.uniform(most / 2, most, (count, 1)) * rng.choice([-1, 1], (count, 1))
    along = rng.uniform(0, 2 * room, (count, 1)) + speed * np.arange(frames)
    found: np.ndarray = NEAREST + np.abs((along + room) % (2 * room) - room)
    return found


def moving(paths: np.ndarray, split: Split, seed: int, rows: np.ndarray | None = None) -> Videos:
    """A digit of the split in a tint of chance along each of ``paths`` (n, frames), to the nearest pixel: the columns
    in which its ink's centre of gravity is to be, at least 8 from either edge.

    ``rows`` (n,) says which digits; else chance does, each as often as any other. Raises ValueError for another path.
    """
    if paths.ndim != 2 or not paths.size or paths.min() < NEAREST or paths.max() > CANVAS - NEAREST:
        far = f"{NEAREST:g} to {CANVAS - NEAREST:g}"
        raise ValueError(f"a path is columns from {far}, given as (videos, frames), not as {paths.shape}")
    rng, digits = np.random.default_rng(derive_seed(seed, "moving")), load_split(split)
    if rows is None:
        rows = np.resize(rng.permutation(len(digits.labels)), len(paths))
    inks, grounds = (rng.choice(CHOICES[slot], len(paths)).tolist() for slot in ("ink", "ground"))
    words = [DIGITS[label] for label in digits.labels[rows]]
    wide = np.pad(digits.strokes[rows], ((0, 0), (0, 0), (CANVAS, CANVAS)))  # the digit's square begins at CANVAS
    centres = columns(tint(wide, inks, grounds))
    left = np.rint(centres[:, None] - paths).astype(int)  # where in the wide image the canvas begins
    across = left[:, :, None] + np.arange(CANVAS)
    strokes = np.take_along_axis(wide[:, None], across[:, :, None, :], axis=3)
    videos = np.stack([tint(frame, inks, grounds) for frame in strokes.swapaxes(0, 1)], axis=1)
    captions = [caption(*slots) for slots in zip(words, inks, grounds, strict=True)]
    return Videos(videos, captions, centres[:, None] - left, rows)
