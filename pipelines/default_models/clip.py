"""A small CLIPModel for the digits, where none is at hand: its own classes, trained on the digits' captions.

Not one of the default models; a study or ``python -m benchmarks.small_clip DIRECTORY`` trains it in about a minute.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from pipelines.data.digits import IMAGE_SIZE, SLOTS, all_prompts, parse
from pipelines.default_models.batches import DigitBatches, degrade, prompt_indices
from pipelines.default_models.models import CAPTION_LENGTH, accuracy, build_tokenizer, test_set
from pipelines.measures.evaluator import to_network_input
from pipelines.storage.atomic import Files, packed
from pipelines.storage.model_files import quieten
from pipelines.studies import metrics
from pipelines.training import train

_WIDTH, _BATCH = 64, 64
_SHAPE = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_clip(directory: Path, seed: int, steps: int) -> dict[str, float]:
    """Train one by CLIP's loss (Radford et al., 2103.00020) on digits of the train split, and save it with its
    tokenizer and image processor. Returns its zero-shot accuracy on the test split: which of the 180 captions is
    nearest to an image, by slot and in full."""
    quieten()
    torch.manual_seed(seed)
    generator, batches, tokenizer = torch.Generator().manual_seed(seed), DigitBatches("train"), build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**_SHAPE, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": CAPTION_LENGTH}
    vision = {**_SHAPE, "image_size": IMAGE_SIZE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH)
    model = transformers.CLIPModel(config).train()
    captions = tokenizer(all_prompts(), return_tensors="pt", padding=True)

    def draw() -> tuple[Tensor, ...]:
        images, slots = batches.draw(_BATCH, generator, max_shift=1.0)
        return degrade(images, generator), prompt_indices(slots)

    def loss(model: Any, images: Tensor, shown: Tensor) -> Tensor:
        """Cross-entropy both ways; images of one caption share it."""
        kinds, own = shown.unique(return_inverse=True)
        found = model(**{name: each[kinds] for name, each in captions.items()}, pixel_values=images).logits_per_image
        same = functional.one_hot(own, len(kinds)).float()
        return (
            functional.cross_entropy(found, own) + functional.cross_entropy(found.T, (same / same.sum(dim=0)).T)
        ) / 2

    train(model, draw, loss, steps, 2e-3, warmup=0.1, clip=1.0, divisible=False, weight_decay=0.05)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    looks = transformers.CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for part in (model.eval(), tokenizer, looks):
        part.save_pretrained(directory)
    return accuracy(_zero_shot(model, captions))


@torch.inference_mode()
def _zero_shot(model: nn.Module, captions: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    images, asked = test_set()
    found = model(**captions, pixel_values=to_network_input(images)).logits_per_image.argmax(dim=1)
    pairs = [(parse(all_prompts()[best]), parse(text)) for best, text in zip(found.tolist(), asked, strict=True)]
    verdict = {slot: np.array([seen[slot] == true[slot] for seen, true in pairs]) for slot in SLOTS}
    return verdict | {"full": np.logical_and.reduce(list(verdict.values()))}


def learn_clip(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the model, in ``model/``, and its zero-shot accuracy."""
    found: dict[str, float] = {}
    files = packed(lambda directory: found.update(build_clip(directory, parameters["seed"], parameters["steps"])))
    return metrics({f"zero_shot/{slot}": share for slot, share in found.items()}) | {
        f"product/clip/{name}": content for name, content in files.items()
    }
