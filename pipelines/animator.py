"""Animating one image: an appearance encoder and a pose ControlNet around a pipeline's UNet (MagicAnimate, 2311.16498).

The encoder is a copy of the UNet that is shown the reference without noise; what its self-attentions look at is kept,
and those of the UNet look there, too. So what the digit looks like can come from the reference alone, and where it is
from the ControlNet alone, as the text is empty. All are diffusers' classes, as is what :meth:`Animator.save` writes.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from pipelines.animation import control_network, controlled, denoise, text_states
from policies.animate import fused, repeated, windows


class _Keeping:
    """Self-attention as ever, that keeps what it was given in ``kept`` by its name."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name, self.stock = kept, name, AttnProcessor2_0()

    def __call__(self, attention: Any, hidden_states: Tensor, *rest: Any, **given: Any) -> Tensor:
        self.kept[self.name] = hidden_states
        return self.stock(attention, hidden_states, *rest, **given)


class _Looking(_Keeping):
    """Self-attention whose keys and values are those of the frame and, if something is kept, of the reference; of
    (videos · frames) frames each looks at its video's."""

    def __call__(self, attention: Any, hidden_states: Tensor, *rest: Any, **given: Any) -> Tensor:
        if (there := self.kept.get(self.name)) is None:
            return self.stock(attention, hidden_states, *rest, **given)
        there = there.repeat_interleave(len(hidden_states) // len(there), dim=0)
        return self.stock(attention, hidden_states, torch.cat([hidden_states, there], dim=1))


class Animator(nn.Module):
    """``denoiser``, a UNet of images, or of videos once it has motion modules; ``encoder`` and ``control``: all begin
    as the pipeline's UNet. ``frozen``: the denoiser is not to be trained, as it is not in the paper."""

    def __init__(self, pipeline: Any, seed: int = 0, frozen: bool = False) -> None:
        super().__init__()
        self.encoder = deepcopy(pipeline.unet).requires_grad_(True)
        self.control = control_network(pipeline.unet, seed)
        self.untold: Tensor
        self.register_buffer("untold", text_states(pipeline, [""]), persistent=False)
        self.kept: dict[str, Tensor] = {}
        self._attend(self.encoder, _Keeping)
        self.denoise_with(deepcopy(pipeline.unet).requires_grad_(not frozen))

    def denoise_with(self, denoiser: Any) -> None:
        """Another UNet in the middle, of the same blocks."""
        self.denoiser = denoiser
        self._attend(denoiser, _Looking)

    def _attend(self, network: Any, how: type[_Keeping]) -> None:
        """In the middle and on the way up, as on the way down little is decided yet."""
        own = {
            name: how(self.kept, name)
            for name in network.attn_processors
            if name.startswith(("mid_block.attentions", "up_blocks")) and ".attentions." in name and ".attn1." in name
        }
        network.set_attn_processor({**network.attn_processors, **own})

    def forward(self, noisy: Tensor, times: Tensor, poses: Tensor, reference: Tensor | None) -> Tensor:
        """What is predicted of ``noisy`` (n, frames, channels, height, width) at times (n,), with ``poses`` (n, frames,
        3, 2 · height, 2 · width), and the latents (references, channels, h, w) of the references of as many frames each
        in turn, or without."""
        count, frames = noisy.shape[:2]
        flat, told = noisy.flatten(0, 1), self.untold.expand(count * frames, -1, -1)
        when = times.repeat_interleave(frames)
        self.kept.clear()
        if reference is not None:
            self.encoder(reference, when[:: len(flat) // len(reference)], told[: len(reference)])
        found = controlled(self.denoiser, self.control, noisy, times, told[:count], poses)
        self.kept.clear()
        return found

    def draw(
        self,
        scheduler: Any,
        reference: Tensor | None,
        poses: Tensor,
        shape: tuple[int, ...],
        seed: int,
        steps: int,
        guidance_scale: float,
        length: int,
        overlap: int,
    ) -> Tensor:
        """Latents (n, frames, *shape) of videos of ``poses`` (n, frames, 3, …), as many frames as there are, in windows
        of ``length`` frames; guidance leads away from what is said without a reference."""
        count, frames = poses.shape[:2]
        seen = windows(frames, length, overlap)
        first = torch.randn(count, min(length, frames), *shape, generator=torch.Generator().manual_seed(seed))

        def predicted(latents: Tensor, timestep: Tensor) -> Tensor:
            parts, shown = latents[:, seen].flatten(0, 1), poses[:, seen].flatten(0, 1)

            def said(of: Tensor | None) -> Tensor:
                found = self(parts, timestep.expand(len(parts)), shown, of)
                return fused(found.unflatten(0, (count, len(seen))).transpose(0, 1), seen, frames)

            told = said(reference)
            if reference is None or guidance_scale == 1:
                return told
            away = said(None)
            return away + guidance_scale * (told - away)

        return denoise(scheduler, repeated(first, frames), steps, predicted)

    def save(self, directory: Path) -> None:
        """Directories ``encoder``, ``controlnet`` and ``denoiser``, that diffusers' own classes read."""
        for name, part in (("encoder", self.encoder), ("controlnet", self.control), ("denoiser", self.denoiser)):
            part.register_to_config(_name_or_path="")
            part.save_pretrained(directory / name)


def boxes(columns: np.ndarray, size: tuple[int, int] = (16, 32)) -> Tensor:
    """Poses (n, frames, 3, height, width) in [0, 1]: a square as high as the canvas around the column of each frame
    (n, frames), and how far across and down it a pixel is, as DensePose tells where on a body. It tells the place, and
    neither what is there nor its colour."""
    height, width = size
    across = (np.arange(width) + 0.5 - columns[..., None]) / height + 0.5
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (*columns.shape, *size))
    inside = np.broadcast_to(((across >= 0) & (across <= 1))[..., None, :], down.shape)
    found = np.stack([inside, inside * across[..., None, :], inside * down], axis=2)
    return torch.from_numpy(found).float()
