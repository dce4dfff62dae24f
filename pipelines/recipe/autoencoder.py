"""Trains the ``AutoencoderKL`` between 16 x 16 x 3 images and 4 x 4 x 8 latents of zero mean and unit variance."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.recipe import configuration
from pipelines.recipe.batches import DigitBatches
from pipelines.training import train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STEPS = 2000
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4  # per latent element


def train_autoencoder(seed: int, progress: Callable[[str], None]) -> "AutoencoderKL":
    """The autoencoder after ``STEPS`` steps on the ``train`` split; the same for the same seed."""
    from diffusers import AutoencoderKL

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = DigitBatches("train")
    autoencoder = AutoencoderKL(**configuration("autoencoder")).train()

    def loss() -> Tensor:
        images, _ = batches.draw(BATCH_SIZE, generator)
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=generator)).sample
        return functional.l1_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    train(autoencoder, loss, STEPS, LEARNING_RATE, progress, warmup=0.1, clip=1.0, weight_decay=1e-4)
    _standardise_latents(autoencoder.eval(), batches.draw(2048, generator)[0])
    return autoencoder


@torch.no_grad()
def _standardise_latents(autoencoder: "AutoencoderKL", images: torch.Tensor) -> None:
    """Folds each latent channel's mean and deviation over ``images`` into the 1 x 1 convolutions around the latents.

    A Stable Diffusion pipeline can only scale latents, not shift them; after this it has to do neither.
    """
    latents = autoencoder.encode(images).latent_dist.mean
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2 * deviation.log()  # the second half is the posterior's log-variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]
