"""Is a video of a moving digit what was commanded? Place, motion, flicker and identity, against the truth.

Videos are (n, frames, height, width, 3) uint8; commanded columns (n, frames) are those of the ink's centre of gravity,
in pixels from the left edge, as :class:`pipelines.data.motion.Videos` has them.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.data.digits import parse
from pipelines.measures.evaluator import Evaluator
from pipelines.measures.places import columns, squares


def found_columns(videos: np.ndarray) -> np.ndarray:
    """The column (n, frames) of the ink's centre of gravity in each frame."""
    return columns(videos.reshape(-1, *videos.shape[2:])).reshape(videos.shape[:2])


def unshifted(videos: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """The motion undone: of each frame the square at its commanded place, (n, frames, side, side, 3)."""
    found = squares(videos.reshape(-1, *videos.shape[2:]), commanded.reshape(-1))
    return found.reshape(*videos.shape[:2], *found.shape[1:])


def position(videos: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """How many pixels each frame's ink is from where it was to be: (n, frames)."""
    return np.abs(found_columns(videos) - commanded)


def flicker(videos: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """Mean |change| from each frame to the next once the motion is undone, of pixels in [0, 1]: (n, frames − 1). 0 of a
    digit that is the same in all frames, wherever it is."""
    held = unshifted(videos, commanded).astype(np.float32) / 255
    found: np.ndarray = np.abs(np.diff(held, axis=1)).mean(axis=(2, 3, 4))
    return found


def travelled(videos: np.ndarray) -> np.ndarray:
    """The length of each one's path in pixels, (n,): Σ |column − that of the frame before|. 0 of a still."""
    found: np.ndarray = np.abs(np.diff(found_columns(videos), axis=1)).sum(axis=1)
    return found


def obedience(videos: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """The correlation (n,) of the columns found with those commanded, over the frames: 1 of who goes where told, 0 of a
    still, and of one that is told to stand."""
    pair = (found_columns(videos), commanded)
    own, told = (each - each.mean(axis=1, keepdims=True) for each in pair)
    size = np.sqrt((own**2).sum(axis=1) * (told**2).sum(axis=1))
    return np.divide((own * told).sum(axis=1), size, out=np.zeros(len(size)), where=size > 1e-9)


def identity(videos: np.ndarray, commanded: np.ndarray, captions: Sequence[str], judge: Evaluator) -> np.ndarray:
    """Does the square at the commanded place show the digit in the ink of its caption? By the evaluator, (n, frames)
    bool."""
    held = unshifted(videos, commanded)
    seen = judge.slots(held.reshape(-1, *held.shape[2:]))
    wanted = [parse(text) for text in captions for _ in range(videos.shape[1])]
    met = [all(want[slot] in (None, seen[slot][at]) for slot in ("digit", "ink")) for at, want in enumerate(wanted)]
    return np.array(met, bool).reshape(videos.shape[:2])
