"""Latents of a step's trajectories, where samplers' results lie."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.rl.weights import from_numpy


class StoredLatents:
    """Those of several trajectories, each (images, T + 1, channels, height, width), as one tensor of all images.

    What is asked for is copied to the ``device``, in float32, and nothing else: learners of a node share the object
    store's memory, and each reads its own rows.
    """

    def __init__(self, parts: Sequence[np.ndarray], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._ends = np.cumsum([len(part) for part in parts])

    def __getitem__(self, where: tuple[Tensor, Tensor | int]) -> Tensor:
        """Of images (batch,) the latents after so many denoising steps, (batch,) or one number."""
        images = where[0].numpy(force=True)
        steps = where[1].numpy(force=True) if isinstance(where[1], Tensor) else np.full(len(images), where[1])
        owners = np.searchsorted(self._ends, images, side="right")
        rows = np.empty((len(images), *self._parts[0].shape[2:]), self._parts[0].dtype)
        for owner in np.unique(owners):
            part, own = self._parts[owner], owners == owner
            rows[own] = part[images[own] - (self._ends[owner] - len(part)), steps[own]]
        return from_numpy(rows, torch.float32).to(self._device)
