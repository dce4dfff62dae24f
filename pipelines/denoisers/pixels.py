"""UNets on pixels, without a prompt: whatever it says, the reward alone decides what is drawn."""

import torch
from torch import Tensor

from pipelines.denoisers.ddim import DdimFamily
from pipelines.denoisers.family import Conditions


class Pixels(DdimFamily):
    """``DDPMPipeline`` and ``DDIMPipeline``."""

    pipeline_class = "DDIMPipeline"

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Nothing."""
        return {}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """ε, v or x_0."""
        return self.network(latents, timesteps, return_dict=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """They are pixels."""
        return latents
