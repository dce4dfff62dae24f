"""AnimateDiff: a UNet of Stable Diffusion with motion modules, which draws videos.

A video is an image to the loop: its frames stand below each other, in latents as in pixels, so trajectories, densities
and the order of random numbers are those of any image, and the stock pipeline draws the very same videos.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pipelines.denoisers.family import Conditions
from pipelines.denoisers.stable_diffusion import StableDiffusion


class AnimateDiff(StableDiffusion):
    """``AnimateDiffPipeline``: as many frames as it draws by default, or fewer if its network knows no more places."""

    pipeline_class = "AnimateDiffPipeline"
    options: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """ε, v or x_0 of all frames; every frame has the video's prompt."""
        frames = self.files.frames
        repeated = {name: each.repeat_interleave(frames, dim=0) for name, each in conditions.items()}
        video = latents.unflatten(2, (frames, -1))
        return self.network(video, timesteps, **repeated, return_dict=False)[0].flatten(2, 3)

    def decode(self, latents: Tensor) -> Tensor:
        """Frame by frame."""
        each = latents.unflatten(2, (self.files.frames, -1)).transpose(1, 2)
        pixels = super().decode(each.flatten(0, 1)).unflatten(0, each.shape[:2])
        return pixels.transpose(1, 2).flatten(2, 3)
