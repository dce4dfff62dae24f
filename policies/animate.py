"""Long videos by short windows: which frames each looks at, and how what they say of a frame becomes one.

MagicAnimate (2311.16498), section 3.3: windows overlap, the last reaches round to the first frames, and at every
denoising step what they predict is averaged frame by frame.
"""

import torch
from torch import Tensor


def windows(frames: int, length: int, overlap: int) -> Tensor:
    """Which frames each window looks at, (windows, length) int64, counted modulo ``frames``; with an overlap, the last
    one goes on with the first frames. One window of all frames, if there are no more than ``length``.

    Raises ValueError for an overlap that leaves no frame to go on by, and where windows would not meet again.
    """
    if frames <= length:
        return torch.arange(frames)[None]
    stride = length - overlap
    if not 0 <= overlap < length or frames % stride:
        raise ValueError(
            f"windows: {frames} frames are no whole number of windows of {length} with {overlap} in common: "
            f"make them a multiple of {max(stride, 1)}, and the overlap at least 0 and less than the length"
        )
    return (torch.arange(0, frames, stride)[:, None] + torch.arange(length)) % frames


def fused(outputs: Tensor, seen: Tensor, frames: int) -> Tensor:
    """(n, frames, …): of each frame the mean of ``outputs`` (windows, n, length, …) over the windows (windows, length)
    that saw it."""
    count = torch.bincount(seen.flatten(), minlength=frames).to(outputs)
    total = outputs.new_zeros(frames, outputs.shape[1], *outputs.shape[3:])
    total.index_add_(0, seen.flatten().to(outputs.device), outputs.transpose(1, 2).flatten(0, 1))
    return (total / count.view(-1, *[1] * (total.ndim - 1))).transpose(0, 1)


def repeated(noise: Tensor, frames: int) -> Tensor:
    """The noise (n, length, …) of one window for as many frames, again and again: (n, frames, …)."""
    return noise[:, torch.arange(frames) % noise.shape[1]]
