"""FLUX.1: a flow whose transformer reads four latents as one token, and is told how strong guidance is to be."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pipelines.denoisers.family import Conditions
from pipelines.denoisers.flow import FlowFamily

_TIMES = 1000  # the transformer multiplies its time by as much


class Flux(FlowFamily):
    """``FluxPipeline``: dev, whose guidance is an input of the network, and schnell, which has none. Trajectories hold
    latents as images (channels, height, width); tokens are made of them in each call."""

    pipeline_class = "FluxPipeline"
    options: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    even_times = True

    @property
    def tokens(self) -> int:
        """Two by two latents each."""
        _, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Hidden states (tokens, width) of T5, and CLIP's of the prompt as a whole (width,)."""
        states, pooled, _ = self.pipeline.encode_prompt(prompt or "", device=device)
        return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The velocity ε − x_0."""
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        tokens = pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(tokens)
        output = self.network(
            hidden_states=tokens,
            timestep=timesteps.to(latents.dtype) / _TIMES,
            **conditions,
            txt_ids=tokens.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), 2)
