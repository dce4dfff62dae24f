"""Samples of a generator, of several universes side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Samples of several universes side by side.

    ``values`` (universes, n, …): float64 points, or uint8 images (1, n, height, width, channels). ``labels``
    (universes, n) int64, where there are labels. ``weights`` (n,) float64, None for equal ones: how much each sample
    counts in a fit. ``origin`` (universes, d), None for 0: the point from which the Gaussian family counts its values.
    ``captions`` (universes, n) of text: what a model reads beside each image. ``notes``, by name (universes, n, …):
    what else is kept of each, such as the prompt it was asked for, its reward and its rivals' rewards.
    """

    values: np.ndarray
    labels: np.ndarray | None = None
    weights: np.ndarray | None = None
    origin: np.ndarray | None = None
    captions: np.ndarray | None = None
    notes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> "Samples":
        """Of each universe the samples at ``rows`` (universes, n)."""

        def taken(array: np.ndarray) -> np.ndarray:
            return np.stack([each[row] for each, row in zip(array, rows, strict=True)])

        labels, captions = (None if each is None else taken(each) for each in (self.labels, self.captions))
        notes = {name: taken(each) for name, each in self.notes.items()}
        return Samples(taken(self.values), labels, captions=captions, notes=notes)

    @staticmethod
    def joined(parts: Sequence["Samples"]) -> "Samples":
        """All of them, one after the other."""

        def all_of(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
            known = [each for each in arrays if each is not None]
            return np.concatenate(known, axis=1) if known else None

        notes = {name: np.concatenate([part.notes[name] for part in parts], axis=1) for name in parts[0].notes}
        labels, captions = all_of([part.labels for part in parts]), all_of([part.captions for part in parts])
        values = np.concatenate([part.values for part in parts], axis=1)
        return Samples(values, labels, captions=captions, notes=notes)
