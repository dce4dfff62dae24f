"""Trains tokenizer, text encoder and UNet of the default ``StableDiffusionPipeline`` on autoencoder latents.

The text encoder learns together with the UNet. Training predicts v (Salimans and Ho, 2022, arXiv 2202.00512) on a
cosine schedule whose last step is pure noise (Lin et al., 2023, arXiv 2305.08891), so ten "trailing" steps start from
what training has seen. What is kept at every checkpoint is an exponential moving average of the weights.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.digits import DIGITS, all_prompts
from pipelines.evaluator import load_evaluator
from pipelines.recipe import configuration
from pipelines.recipe.batches import DigitBatches, prompt_indices
from pipelines.recipe.parts import Measurements, Tell, accuracy, parameters
from pipelines.training import descend

TARGET_ACCURACY = 0.56
CURVE_IMAGES, CANDIDATE_IMAGES, FINE_IMAGES = 2, 5, 10  # of each prompt, to measure a checkpoint by
DRAWING_STEPS, DRAWING_BATCH = 10, 90
TEXT_LENGTH = 16


Checkpoints = Iterator[tuple[int, StableDiffusionPipeline, float]]  # steps done, the averaged weights, recent loss


def build_pipeline(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """Trains to the end, loosens the digits, and saves the loosened checkpoint nearest ``TARGET_ACCURACY``."""
    how, judge = configuration()["training"]["pipeline"], load_evaluator(built / "evaluator")

    def measure(pipeline: StableDiffusionPipeline, images: int, guidance_scale: float = 1.0) -> dict[str, float]:
        prompts = _asked(images)
        return accuracy(judge.judge(draw_images(pipeline, prompts, seed, guidance_scale), prompts))

    def follow(checkpoints: Checkpoints, images: int, before: int) -> Iterator[tuple[Measurements, Any]]:
        for step, average, loss in checkpoints:
            point: Measurements = {"step": before + step, **measure(average, images)}
            tell(f"diffusion: loss {loss:.4f}, unguided accuracy {point}")
            yield point, deepcopy(average)

    def measure_finely(point: Measurements, pipeline: StableDiffusionPipeline) -> Measurements:
        fine = {f"guidance_{scale}": measure(pipeline, FINE_IMAGES, scale) for scale in (1, 2)}
        tell(f"diffusion: step {point['step']} measured again: {fine}")
        return {"step": point["step"], **fine}

    curve = list(follow(train(_untrained(built, seed), seed, **how["supervised"]), CURVE_IMAGES, 0))
    loosened = train(deepcopy(curve[-1][1]), seed + 1, **how["loosening"])
    candidates = list(follow(loosened, CANDIDATE_IMAGES, curve[-1][0]["step"]))
    chosen = min(candidates, key=lambda candidate: abs(candidate[0]["full"] - TARGET_ACCURACY))
    chosen[1].save_pretrained(directory)
    return {
        "parameters": {name: parameters(getattr(chosen[1], name)) for name in ("unet", "text_encoder")},
        "curve": [point for point, _ in curve],
        "curve_images": len(_asked(CURVE_IMAGES)),
        "candidates": [point for point, _ in candidates],
        "candidate_images": len(_asked(CANDIDATE_IMAGES)),
        "wrong_digits": how["loosening"]["wrong_digits"],
        "supervised": measure_finely(*curve[-1]),
        "chosen": measure_finely(*chosen),
        "fine_images": len(_asked(FINE_IMAGES)),
        "torch": torch.__version__,
    }


def _asked(images: int) -> list[str]:
    """Every caption, for so many images of each."""
    return all_prompts() * images


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt on the 180 captions."""
    letters = sorted(ByteLevel.alphabet())
    # A byte may end a word too; without these a word unseen in the captions would be lost.
    ends = [f"{letter}</w>" for letter in letters]
    options = {"initial_alphabet": letters, "end_of_word_suffix": "</w>", "show_progress": False}
    learnt = CLIPTokenizer().train_new_from_iterator(all_prompts(), 4096, new_special_tokens=ends, **options)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def _untrained(built: Path, seed: int) -> StableDiffusionPipeline:
    """The stock pipeline around the autoencoder that was built, with an untrained text encoder and UNet."""
    networks, tokenizer = configuration(), build_tokenizer()
    autoencoder = AutoencoderKL.from_pretrained(built / ".autoencoder").eval()
    autoencoder.register_to_config(_name_or_path="")  # or the builder's own path would be shipped
    torch.manual_seed(seed)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words = CLIPTextConfig(vocab_size=len(tokenizer), **networks["text_encoder"], **tokens)
    trained = {"text_encoder": CLIPTextModel(words), "unet": UNet2DConditionModel(**networks["unet"])}
    scheduler = DDIMScheduler(**networks["scheduler"])
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=autoencoder, tokenizer=tokenizer, scheduler=scheduler, **trained, **absent)


def train(
    pipeline: StableDiffusionPipeline, seed: int, steps: int, every: int, wrong_digits: float = 0.0
) -> Checkpoints:
    """Trains on the ``train`` split, whose captions name a random digit in ``wrong_digits`` of all examples.

    Of a model that was trained on true captions, these make one that keeps drawing clean digits but comes to trust the
    digit word less, as it would after web captions. A yielded pipeline goes on changing once the next is asked for:
    save or measure it first.
    """
    how, generator = configuration()["training"]["pipeline"], torch.Generator().manual_seed(seed)
    batches, size, scheduler = DigitBatches("train"), how["batch_size"], pipeline.scheduler
    captions = pipeline.tokenizer([*all_prompts(), ""], padding="max_length", truncation=True, return_tensors="pt")
    tokens, average = captions.input_ids, deepcopy(pipeline)
    # The two parts that are trained, optimised and averaged as one.
    networks, averages = (nn.ModuleList([each.text_encoder, each.unet]) for each in (pipeline, average))
    averages.eval().requires_grad_(False)
    networks.train().requires_grad_(True)
    rate, warmup_steps = how["learning_rate"], how["warmup_steps"]
    optimizer = torch.optim.AdamW(networks.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps))

    def loss_of() -> Tensor:
        images, slots = batches.draw(size, generator)
        with torch.no_grad():
            latents = pipeline.vae.encode(images).latent_dist.sample(generator=generator)
        if wrong_digits:
            replaced = torch.rand(size, generator=generator) < wrong_digits
            slots[replaced, 0] = torch.randint(len(DIGITS), (int(replaced.sum()),), generator=generator)
        dropped = torch.rand(size, generator=generator) < how["caption_dropout"]
        prompts = torch.where(dropped, len(tokens) - 1, prompt_indices(slots))
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (size,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        words = pipeline.text_encoder(tokens[prompts]).last_hidden_state
        return functional.mse_loss(pipeline.unet(noisy, timesteps, words).sample, target)

    running_loss = 1.0
    for step, loss in descend(networks, loss_of, steps, optimizer, warmup, clip=1.0):
        with torch.no_grad():
            decay = min(how["ema_decay"], step / (step + 10))
            torch._foreach_lerp_(list(averages.parameters()), list(networks.parameters()), 1.0 - decay)
        running_loss += 0.01 * (loss.item() - running_loss)
        if step % every == 0:
            yield step, average, running_loss


def draw_images(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, guidance_scale: float) -> np.ndarray:
    """Samples by diffusers' own DDIM, ``DRAWING_STEPS`` at η = 1: uint8 (n, 16, 16, 3). Scale 1 is unguided."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": DRAWING_STEPS, "eta": 1.0, "guidance_scale": guidance_scale, "output_type": "np"}
    batches = [prompts[start : start + DRAWING_BATCH] for start in range(0, len(prompts), DRAWING_BATCH)]
    images = np.concatenate([pipeline(batch, generator=generator, **options).images for batch in batches])
    return np.rint(images * 255).astype(np.uint8)
