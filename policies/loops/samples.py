"""Samples of a generator, of several universes side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Samples of several universes side by side.

    ``values`` (universes, n, …): float64 points, or uint8 images (1, n, height, width, channels). ``labels``
    (universes, n) int64, where there are labels. ``weights`` (n,) float64, None for equal ones: how much each sample
    counts in a fit. ``origin`` (universes, d), None for 0: the point from which the Gaussian family counts its values.
    """

    values: np.ndarray
    labels: np.ndarray | None = None
    weights: np.ndarray | None = None
    origin: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Samples":
        """Of each universe the samples at ``rows`` (universes, n)."""
        values = np.stack([each[row] for each, row in zip(self.values, rows, strict=True)])
        return Samples(values, None if self.labels is None else np.take_along_axis(self.labels, rows, axis=1))

    @staticmethod
    def joined(parts: Sequence["Samples"]) -> "Samples":
        """All of them, one after the other."""
        values = np.concatenate([part.values for part in parts], axis=1)
        labels = [part.labels for part in parts if part.labels is not None]
        return Samples(values, np.concatenate(labels, axis=1) if labels else None)
