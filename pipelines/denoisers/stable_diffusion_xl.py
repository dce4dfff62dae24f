"""Stable Diffusion XL: two text encoders, and a network that is given the size of the image."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipelines.denoisers import ModelFiles
from pipelines.denoisers.family import Conditions
from pipelines.denoisers.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """``encoder_hidden_states`` of both encoders, ``text_embeds`` of the second, ``time_ids`` of the image's size."""

    pipeline_class = "StableDiffusionXLPipeline"
    options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    scales = ("latents_mean", "latents_std")

    @classmethod
    def load(cls, files: ModelFiles, dtype: torch.dtype, device: str | None = None) -> Self:
        """The autoencoder stays in float32 where it says that it overflows in half precision."""
        family = super().load(files, dtype, device)
        if family.pipeline.vae.config.force_upcast:
            family.pipeline.vae.to(torch.float32)
        return family

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Without a prompt all zeros, if the model was trained that way."""
        pipeline = self.pipeline
        states, _, pooled, _ = pipeline.encode_prompt(prompt or "", None, device, 1, False)
        if prompt is None and pipeline.config.force_zeros_for_empty_prompt:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        size = (self.network.config.sample_size * pipeline.vae_scale_factor,) * 2
        width = pipeline.text_encoder_2.config.projection_dim
        ids = pipeline._get_add_time_ids(size, (0, 0), size, states.dtype, width)
        return {"encoder_hidden_states": states[0], "text_embeds": pooled[0], "time_ids": ids[0].to(device)}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """ε or v."""
        states = conditions["encoder_hidden_states"]
        return self.network(latents, timesteps, states, added_cond_kwargs=conditions, return_dict=False)[0]
