"""Where on a canvas a digit stands, and the square that shows it: of images of one figure on a plain ground."""

import numpy as np

_LEAST = 0.25  # of the largest distance from the ground's colour: what counts as ink


def coverage(images: np.ndarray) -> np.ndarray:
    """How far each pixel of ``images`` (n, height, width, 3) uint8 is from the ground, the median of the image's edge,
    as a share of the farthest one: (n, height, width) float64. 0 of an image of one colour."""
    values = images.astype(np.float64)
    edge = np.concatenate([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], axis=1)
    distance = np.linalg.norm(values - np.median(edge, axis=1)[:, None, None], axis=-1)
    most = distance.max(axis=(1, 2), keepdims=True)
    return np.divide(distance, most, out=np.zeros_like(distance), where=most > 0)


def columns(images: np.ndarray) -> np.ndarray:
    """The column (n,) of the ink's centre of gravity, in pixels from the left edge of ``images`` (n, height, width, 3);
    the middle, where there is no ink."""
    ink = np.where(coverage(images) >= _LEAST, coverage(images), 0).sum(axis=1)
    places, weight = np.arange(images.shape[2]) + 0.5, ink.sum(axis=1)
    found = np.divide(ink @ places, weight, out=np.full(len(images), images.shape[2] / 2), where=weight > 0)
    return np.asarray(found)


def squares(images: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Of ``images`` (n, side, width, 3) the squares (n, side, side, 3) around the columns ``centres`` (n,), as far as
    the canvas reaches."""
    side, width = images.shape[1:3]
    left = np.clip(np.rint(centres - side / 2), 0, width - side).astype(int)
    return np.take_along_axis(images, (left[:, None] + np.arange(side))[:, None, :, None], axis=2)
