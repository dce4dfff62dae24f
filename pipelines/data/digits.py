"""The digit world: real handwritten digits, tinted in an ink on a ground, and the captions that name them.

What this module promises:

* every image shows one of scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits",
  CC BY 4.0), upsampled from 8 x 8 to 16 x 16 pixels; only colour and size are made up;
* a caption and its three slots (digit, ink, ground) determine each other: ``parse(caption(*slots)) == slots``;
* the three splits share no handwritten digit, are stratified by digit, and are the same on every machine: ``train``
  (1,000 images: autoencoder, diffusion model, captioner), ``evaluator`` (500: the independent judge) and ``test``
  (297: nothing is ever trained on them).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

SLOTS = ("digit", "ink", "ground")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (225, 30, 35),
    "green": (20, 165, 60),
    "blue": (35, 70, 235),
    "yellow": (245, 215, 25),
    "purple": (145, 40, 190),
    "orange": (250, 125, 10),
}
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (120, 120, 120)}
CHOICES: dict[str, tuple[str, ...]] = {"digit": DIGITS, "ink": tuple(INKS), "ground": tuple(GROUNDS)}

IMAGE_SIZE = 16
SPLIT_SIZES = {"train": 1000, "evaluator": 500, "test": 297}
_SPLIT_SEED = 1797

Split = Literal["train", "evaluator", "test"]


class Digits(NamedTuple):
    """Untinted digits: ``strokes`` (n, size, size) float32, 0 for ground, 1 for ink; ``labels`` (n,) int64 in 0..9."""

    strokes: np.ndarray
    labels: np.ndarray


def caption(digit: str, ink: str, ground: str) -> str:
    """The caption of three words, such as "an orange two on a gray background"."""
    article = "an" if ink[0] in "aeiou" else "a"
    return f"{article} {ink} {digit} on a {ground} background"


def parse(text: str) -> dict[str, str | None]:
    """The first word of ``text`` that fits each slot, in any case; None where no word does."""
    words = re.findall(r"[a-z]+", text.lower())
    return {slot: next((word for word in words if word in CHOICES[slot]), None) for slot in SLOTS}


def all_prompts() -> list[str]:
    """All 180 captions, ordered by digit, then ink, then ground."""
    return [caption(digit, ink, ground) for digit in DIGITS for ink in INKS for ground in GROUNDS]


def tint(strokes: np.ndarray, inks: Sequence[str], grounds: Sequence[str]) -> np.ndarray:
    """Colours each digit: ``strokes`` (n, height, width) in [0, 1] and n words each -> uint8 (n, height, width, 3)."""
    ink = np.array([INKS[word] for word in inks], dtype=np.float32)[:, None, None, :]
    ground = np.array([GROUNDS[word] for word in grounds], dtype=np.float32)[:, None, None, :]
    coverage = np.asarray(strokes, dtype=np.float32)[..., None]
    return np.rint(ground + (ink - ground) * coverage).astype(np.uint8)


def render(digits: Digits, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Tints every digit in an ink and a ground drawn uniformly: uint8 images (n, size, size, 3), and their captions."""
    inks = rng.choice(CHOICES["ink"], size=len(digits.labels)).tolist()
    grounds = rng.choice(CHOICES["ground"], size=len(digits.labels)).tolist()
    words = [DIGITS[label] for label in digits.labels]
    captions = [caption(*slots) for slots in zip(words, inks, grounds, strict=True)]
    return tint(digits.strokes, inks, grounds), captions


def captioned(tints: int = 4, size: int = IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every digit of the train split in so many random tints, the same at every call: images (n, size, size, 3) uint8,
    labels (n,) and captions, which are those of any other size."""
    digits, rng = load_split("train", size), np.random.default_rng(0)
    rounds = [render(digits, rng) for _ in range(tints)]
    images, captions = np.concatenate([each for each, _ in rounds]), [text for _, texts in rounds for text in texts]
    return images, np.tile(digits.labels, tints), captions


def real_images(prompts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """A real digit of the test split for each prompt, which names all slots: uint8 (n, 16, 16, 3)."""
    digits, asked = load_split("test"), [parse(prompt) for prompt in prompts]
    words, inks, grounds = ([str(slots[name]) for slots in asked] for name in SLOTS)
    chosen = [rng.choice(np.flatnonzero(digits.labels == DIGITS.index(word))) for word in words]
    return tint(digits.strokes[chosen], inks, grounds)


def load_split(split: Split, size: int = IMAGE_SIZE) -> Digits:
    """The digits of one split, in a fixed order, ``size`` pixels wide."""
    strokes, labels = _all_digits(size)
    chosen = split_indices()[split]
    return Digits(strokes[chosen], labels[chosen])


@lru_cache(maxsize=1)
def split_indices() -> dict[str, np.ndarray]:
    """For each split, the positions of its images in scikit-learn's order, shuffled once and for all."""
    from sklearn.model_selection import train_test_split

    labels = _all_digits(IMAGE_SIZE).labels
    train, rest = train_test_split(
        np.arange(len(labels)), train_size=SPLIT_SIZES["train"], stratify=labels, random_state=_SPLIT_SEED
    )
    evaluator, test = train_test_split(
        rest, train_size=SPLIT_SIZES["evaluator"], stratify=labels[rest], random_state=_SPLIT_SEED
    )
    return {"train": train, "evaluator": evaluator, "test": test}


@lru_cache(maxsize=2)
def _all_digits(size: int) -> Digits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Digits(enlarged(digits.images / 16.0, size), digits.target.astype(np.int64))


def enlarged(coarse: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Strokes (n, size, size) float32 of digits (n, height, width) in [0, 1]."""
    from scipy.ndimage import zoom

    factor = size / coarse.shape[-1]
    smooth = zoom(coarse, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True)
    # Cubic upsampling blurs strokes; a steeper ramp brings back solid ink without jagged edges.
    return np.clip((smooth - 0.2) / 0.6, 0.0, 1.0).astype(np.float32)
