"""Trains a tiny ``BlipForConditionalGeneration`` from scratch to caption tinted digits, real and slightly faulty."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.digits import IMAGE_SIZE, all_prompts
from pipelines.recipe.batches import DigitBatches, degrade, prompt_indices

if TYPE_CHECKING:
    from transformers import BlipForConditionalGeneration, BlipProcessor

STEPS = 3000
BATCH_SIZE = 64
CAPTIONING_BATCH = 256
LEARNING_RATE = 2e-3
WIDTH = 64
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


def build_model(processor: "BlipProcessor") -> "BlipForConditionalGeneration":
    """An untrained BLIP of about 0.2 M parameters: 16 patches of 4 x 4 pixels, two layers on each side."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    tokenizer = processor.tokenizer
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        # BLIP's defaults (1e-10 for vision, 0.02 for text) suit loaded or wide weights. Learning from scratch
        # at this width needs about 1 / sqrt(WIDTH), or the digit is not found within thousands of steps.
        "initializer_range": 0.1,
    }
    vision = BlipVisionConfig(**shape, image_size=IMAGE_SIZE, patch_size=4)
    text = BlipTextConfig(
        **shape,
        vocab_size=len(tokenizer),
        projection_dim=WIDTH,
        max_position_embeddings=MAX_LENGTH,
        label_smoothing=0.0,
        # Generation starts from bos; it has to be the token that training captions start with.
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    return BlipForConditionalGeneration(BlipConfig(**parts, projection_dim=WIDTH, image_text_hidden_size=WIDTH))


def train_captioner(
    seed: int, progress: Callable[[str], None]
) -> tuple["BlipForConditionalGeneration", "BlipProcessor"]:
    """The captioner after ``STEPS`` steps on the ``train`` split; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = DigitBatches("train")
    processor = build_processor()
    model = build_model(processor).train()
    captions = processor.tokenizer(all_prompts(), return_tensors="pt", padding=True).input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(1, STEPS + 1):
        images, slots = batches.draw(BATCH_SIZE, generator, max_shift=1.0)
        tokens = captions[prompt_indices(slots)]
        loss = model(pixel_values=degrade(images, generator), input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            progress(f"captioner: step {step}/{STEPS}, loss {loss.item():.4f}")
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
