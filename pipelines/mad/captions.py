"""What the next generation reads beside an image: the prompt it was asked for, or what a captioner sees in it.

Blends of both, as in "Improving Image Generation with Better Captions" (Betker et al. 2023), where a model learns from
up to 95 % of a captioner's words. Importable without torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

_BATCH, _RATE = 32, 2e-4  # of a captioner that is trained on: images of an update, and the peak of its rates


class CaptionsSettings(Settings):
    """Captions of generated images, of a family that learns from captions."""

    share: float = Field(0.0, ge=0, le=1, description="of the captioner's words; the rest keeps the prompts asked for")
    refitted: int = Field(
        0, ge=0, description="updates that train the captioner on at each generation, on what that is fed; 0: frozen"
    )


def recaptioned(drawn: Samples, share: float, captioner: Any, seed: int) -> Samples:
    """``drawn`` with the words of a loaded captioner for a random ``share`` of its captions; ``notes`` keep the prompts
    and what the captioner saw."""
    from pipelines.scoring import captioned

    assert drawn.captions is not None
    prompts, seen = drawn.captions[0], np.array(captioned(captioner, drawn.values[0]))
    replaced = np.random.default_rng(seed).permutation(len(prompts)) < round(share * len(prompts))
    read = np.where(replaced, seen, prompts)
    return replace(drawn, captions=read[None], notes={**drawn.notes, "prompt": prompts[None], "seen": seen[None]})


def refit(path: str, start: Path | None, data: Samples, updates: int, seed: int, device: str, directory: Path) -> None:
    """Train the captioner of ``path``, or what is in ``start``, on the images and captions of ``data``; write its
    weights into ``directory``."""
    import torch
    from safetensors.torch import save_file

    from pipelines.training import train

    captioner = load_captioner(path, start, device)
    assert data.captions is not None
    images, words = data.values[0], data.captions[0].tolist()
    tokens = captioner.tokenizer(words, return_tensors="pt", padding=True, truncation=True, max_length=64).input_ids
    random = torch.Generator().manual_seed(seed)
    model = captioner.model.train().requires_grad_(True)

    def draw() -> "tuple[Tensor, ...]":
        chosen = torch.randint(len(images), (_BATCH,), generator=random)
        return captioner.pixels(images[chosen.numpy()]), tokens[chosen].to(device)

    def loss(model: Any, pixels: "Tensor", ids: "Tensor") -> "Tensor":
        found: Tensor = model(pixel_values=pixels, input_ids=ids, labels=ids).loss
        return found

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "dropout"))
        train(model, draw, loss, updates, _RATE, clip=1.0, divisible=False, fused=True)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.named_parameters()}
    save_file(weights, directory / "captioner.safetensors")


def load_captioner(path: str, weights: Path | None, device: str) -> Any:
    """The captioner of ``path``, with the weights that :func:`refit` wrote into a directory if there are any."""
    from safetensors.torch import load_file

    from pipelines.captioner import Captioner
    from pipelines.settings import CaptionerSettings

    captioner = Captioner(CaptionerSettings(path=path), device)
    if weights is not None:
        captioner.model.load_state_dict(load_file(weights / "captioner.safetensors"), strict=False)
    captioner.model.eval()
    return captioner
