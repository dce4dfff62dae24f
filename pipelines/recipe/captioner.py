"""Trains a tiny ``BlipForConditionalGeneration`` from scratch to caption tinted digits, real and slightly faulty."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.digits import IMAGE_SIZE, all_prompts
from pipelines.recipe import configuration
from pipelines.recipe.batches import DigitBatches, degrade, prompt_indices
from pipelines.training import train

if TYPE_CHECKING:
    from transformers import BlipForConditionalGeneration, BlipProcessor

STEPS = 3000
BATCH_SIZE = 64
CAPTIONING_BATCH = 256
LEARNING_RATE = 2e-3
MAX_LENGTH = 16


def build_processor() -> "BlipProcessor":
    """The processor: images scaled to [-1, 1], captions split into whole words (the vocabulary has no others)."""
    from transformers import BertTokenizerFast, BlipImageProcessorPil, BlipProcessor

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words = sorted({word for prompt in all_prompts() for word in prompt.split()})
    vocabulary = {token: index for index, token in enumerate(special + words)}
    tokenizer = BertTokenizerFast(
        vocab=vocabulary,
        do_lower_case=True,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    image_processor = BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return BlipProcessor(image_processor=image_processor, tokenizer=tokenizer)


def train_captioner(
    seed: int, progress: Callable[[str], None]
) -> tuple["BlipForConditionalGeneration", "BlipProcessor"]:
    """The captioner after ``STEPS`` steps on the ``train`` split; the same for the same seed."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = DigitBatches("train")
    processor = build_processor()
    parts = configuration("captioner")
    parts["text_config"]["vocab_size"] = len(processor.tokenizer)
    model = BlipForConditionalGeneration(BlipConfig(**parts)).train()
    captions = processor.tokenizer(all_prompts(), return_tensors="pt", padding=True).input_ids

    def loss() -> torch.Tensor:
        images, slots = batches.draw(BATCH_SIZE, generator, max_shift=1.0)
        tokens = captions[prompt_indices(slots)]
        return model(pixel_values=degrade(images, generator), input_ids=tokens, labels=tokens).loss

    train(model, loss, STEPS, LEARNING_RATE, progress, warmup=0.1, clip=1.0, weight_decay=0.05)
    return model.eval(), processor


@torch.inference_mode()
def caption_images(model: "BlipForConditionalGeneration", processor: "BlipProcessor", images: np.ndarray) -> list[str]:
    """Greedy captions of uint8 images (n, 16, 16, 3)."""
    captions: list[str] = []
    for start in range(0, len(images), CAPTIONING_BATCH):
        inputs = processor(images=list(images[start : start + CAPTIONING_BATCH]), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=MAX_LENGTH - 2, do_sample=False, num_beams=1)
        captions += processor.batch_decode(tokens, skip_special_tokens=True)
    return captions
