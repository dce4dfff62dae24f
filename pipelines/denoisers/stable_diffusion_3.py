"""Stable Diffusion 3 and 3.5."""

import torch
from torch import Tensor

from pipelines.denoisers.family import Conditions
from pipelines.denoisers.flow import FlowFamily


class StableDiffusion3(FlowFamily):
    """With or without the third text encoder, T5: where its files are not there, its tokens are zeros."""

    pipeline_class = "StableDiffusion3Pipeline"

    @property
    def tokens(self) -> int:
        """Patches of the latents."""
        _, height, width = self.latent_shape
        side = self.network.config.patch_size
        return int((height // side) * (width // side))

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Hidden states (tokens, width) of all encoders, and those of both CLIPs as a whole (width,)."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt or "", None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The velocity ε − x_0."""
        return self.network(hidden_states=latents, timestep=timesteps, **conditions, return_dict=False)[0]
