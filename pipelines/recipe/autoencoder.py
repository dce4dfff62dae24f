"""Trains the ``AutoencoderKL`` between 16 x 16 x 3 images and 4 x 4 x 8 latents of zero mean and unit variance."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pipelines.digits import IMAGE_SIZE
from pipelines.recipe.batches import DigitBatches

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_CHANNELS = 8
STEPS = 2000
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4  # per latent element


def build_autoencoder() -> "AutoencoderKL":
    """An untrained autoencoder that halves the image's sides twice."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def train_autoencoder(seed: int, progress: Callable[[str], None]) -> "AutoencoderKL":
    """The autoencoder after ``STEPS`` steps on the ``train`` split; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = DigitBatches("train")
    autoencoder = build_autoencoder().train()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(1, STEPS + 1):
        images, _ = batches.draw(BATCH_SIZE, generator)
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=generator)).sample
        reconstruction = functional.l1_loss(decoded, images)
        loss = reconstruction + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            progress(f"autoencoder: step {step}/{STEPS}, mean absolute error {reconstruction.item():.4f}")
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
