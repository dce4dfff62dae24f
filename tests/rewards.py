"""Somebody's own rewards, named by their import path."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

NOT_A_FUNCTION = 3


def redness(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """How much redder than green an image is."""
    return (images[..., 0].astype(float) - images[..., 1]).mean(axis=(1, 2)) / 255


def the_opposite(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """What is lost as :func:`redness` is gained."""
    return -redness(images, prompts, captions)


def jitter(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None, size: float) -> np.ndarray:
    """Of no meaning, but a function of the image; takes an option."""
    return size * (images.astype(int).sum(axis=(1, 2, 3)) % 7)


def the_same(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """Tells no image from another."""
    return np.full(len(images), 0.5)


def not_a_number(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """A reward that failed without saying so."""
    return np.full(len(images), np.nan)


def minus_square(values: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Prefers samples near 0 (MAD's curated rule)."""
    return -3 * values[:, 0] ** 2


def one_number(values: np.ndarray, labels: np.ndarray | None) -> float:
    """Not one number a sample."""
    return 1.0


def two_arguments(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """Cannot be asked as rewards are."""
    return [0.0] * len(prompts)


async def later(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> list[float]:
    """Returns no numbers, but a promise."""
    return [0.0] * len(prompts)


def one_by_one(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> Iterator[float]:
    """Yields its numbers."""
    yield from [0.0] * len(prompts)


class Holds:
    """A class that holds what it needs, which nothing is."""

    def __init__(self, path: str, weight: float = 1.0) -> None:
        raise AssertionError(f"{path} cannot be held")

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> list[float]:
        raise AssertionError("it is not asked")


class Waits:
    """:func:`redness`, which waits between two files: a run stays where a test wants to find it."""

    def __init__(self, since: str, until: str) -> None:
        self._since, self._until = Path(since), Path(until)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        while self._since.exists() and not self._until.exists():
            time.sleep(0.02)
        return redness(images, prompts, captions)


class NeverCalled:
    """Its instances cannot be called."""


class AskedForTwo:
    """Its instances take two arguments."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        raise AssertionError("it is not asked")


def fails(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> list[float]:
    """A reward with a mistake in it."""
    return _deeper({"weights": 1.0})


def fails_later(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """A reward with a mistake that two images do not show."""
    return redness(images, prompts, captions) if len(images) <= 2 else np.array(_deeper({"weights": 1.0}))


def _deeper(table: dict[str, float]) -> list[float]:
    return [table["the weights"]]


HANG = Path(tempfile.gettempdir()) / f"ouroboros-hang-{os.getuid()}"


def hangs_once(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """:func:`redness`, but a call that finds ``HANG`` takes it away and never comes back."""
    if HANG.exists():
        HANG.unlink()
        time.sleep(3600)
    return redness(images, prompts, captions)
