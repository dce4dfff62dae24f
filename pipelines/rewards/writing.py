"""Words written into an image, which please a captioner, or a judge, without the image showing anything.

That is a typographic attack (Goh et al. 2021, Multimodal Neurons; Black et al., 2305.13301, met it with prompts that
name a number of animals). The reader is the optional package rapidocr-onnxruntime, whose wheel holds its models.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydantic import model_validator

from pipelines.rewards import Reward, RewardFunction

_WORD = re.compile(r"[^\W\d_]{3,}")


class WritingOptions(Reward):
    """A veto: −1 for an image that has a word of its prompt written in it, else 0."""

    names = ("no_writing",)

    @model_validator(mode="after")
    def _can_read(self) -> "WritingOptions":
        if find_spec("rapidocr_onnxruntime") is None:
            raise ValueError("text in images is read by rapidocr-onnxruntime: pip install 'ouroboros-rl[ocr]'")
        return self

    def load(self, name: str, device: str) -> RewardFunction:
        """A reader of this process."""
        return lambda images, prompts, captions: -vetoed(images, prompts).astype(np.float64)


@cache
def load_reader() -> Any:
    """The reader of this process."""
    from rapidocr_onnxruntime import RapidOCR

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    return RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)


def vetoed(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Which images (batch, height, width, 3) uint8 have a word of their prompt written in them: (batch,) bool.

    A word is three letters or more, whatever their case, and may stand within a longer one of the image, as the reader
    does not see every space.
    """
    texts = (read(image) for image in images)
    pairs = zip(texts, prompts, strict=True)
    return np.array([any(word in text for word in _WORD.findall(prompt.lower())) for text, prompt in pairs], dtype=bool)


def read(image: np.ndarray) -> str:
    """All that is legible in an image (height, width, 3) uint8: lower case, without spaces, a line for each place."""
    found, _ = load_reader()(np.ascontiguousarray(image[..., ::-1]))  # it takes blue first
    return "\n".join("".join(text.split()) for _, text, _ in found or ()).lower()
