"""Trains what stands around the diffusion model: the judge, the captioner, and the autoencoder of its latents.

Each function trains from scratch, the same for the same seed, saves into ``directory`` and returns what it measured on
test digits. ``built`` holds the parts that were built before; ``tell`` hears how it goes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from pipelines.digits import CHOICES, IMAGE_SIZE, SLOTS, all_prompts, load_split, parse, render
from pipelines.evaluator import Evaluator, EvaluatorNetwork, load_evaluator, save_evaluator, to_network_input
from pipelines.recipe import configuration
from pipelines.recipe.batches import DigitBatches, degrade, prompt_indices
from pipelines.training import train

EVALUATOR_CHANNELS = 24
CAPTION_LENGTH = 16

Tell = Callable[[str], None]
Measurements = dict[str, Any]


def build_evaluator(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """The independent judge, on the split reserved for it, of images varied and degraded as generated ones are."""
    how, generator, batches = _begin("evaluator", seed, "evaluator")
    classes = {slot: list(CHOICES[slot]) for slot in SLOTS}
    network = EvaluatorNetwork(classes, EVALUATOR_CHANNELS, IMAGE_SIZE).train()

    def loss() -> Tensor:
        images, slots = batches.draw(how["batch_size"], generator, max_shift=1.5)
        logits = network(degrade(images, generator))
        pairs = [(logits[slot], slots[:, number]) for number, slot in enumerate(SLOTS)]
        digit, ink, ground = (functional.cross_entropy(*pair, label_smoothing=0.05) for pair in pairs)
        return digit + ink + ground

    train(network, loss, tell=tell, **how["descent"])
    evaluator = Evaluator(network, classes, IMAGE_SIZE)
    save_evaluator(evaluator, directory, EVALUATOR_CHANNELS)
    return {"parameters": parameters(network), "test": accuracy(evaluator.judge(*test_set()))}


def build_captioner(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """A tiny BLIP that captions tinted digits, real and slightly faulty."""
    how, generator, batches = _begin("captioner", seed)
    tokenizer, networks = _word_tokenizer(), configuration()["captioner"]
    words = {**networks["text_config"], "vocab_size": len(tokenizer)}
    model = BlipForConditionalGeneration(BlipConfig(**networks | {"text_config": words})).train()
    captions = tokenizer(all_prompts(), return_tensors="pt", padding=True).input_ids

    def loss() -> Tensor:
        images, slots = batches.draw(how["batch_size"], generator, max_shift=1.0)
        tokens = captions[prompt_indices(slots)]
        return model(pixel_values=degrade(images, generator), input_ids=tokens, labels=tokens).loss

    train(model, loss, tell=tell, **how["descent"])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    looks = BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)  # images to [-1, 1]
    processor = BlipProcessor(image_processor=looks, tokenizer=tokenizer)
    for part in (model.eval(), processor):
        part.save_pretrained(directory)
    images, asked = test_set()
    pixels = processor(images=list(images), return_tensors="pt")
    tokens = model.generate(**pixels, max_new_tokens=CAPTION_LENGTH - 2, do_sample=False, num_beams=1)
    written = processor.batch_decode(tokens, skip_special_tokens=True)
    pairs = [(parse(text), parse(truth)) for text, truth in zip(written, asked, strict=True)]
    verdict = {slot: np.array([seen[slot] == true[slot] for seen, true in pairs]) for slot in SLOTS}
    exact = {"full": np.array(written) == np.array(asked)}
    return {"parameters": parameters(model), "test": accuracy(verdict | exact)}


def build_autoencoder(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """The ``AutoencoderKL`` between 16 x 16 x 3 images and 4 x 4 x 8 latents of zero mean and unit variance.

    Measured are the peak signal-to-noise ratio in dB, and the judge's accuracy on the reconstructions.
    """
    how, generator, batches = _begin("autoencoder", seed)
    autoencoder = AutoencoderKL(**configuration()["autoencoder"]).train()

    def loss() -> Tensor:
        images, _ = batches.draw(how["batch_size"], generator)
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return functional.l1_loss(decoded, images) + how["kl_weight"] * divergence

    train(autoencoder, loss, tell=tell, **how["descent"])
    _standardise_latents(autoencoder.eval(), batches.draw(2048, generator)[0])
    autoencoder.save_pretrained(directory)
    images, captions = test_set()
    inputs = to_network_input(images)
    with torch.inference_mode():
        decoded = autoencoder.decode(autoencoder.encode(inputs).latent_dist.mean).sample.clamp(-1, 1)
    pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    error = (decoded - inputs).square().mean().item()
    test = {"psnr_db": round(10 * float(np.log10(4 / error)), 2)}
    test |= accuracy(load_evaluator(built / "evaluator").judge(pixels, captions))
    return {"parameters": parameters(autoencoder), "test": test}


def test_set() -> tuple[np.ndarray, list[str]]:
    """Every test digit in four random tints."""
    digits, rng = load_split("test"), np.random.default_rng(0)
    rounds = [render(digits, rng) for _ in range(4)]
    return np.concatenate([images for images, _ in rounds]), [text for _, texts in rounds for text in texts]


def accuracy(verdict: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of images that show what they should, by slot and in full."""
    return {name: round(float(verdict[name].mean()), 4) for name in (*SLOTS, "full")}


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def _begin(part: str, seed: int, split: Any = "train") -> tuple[dict[str, Any], torch.Generator, DigitBatches]:
    """How a part is trained, the randomness of its batches, and where they are drawn from."""
    torch.manual_seed(seed)
    return configuration()["training"][part], torch.Generator().manual_seed(seed), DigitBatches(split)


def _word_tokenizer() -> BertTokenizerFast:
    """Splits captions into whole words: the vocabulary has no others."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words = sorted({word for prompt in all_prompts() for word in prompt.split()})
    vocabulary = {token: index for index, token in enumerate(special + words)}
    inputs = ["input_ids", "attention_mask"]
    options = {"do_lower_case": True, "model_max_length": CAPTION_LENGTH, "model_input_names": inputs}
    return BertTokenizerFast(vocab=vocabulary, **options)


@torch.no_grad()
def _standardise_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
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
