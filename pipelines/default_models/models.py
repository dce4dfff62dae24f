"""Trains the default models: the judge, the captioner, and the ``StableDiffusionPipeline`` with its autoencoder.

Each ``build_…`` trains from scratch, the same for the same seed, saves into ``directory`` and returns what it measured.
``built`` holds the parts that were built before; ``tell`` hears how it goes.

Tokenizer, text encoder and UNet learn together on autoencoder latents. Training predicts v (Salimans and Ho, 2022,
arXiv 2202.00512) on a cosine schedule whose last step is pure noise (Lin et al., 2023, arXiv 2305.08891), so ten
"trailing" steps start from what training has seen. What is kept at every checkpoint is an exponential moving average of
the weights.
"""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional

from pipelines.data.digits import CHOICES, DIGITS, IMAGE_SIZE, SLOTS, all_prompts, load_split, parse, render
from pipelines.default_models import configuration
from pipelines.default_models.batches import DigitBatches, degrade, prompt_indices
from pipelines.measures.evaluator import Evaluator, EvaluatorNetwork, load_evaluator, save_evaluator, to_network_input
from pipelines.storage.locations import resolve_model
from pipelines.training import descend, train

EVALUATOR_CHANNELS = 24
CAPTION_LENGTH = 16  # tokens, of what is written and of what is drawn from
TARGET_ACCURACY = 0.56
CURVE_IMAGES, CANDIDATE_IMAGES, FINE_IMAGES = 2, 5, 10  # of each prompt, to measure a checkpoint by
DRAWING_STEPS, DRAWING_BATCH = 10, 90

Tell = Callable[[str], None]
Measurements = dict[str, Any]
Checkpoints = Iterator[tuple[int, StableDiffusionPipeline, float]]  # steps done, the averaged weights, recent loss


def build_evaluator(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """The independent judge, on the split reserved for it, of images varied and degraded as generated ones are."""
    how, generator, batches = _begin("evaluator", seed, "evaluator")
    classes = {slot: list(CHOICES[slot]) for slot in SLOTS}
    network = EvaluatorNetwork(classes, EVALUATOR_CHANNELS, IMAGE_SIZE).train()

    def draw() -> tuple[Tensor, ...]:
        images, slots = batches.draw(how["batch_size"], generator, max_shift=1.5)
        return degrade(images, generator), slots

    def loss(network: nn.Module, images: Tensor, slots: Tensor) -> Tensor:
        logits = network(images)
        pairs = [(logits[slot], slots[:, number]) for number, slot in enumerate(SLOTS)]
        digit, ink, ground = (functional.cross_entropy(*pair, label_smoothing=0.05) for pair in pairs)
        return digit + ink + ground

    train(network, draw, loss, tell=tell, **how["descent"])
    evaluator = Evaluator(network, classes, IMAGE_SIZE)
    save_evaluator(evaluator, directory, EVALUATOR_CHANNELS)
    return {"parameters": parameters(network), "test": accuracy(evaluator.judge(*test_set()))}


def build_captioner(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """A tiny BLIP that captions tinted digits, real and slightly faulty."""
    how, generator, batches = _begin("captioner", seed)
    tokenizer, networks = _word_tokenizer(), configuration()["captioner"]
    words = {**networks["text_config"], "vocab_size": len(tokenizer)}
    config = transformers.BlipConfig(**networks | {"text_config": words})
    model = transformers.BlipForConditionalGeneration(config).train()
    captions = tokenizer(all_prompts(), return_tensors="pt", padding=True).input_ids

    def draw() -> tuple[Tensor, ...]:
        images, slots = batches.draw(how["batch_size"], generator, max_shift=1.0)
        return degrade(images, generator), captions[prompt_indices(slots)]

    def loss(model: Any, images: Tensor, tokens: Tensor) -> Tensor:
        return model(pixel_values=images, input_ids=tokens, labels=tokens).loss

    train(model, draw, loss, tell=tell, divisible=False, **how["descent"])
    into = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    looks = transformers.BlipImageProcessorPil(**into)  # images to [-1, 1]
    processor = transformers.BlipProcessor(image_processor=looks, tokenizer=tokenizer)
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


def build_autoencoder(directory: Path, built: Path, seed: int, tell: Tell, recipe: str = "models") -> Measurements:
    """The ``AutoencoderKL`` between 16 x 16 x 3 images and latents of zero mean and unit variance.

    Measured are the peak signal-to-noise ratio in dB, and the judge's accuracy on the reconstructions.
    """
    how, generator, batches = _begin("autoencoder", seed, recipe=recipe)
    autoencoder = AutoencoderKL(**configuration(recipe)["autoencoder"]).train()

    def draw() -> tuple[Tensor, ...]:
        return batches.draw(how["batch_size"], generator)[:1]

    def loss(autoencoder: Any, images: Tensor) -> Tensor:
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return functional.l1_loss(decoded, images) + how["kl_weight"] * divergence

    train(autoencoder, draw, loss, tell=tell, divisible=False, **how["descent"])
    _standardise_latents(autoencoder.eval(), batches.draw(2048, generator)[0])
    autoencoder.save_pretrained(directory)
    images, captions = test_set()
    inputs = to_network_input(images)
    with torch.inference_mode():
        decoded = autoencoder.decode(autoencoder.encode(inputs).latent_dist.mean).sample.clamp(-1, 1)
    pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    error = (decoded - inputs).square().mean().item()
    test = {"psnr_db": round(10 * float(np.log10(4 / error)), 2)}
    test |= accuracy(judge_of(built).judge(pixels, captions))
    return {"parameters": parameters(autoencoder), "test": test}


def build_pipeline(directory: Path, built: Path, seed: int, tell: Tell) -> Measurements:
    """Trains to the end, loosens the digits, and saves the loosened checkpoint nearest ``TARGET_ACCURACY``."""
    how, judge = configuration()["training"]["pipeline"], judge_of(built)

    def measure(pipeline: StableDiffusionPipeline, images: int, guidance_scale: float = 1.0) -> dict[str, float]:
        prompts = asked(images)
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

    curve = list(follow(train_pipeline(untrained(built, seed), seed, how, **how["supervised"]), CURVE_IMAGES, 0))
    loosened = train_pipeline(deepcopy(curve[-1][1]), seed + 1, how, **how["loosening"])
    candidates = list(follow(loosened, CANDIDATE_IMAGES, curve[-1][0]["step"]))
    chosen = min(candidates, key=lambda candidate: abs(candidate[0]["full"] - TARGET_ACCURACY))
    chosen[1].save_pretrained(directory)
    return {
        "parameters": {name: parameters(getattr(chosen[1], name)) for name in ("unet", "text_encoder")},
        "curve": [point for point, _ in curve],
        "curve_images": len(asked(CURVE_IMAGES)),
        "candidates": [point for point, _ in candidates],
        "candidate_images": len(asked(CANDIDATE_IMAGES)),
        "wrong_digits": how["loosening"]["wrong_digits"],
        "supervised": measure_finely(*curve[-1]),
        "chosen": measure_finely(*chosen),
        "fine_images": len(asked(FINE_IMAGES)),
        "torch": torch.__version__,
    }


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


def asked(images: int) -> list[str]:
    """Every caption, for so many images of each."""
    return all_prompts() * images


def build_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt on the 180 captions."""
    letters = sorted(ByteLevel.alphabet())
    # A byte may end a word too; without these a word unseen in the captions would be lost.
    ends = [f"{letter}</w>" for letter in letters]
    options = {"initial_alphabet": letters, "end_of_word_suffix": "</w>", "show_progress": False}
    untrained = transformers.CLIPTokenizer()
    learnt = untrained.train_new_from_iterator(all_prompts(), 4096, new_special_tokens=ends, **options)
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=CAPTION_LENGTH)


def judge_of(built: Path) -> Evaluator:
    """The evaluator that was built there, or else the shipped one."""
    own = built / "evaluator"
    return load_evaluator(own if own.is_dir() else resolve_model("models/digits/evaluator"))


def untrained(built: Path, seed: int, recipe: str = "models") -> StableDiffusionPipeline:
    """The stock pipeline around the autoencoder that was built, with an untrained text encoder and UNet."""
    networks, tokenizer = configuration(recipe), build_tokenizer()
    autoencoder = AutoencoderKL.from_pretrained(built / ".autoencoder").eval()
    autoencoder.register_to_config(_name_or_path="")  # or the builder's own path would be shipped
    torch.manual_seed(seed)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **networks["text_encoder"], **tokens)
    trained = {"text_encoder": transformers.CLIPTextModel(words), "unet": UNet2DConditionModel(**networks["unet"])}
    scheduler = DDIMScheduler(**networks["scheduler"])
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=autoencoder, tokenizer=tokenizer, scheduler=scheduler, **trained, **absent)


def train_pipeline(
    pipeline: StableDiffusionPipeline,
    seed: int,
    how: dict[str, Any],
    steps: int,
    every: int,
    wrong_digits: float = 0.0,
) -> Checkpoints:
    """Trains on the ``train`` split, whose captions name a random digit in ``wrong_digits`` of all examples.

    Of a model that was trained on true captions, these make one that keeps drawing clean digits but comes to trust the
    digit word less, as it would after web captions. A yielded pipeline goes on changing once the next is asked for:
    save or measure it first.
    """
    generator, widths = torch.Generator().manual_seed(seed), cycle(how.get("widths", [IMAGE_SIZE]))
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

    def draw() -> tuple[Tensor, ...]:
        images, slots = batches.draw(size, generator, width=next(widths))
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
        return noisy, timesteps, tokens[prompts], target

    def loss_of(_: nn.Module, noisy: Tensor, timesteps: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
        words = pipeline.text_encoder(tokens).last_hidden_state
        return functional.mse_loss(pipeline.unet(noisy, timesteps, words).sample, target)

    running_loss = 1.0
    for step, loss in descend(networks, draw, loss_of, steps, optimizer, warmup, clip=1.0):
        with torch.no_grad():
            decay = min(how["ema_decay"], step / (step + 10))
            torch._foreach_lerp_(list(averages.parameters()), list(networks.parameters()), 1.0 - decay)
        running_loss += 0.01 * (loss.item() - running_loss)
        if step % every == 0:
            yield step, average, running_loss


def draw_images(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, guidance_scale: float, width: int = IMAGE_SIZE
) -> np.ndarray:
    """Samples by diffusers' own DDIM, ``DRAWING_STEPS`` at η = 1: uint8 (n, 16, width, 3). Scale 1 is unguided."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": DRAWING_STEPS, "eta": 1.0, "guidance_scale": guidance_scale, "output_type": "np"}
    options |= {"height": IMAGE_SIZE, "width": width}
    batches = [prompts[start : start + DRAWING_BATCH] for start in range(0, len(prompts), DRAWING_BATCH)]
    images = np.concatenate([pipeline(batch, generator=generator, **options).images for batch in batches])
    return np.rint(images * 255).astype(np.uint8)


def _begin(
    part: str, seed: int, split: Any = "train", recipe: str = "models"
) -> tuple[dict[str, Any], torch.Generator, DigitBatches]:
    """How a part is trained, the randomness of its batches, and where they are drawn from."""
    torch.manual_seed(seed)
    return configuration(recipe)["training"][part], torch.Generator().manual_seed(seed), DigitBatches(split)


def _word_tokenizer() -> transformers.BertTokenizerFast:
    """Splits captions into whole words: the vocabulary has no others."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words = sorted({word for prompt in all_prompts() for word in prompt.split()})
    vocabulary = {token: index for index, token in enumerate(special + words)}
    inputs = ["input_ids", "attention_mask"]
    options = {"do_lower_case": True, "model_max_length": CAPTION_LENGTH, "model_input_names": inputs}
    return transformers.BertTokenizerFast(vocab=vocabulary, **options)


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
