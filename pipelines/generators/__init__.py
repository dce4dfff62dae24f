"""Generator families of the self-consuming loop, one file each, behind one small protocol.

Whatever a family is, the loop only fits it, draws from it, saves it and loads it. Families whose fit is arithmetic
do thousands of *universes* (seeds) in one call; families that train a network do one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

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


class Generator(Protocol):
    """A fitted generator of one family. ``seeds`` holds one seed a universe; equal seeds give equal results."""

    @classmethod
    def fit(
        cls, settings: Any, data: Samples, seeds: Sequence[int], start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch on ``data``, or go on from ``start``. ``settings`` is the family's own block."""

    def sample(self, count: int, seeds: Sequence[int], bias: float) -> Samples:
        """``count`` samples a universe; ``bias`` in (0, 1] trades diversity for quality, 1 is unbiased (MAD's λ)."""

    def save(self, directory: Path) -> None:
        """Write everything that :meth:`load` needs. Equal generators write equal bytes."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""


class Arrays:
    """A generator that is nothing but the arrays which its dataclass names."""

    def save(self, directory: Path) -> None:
        """Write them. Equal generators write equal bytes."""
        from safetensors.numpy import save_file

        save_file(vars(self), directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Read them."""
        from safetensors.numpy import load_file

        return cls(**load_file(directory / "model.safetensors"))
