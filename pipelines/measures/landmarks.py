"""Where the ink of a digit has a tip: a landmark that is found on pixels alone."""

import numpy as np


def ink_of(images: np.ndarray) -> np.ndarray:
    """How much of each pixel of ``images`` (n, height, width, 3) uint8 is ink, (n, height, width) in [0, 1]: how far it
    is from the ground's colour, which is that of most pixels at both sides."""
    pixels = images.astype(np.float32)
    sides = np.concatenate([pixels[:, :, :2], pixels[:, :, -2:]], axis=2).reshape(len(images), -1, 3)
    distance = np.linalg.norm(pixels - np.median(sides, axis=1)[:, None, None], axis=-1)
    full = np.quantile(distance, 0.97, axis=(1, 2), keepdims=True)
    ink: np.ndarray = np.clip(distance / np.maximum(full, 1), 0, 1)
    return ink


def centres(images: np.ndarray) -> np.ndarray:
    """The centre of gravity (n, 2) of the ink, (x, y) in pixels; the middle of an image without any."""
    ink = ink_of(images)
    rows, columns = np.indices(ink.shape[1:])
    places, weight = np.stack([columns, rows], axis=-1).reshape(-1, 2), ink.reshape(len(ink), -1)
    whole = weight.sum(axis=1, keepdims=True)
    found: np.ndarray = np.where(whole > 0, weight @ places / np.maximum(whole, 1e-9), places.mean(axis=0))
    return found


def tips(images: np.ndarray, ways: np.ndarray, sharpness: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """The landmark of each image: where its ink lies farthest in a direction of ``ways`` (n, 2), as a mean of places
    (n, 2), (x, y) in pixels, that counts less by e the 1/``sharpness`` of a pixel further back; and how far these
    places spread around it, (n,) in pixels: little at a tip, much at a bar or at two tips,
    and without end where there is no ink."""
    ink = ink_of(images)
    rows, columns = np.indices(ink.shape[1:])
    places, ink = np.stack([columns, rows], axis=-1).reshape(-1, 2), ink.reshape(len(ink), -1)
    along = ways @ places.T
    farthest = np.where(ink >= 0.5, along, -np.inf).max(axis=1, keepdims=True)
    weight = np.where(ink >= 0.25, ink, 0) * np.exp(np.minimum(sharpness * (along - farthest), 2))
    whole = weight.sum(axis=1, keepdims=True)
    weight /= np.where(whole > 0, whole, 1)
    found = weight @ places
    spread = ((places - found[:, None]) ** 2).sum(axis=2)
    return found, np.where(whole[:, 0] > 0, np.sqrt((weight * spread).sum(axis=1)), np.inf)


def stay_tips(images: np.ndarray, ways: np.ndarray, handles: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether each of ``places`` (n, any, 2) is one where the landmark of ``handles`` (n, 2) would be found if nothing
    but it moved: a pixel or more within the image, and in the direction of ``ways`` (n, 2) as far as all ink that is
    more than 3 pixels from the handle. (n, any) bool."""
    ink = ink_of(images) >= 0.5
    rows, columns = np.indices(ink.shape[1:])
    pixels = np.stack([columns, rows], axis=-1).reshape(-1, 2)
    rest = ink.reshape(len(ink), -1) & (np.linalg.norm(pixels - handles[:, None], axis=2) > 3)
    farthest = np.where(rest, ways @ pixels.T, -np.inf).max(axis=1)
    inside = ((places >= 1) & (places <= np.array(ink.shape[:0:-1]) - 2)).all(axis=2)
    found: np.ndarray = inside & (np.einsum("npk,nk->np", places, ways) >= farthest[:, None])
    return found
