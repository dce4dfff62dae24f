"""Stable Diffusion 1.x and 2.x: a UNet on latents that predicts ε or v, with one text encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.denoisers.ddim import DdimFamily
from pipelines.denoisers.family import Conditions


class StableDiffusion(DdimFamily):
    """Without a safety checker, which would blacken images and so poison the reward."""

    pipeline_class = "StableDiffusionPipeline"
    options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Hidden states (tokens, width)."""
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompt or "", device, 1, False)[0][0]}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """ε, v or x_0."""
        return self.network(latents, timesteps, **conditions, return_dict=False)[0]
