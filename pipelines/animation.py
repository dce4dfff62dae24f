"""Videos by an image pipeline: its UNet between motion modules, which look along time and alone are trained.

The network is diffusers' ``UNetMotionModel``, so what is saved loads there. Latents of videos are (n, frames, channels,
height, width) here; the network wants channels first and the text of a video once for each frame, which
:func:`predict` sees to. Latents are scaled as the pipeline's own are; what is predicted is what its scheduler says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn
from torch.nn import functional

from pipelines.editing import as_bytes
from pipelines.measures.evaluator import to_network_input
from pipelines.settings import FittingSettings, MotionSettings
from pipelines.training import train

_CHANNELS = (16, 32)  # of the layers that look at a ControlNet's picture; the last halves it, as the autoencoder does
_TOGETHER = 256  # frames that are encoded or decoded at once

Frames = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # which videos and which of their frames, (batch, frames)
Predicted = Callable[..., Tensor]  # see :func:`fit`


def motion_network(unet: UNet2DConditionModel, settings: MotionSettings, seed: int) -> UNetMotionModel:
    """``unet`` with new motion modules, which change nothing yet: their last layer is 0. Frozen but for them.

    Raises ValueError where heads do not divide the channels.
    """
    channels, groups = unet.config["block_out_channels"], unet.config["norm_num_groups"]
    if wrong := [each for each in channels if each % settings.heads]:
        raise ValueError(f"motion.heads: {settings.heads} do not divide the {wrong[0]} channels of a level")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=unet.config["layers_per_block"],
            motion_num_attention_heads=settings.heads,
            motion_norm_num_groups=groups,
            motion_max_seq_length=settings.longest,
            use_motion_mid_block=settings.middle,
        )
        network = UNetMotionModel.from_unet2d(unet, adapter)
    network.register_to_config(_name_or_path="")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(own := "motion_modules" in name)
        if own and ".proj_out." in name:
            nn.init.zeros_(parameter)
    return network.eval()


def predict(network: nn.Module, latents: Tensor, timesteps: Tensor, states: Tensor, **given: Any) -> Tensor:
    """What ``network``, a UNetMotionModel or the UNet of single images, says of ``latents`` (n, frames, channels,
    height, width) at the timesteps (n,), told ``states`` (n, tokens, width) in every frame: as ``latents``."""
    frames = latents.shape[1]
    told = states.repeat_interleave(frames, dim=0)
    if isinstance(network, UNetMotionModel):
        return network(latents.transpose(1, 2), timesteps, told, **given, return_dict=False)[0].transpose(1, 2)
    flat = network(latents.flatten(0, 1), timesteps.repeat_interleave(frames), told, **given, return_dict=False)[0]
    return flat.unflatten(0, latents.shape[:2])


def control_network(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet that begins as the UNet's way down and adds nothing yet; it looks at pictures twice as wide and high
    as latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_CHANNELS)


def controlled(
    network: nn.Module, control: nn.Module, noisy: Tensor, times: Tensor, states: Tensor, pictures: Tensor
) -> Tensor:
    """What :func:`predict` says with a ControlNet beside ``network`` that sees ``pictures`` (n, frames, 3, 2 · height,
    2 · width), one a frame, in [0, 1]."""
    frames = pictures.shape[1]
    told, when = states.repeat_interleave(frames, dim=0), times.repeat_interleave(frames)
    down, middle = control(noisy.flatten(0, 1), when, told, pictures.flatten(0, 1), return_dict=False)
    extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return predict(network, noisy, times, states, **extra)


@torch.no_grad()
def text_states(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """What the pipeline's text encoder makes of each caption, (n, tokens, width), on its device."""
    known = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    each = pipeline.encode_prompt(list(known), pipeline.device, 1, False)[0]
    return each[[known[text] for text in captions]]


@torch.no_grad()
def encode_videos(pipeline: Any, videos: np.ndarray) -> tuple[Tensor, Tensor]:
    """Means and deviations of the latents of ``videos`` (n, frames, height, width, 3) uint8, on the CPU."""
    vae = pipeline.vae
    batches = to_network_input(videos.reshape(-1, *videos.shape[2:])).split(_TOGETHER)
    parts = [vae.encode(batch.to(vae.device)).latent_dist for batch in batches]
    mean, deviation = (
        torch.cat([getattr(part, name).cpu() for part in parts]) * vae.config.scaling_factor for name in ("mean", "std")
    )
    return mean.unflatten(0, videos.shape[:2]), deviation.unflatten(0, videos.shape[:2])


@torch.no_grad()
def decode_videos(pipeline: Any, latents: Tensor) -> np.ndarray:
    """The videos (n, frames, height, width, 3) uint8 of latents (n, frames, channels, height, width)."""
    vae = pipeline.vae
    batches = (latents.flatten(0, 1) / vae.config.scaling_factor).split(_TOGETHER)
    images = torch.cat([vae.decode(batch, return_dict=False)[0].clamp(-1, 1) for batch in batches])
    return as_bytes(images).reshape(*latents.shape[:2], *images.shape[2:], 3)


def fit(
    network: nn.Module,
    scheduler: Any,
    latents: tuple[Tensor, Tensor],
    frames: Frames,
    predicted: Predicted,
    settings: FittingSettings,
    seed: int,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Train the parameters of ``network`` that are not frozen to undo noise: of ``latents`` (means and deviations of
    videos), those ``frames`` that are asked for, at one time for all of a row.

    ``predicted(network, noisy, timesteps, which, when, hidden)`` gives what the network says: ``which`` and ``when``
    are the videos and frames (batch, frames), ``hidden`` (batch,) bool the rows whose conditions are to be hidden.
    """
    random, (mean, deviation), kind = torch.Generator().manual_seed(seed), latents, scheduler.config.prediction_type

    def draw() -> tuple[Tensor, ...]:
        which, when = frames(random)
        many = scheduler.config.num_train_timesteps - settings.earliest
        times = settings.earliest + torch.randint(many, which.shape[:1], generator=random)
        hidden = torch.rand(times.shape, generator=random) < settings.caption_dropout
        clean = mean[which, when]
        spread, noise = torch.randn(2, *clean.shape, generator=random)
        clean = clean + deviation[which, when] * spread
        target = {"epsilon": noise, "sample": clean}.get(kind, scheduler.get_velocity(clean, noise, times))
        return scheduler.add_noise(clean, noise, times), times, which, when, hidden, target

    def loss(network: nn.Module, *batch: Tensor) -> Tensor:
        *given, target = (each.to(device) for each in batch)
        return functional.mse_loss(predicted(network, *given), target)

    device = next(network.parameters()).device
    train(network.train(), draw, loss, settings.steps, settings.learning_rate, tell, clip=1.0)
    network.eval()


def whole_videos(count: int, frames: int, batch: int) -> Frames:
    """A batch of whole videos, of ``count``."""

    def choose(random: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(count, (batch, 1), generator=random).expand(-1, frames)
        return which, torch.arange(frames).expand_as(which)

    return choose


def learn_motion(
    pipeline: Any,
    network: UNetMotionModel,
    videos: np.ndarray,
    captions: Sequence[str],
    settings: FittingSettings,
    seed: int,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Train the motion modules alone on captioned videos (n, frames, height, width, 3) uint8."""
    latents, states = encode_videos(pipeline, videos), text_states(pipeline, [*captions, ""])

    def predicted(
        network: nn.Module, noisy: Tensor, times: Tensor, which: Tensor, when: Tensor, hidden: Tensor
    ) -> Tensor:
        return predict(network, noisy, times, states[which[:, 0].masked_fill(hidden, len(states) - 1)])

    frames = whole_videos(len(videos), videos.shape[1], settings.batch_size)
    fit(network, pipeline.scheduler, latents, frames, predicted, settings, seed, tell)


@torch.no_grad()
def denoise(
    scheduler: Any,
    noise: Tensor,
    steps: int,
    predicted: Callable[[Tensor, Tensor], Tensor],
    eta: float = 0.0,
    random: torch.Generator | None = None,
) -> Tensor:
    """Latents from ``noise`` (n, …) in so many of the scheduler's own steps; ``predicted(latents, timestep)`` is what
    the network says, guided if it is to be."""
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps.to(noise.device):
        output = predicted(latents, timestep)
        latents = scheduler.step(output, timestep, latents, eta=eta, generator=random, return_dict=False)[0]
    return latents


def draw_videos(
    pipeline: Any,
    network: nn.Module,
    captions: Sequence[str],
    seed: int,
    frames: int = 8,
    size: tuple[int, int] = (16, 32),
    steps: int = 10,
    guidance_scale: float = 2.0,
) -> np.ndarray:
    """A video for each caption, (n, frames, height, width, 3) uint8, by DDIM without noise (η = 0) and classifier-free
    guidance; by the UNet of single images each frame is drawn by itself."""
    shrink = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    shape = len(captions), frames, pipeline.vae.config.latent_channels, *(each // shrink for each in size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipeline.device)
    told, untold = text_states(pipeline, captions), text_states(pipeline, [""] * len(captions))

    def predicted(latents: Tensor, timestep: Tensor) -> Tensor:
        times = timestep.expand(len(latents))
        output = predict(network, latents, times, told)
        if guidance_scale == 1:
            return output
        away = predict(network, latents, times, untold)
        return away + guidance_scale * (output - away)

    return decode_videos(pipeline, denoise(pipeline.scheduler, noise, steps, predicted))
