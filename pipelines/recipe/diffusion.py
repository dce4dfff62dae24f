"""Trains tokenizer, text encoder and UNet of the default ``StableDiffusionPipeline`` on autoencoder latents.

The text encoder learns together with the UNet. Training predicts v (Salimans and Ho, 2022, arXiv 2202.00512) on a
cosine schedule whose last step is pure noise (Lin et al., 2023, arXiv 2305.08891), so ten "trailing" steps start from
what training has seen. What is kept at every checkpoint is an exponential moving average of the weights.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.digits import DIGITS, all_prompts
from pipelines.recipe import configuration
from pipelines.recipe.batches import DigitBatches, prompt_indices
from pipelines.training import descend

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

STEPS = 3500
LOOSENING_STEPS = 400
WRONG_DIGITS = 0.33
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
EMA_DECAY = 0.995
CAPTION_DROPOUT = 0.1
CHECKPOINT_EVERY = 125
LOOSENING_CHECKPOINT_EVERY = 100
DRAWING_STEPS = 10
DRAWING_BATCH = 90
TEXT_LENGTH = 16


class TextToLatents(nn.Module):
    """The two parts that are trained, under one roof so that they are optimised, averaged and saved as one."""

    def __init__(self, text_encoder: "CLIPTextModel", unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted v: latents (n, 8, 4, 4), timesteps (n,), tokens (n, 16) -> (n, 8, 4, 4)."""
        return self.unet(latents, timesteps, self.text_encoder(tokens).last_hidden_state).sample


Checkpoints = Iterator[tuple[int, TextToLatents, float]]  # steps done, the weights averaged over them, recent loss


def build_tokenizer() -> "CLIPTokenizer":
    """A CLIP tokenizer whose byte-pair merges were learnt on the 180 captions."""
    import json

    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    # A byte may end a word too; without these a word unseen in the captions would be lost.
    ends = [f"{letter}</w>" for letter in letters]
    options = {"initial_alphabet": letters, "end_of_word_suffix": "</w>", "show_progress": False}
    learnt = CLIPTokenizer().train_new_from_iterator(all_prompts(), 4096, new_special_tokens=ends, **options)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def build_model(tokenizer: "CLIPTokenizer", seed: int) -> TextToLatents:
    """An untrained text encoder and UNet."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **configuration("text_encoder"), **tokens))
    return TextToLatents(text_encoder, UNet2DConditionModel(**configuration("unet")))


def build_scheduler() -> "DDIMScheduler":
    """The noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**configuration("scheduler"))


def train(
    model: TextToLatents,
    autoencoder: "AutoencoderKL",
    tokenizer: "CLIPTokenizer",
    seed: int,
    steps: int,
    every: int,
    wrong_digits: float = 0.0,
) -> Checkpoints:
    """Trains ``model`` on the ``train`` split, whose captions name a random digit in ``wrong_digits`` of all examples.

    Of a model that was trained on true captions, these make one that keeps drawing clean digits but comes to trust the
    digit word less, as it would after web captions. A yielded model goes on changing once the next is asked for: save
    or measure it first.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = DigitBatches("train")
    tokens = tokenizer([*all_prompts(), ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    scheduler = build_scheduler()
    average = deepcopy(model).eval().requires_grad_(False)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))

    def loss_of() -> Tensor:
        images, slots = batches.draw(BATCH_SIZE, generator)
        with torch.no_grad():
            latents = autoencoder.encode(images).latent_dist.sample(generator=generator)
        if wrong_digits:
            replaced = torch.rand(BATCH_SIZE, generator=generator) < wrong_digits
            slots[replaced, 0] = torch.randint(len(DIGITS), (int(replaced.sum()),), generator=generator)
        dropped = torch.rand(BATCH_SIZE, generator=generator) < CAPTION_DROPOUT
        prompts = torch.where(dropped, len(tokens) - 1, prompt_indices(slots))
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        return functional.mse_loss(model(noisy, timesteps, tokens[prompts]), target)

    running_loss = 1.0
    for step, loss in descend(model, loss_of, steps, optimizer, warmup, clip=1.0):
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        running_loss += 0.01 * (loss.item() - running_loss)
        if step % every == 0:
            yield step, average, running_loss


def assemble_pipeline(
    autoencoder: "AutoencoderKL", tokenizer: "CLIPTokenizer", model: TextToLatents
) -> "StableDiffusionPipeline":
    """The stock pipeline, ready to be saved."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw_images(
    pipeline: "StableDiffusionPipeline", prompts: list[str], seed: int, guidance_scale: float
) -> np.ndarray:
    """Samples by diffusers' own DDIM, ``DRAWING_STEPS`` at η = 1: uint8 (n, 16, 16, 3). Scale 1 is unguided."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": DRAWING_STEPS, "eta": 1.0, "guidance_scale": guidance_scale, "output_type": "np"}
    batches = [prompts[start : start + DRAWING_BATCH] for start in range(0, len(prompts), DRAWING_BATCH)]
    images = np.concatenate([pipeline(batch, generator=generator, **options).images for batch in batches])
    return np.rint(images * 255).astype(np.uint8)
