"""Somebody's own rewards, named by their import path."""

from collections.abc import Sequence

import numpy as np

NOT_A_FUNCTION = 3


def redness(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """Mean of the red channel in [0, 1]."""
    return images[..., 0].mean(axis=(1, 2)) / 255
