"""Videos as images whose frames stand below each other: (n, frames · height, width, 3)."""

from collections.abc import Sequence

import numpy as np

BREAK = "\n"  # between the captions of a video's frames


def frames_of(videos: np.ndarray, frames: int) -> np.ndarray:
    """The frames of ``videos`` (n, frames · height, width, 3), one after the other (n · frames, height, width, 3)."""
    return videos.reshape(len(videos) * frames, -1, *videos.shape[2:])


def apart(videos: np.ndarray, frames: int) -> np.ndarray:
    """``videos`` (n, frames · height, width, 3) with an axis for their frames (n, frames, height, width, 3)."""
    return videos.reshape(len(videos), frames, -1, *videos.shape[2:])


def of_each_frame(captions: Sequence[str]) -> list[str]:
    """The captions of all frames, of the videos' ``captions``."""
    return [each for caption in captions for each in caption.split(BREAK)]


def gif(videos: np.ndarray, frames: int, columns: int | None = None, frame_ms: int = 150) -> bytes:
    """An animation of ``videos`` (n, frames · height, width, 3) uint8 beside each other, enlarged where they are small;
    by default about square."""
    from PIL import Image

    from pipelines.figures.dragging import animation
    from pipelines.figures.plots import image_grid

    moments = apart(videos, frames).swapaxes(0, 1)
    return animation([Image.fromarray(image_grid(each, columns)) for each in moments], frame_ms, frame_ms)
