"""A model tried out on torch's meta device, where tensors have shapes and no numbers: the libraries' own loaders, the
network's first step with a prompt, LoRA and the autoencoder, in the memory of the code alone."""

import torch

from pipelines.captioner import Captioner
from pipelines.diffusion import DiffusionPolicy
from pipelines.locations import find
from pipelines.model_files import reading
from pipelines.settings import CaptionerSettings, ModelSettings
from pipelines.trainable import prepare
from policies.settings import SamplingSettings


def rehearse(model: ModelSettings, sampling: SamplingSettings, captioner: CaptionerSettings) -> tuple[int, ...]:
    """Shape of an image (3, height, width). Raises ModelFilesError where files or parts do not fit together."""
    if captioner.path and find(captioner.path):
        Captioner(captioner, "meta")
    policy = DiffusionPolicy(model, sampling, "meta")
    with reading(model.path), torch.no_grad():
        prepare(policy.network, model)
        latents = torch.empty(2, *policy.family.latent_shape, device="meta")
        output = policy.predict(latents, policy.schedule.timesteps[:1].repeat(2), policy.embed(["an image"] * 2))
        if output.shape != latents.shape:
            raise ValueError(f"its network makes {tuple(output.shape[1:])} of {tuple(latents.shape[1:])}")
        return tuple(policy.family.decode(output.to(policy.dtype)).shape[1:])
