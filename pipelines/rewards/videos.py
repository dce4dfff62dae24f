"""What only a video has: how steady it is, and how much of it moves."""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from pipelines.rewards import Reward, RewardFunction


class VideoOptions(Reward):
    """``steadiness``: 1 minus what changes from frame to frame, in units of the full range, after the motion of the
    whole image is undone, so that a video is not paid for standing still; but a video that stands still is steady, too,
    so ask for ``travel`` beside it: how far the image moves from frame to frame, as a share of ``pace``, at most 1."""

    names = ("steadiness", "travel")
    of_videos = True
    reach: int = Field(3, ge=1, le=16, description="pixels up to which motion from frame to frame is looked for")
    pace: float = Field(1.0, gt=0, description="pixels a frame: faster is no better")

    def load(self, name: str, device: str) -> RewardFunction:
        """Of videos (n, frames, height, width, 3) uint8."""
        if name == "steadiness":
            return lambda videos, prompts, captions: 1 - motion(videos, self.reach)[0].mean(axis=1)
        return lambda videos, prompts, captions: np.minimum(
            np.hypot(*motion(videos, self.reach)[1:]).mean(axis=1) / self.pace, 1
        )


def motion(videos: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each frame and the next of ``videos`` (n, frames, height, width, 3) uint8, three times (n, frames − 1): the
    mean |difference| over the pixels that both show, in [0, 1], after the shift by whole pixels that makes it smallest;
    and that shift, down and to the right, the shortest of equal ones. Raises ValueError of frames that are too small.
    """
    values = videos.astype(np.float32) / 255
    before, after = values[:, :-1], values[:, 1:]
    if min(videos.shape[2:4]) <= 2 * reach:
        raise ValueError(
            f"reach: frames of {videos.shape[2]}×{videos.shape[3]} pixels are too small to move by {reach}"
        )
    best: np.ndarray = np.full(before.shape[:2], np.inf, np.float32)
    down: np.ndarray = np.zeros(best.shape)
    right: np.ndarray = np.zeros(best.shape)
    for dy, dx in _shifts(reach):
        # What stands at (y, x) of a frame stands at (y + dy, x + dx) of the next.
        (y0, y1), (x0, x1) = _overlap(dy), _overlap(dx)
        changed = np.abs(after[:, :, y1, x1] - before[:, :, y0, x0]).mean(axis=(2, 3, 4))
        better = changed < best - 1e-6
        best, down, right = np.where(better, changed, best), np.where(better, dy, down), np.where(better, dx, right)
    return best, down, right


def _shifts(reach: int) -> Iterator[tuple[int, int]]:
    every = range(-reach, reach + 1)
    yield from sorted(((dy, dx) for dy in every for dx in every), key=lambda each: (each[0] ** 2 + each[1] ** 2, each))


def _overlap(shift: int) -> tuple[slice, slice]:
    """Along an axis, what both show: of the one that comes before, and of the next."""
    return slice(max(0, -shift), -shift if shift > 0 else None), slice(max(0, shift), shift if shift < 0 else None)
