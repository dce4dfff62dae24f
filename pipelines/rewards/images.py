"""Rewards by models that look at the image itself: BLIP's answers, CLIP's embeddings. All in float32."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Len
from pydantic import Field, TypeAdapter

from pipelines.rewards import Reward, RewardFunction
from pipelines.rewards.text import Template
from pipelines.storage.locations import find, resolve_model
from pipelines.storage.model_files import ModelFilesError, load_tokenizer, load_whole, reading
from pipelines.storage.yaml_text import read_yaml
from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class _Question(Settings):
    question: str
    answer: str


class VqaOptions(Reward):
    """Probability of an answer about the image, by a BlipForQuestionAnswering."""

    names = ("blip_vqa",)
    in_half = True
    models: ClassVar = {"model": "config.json", "questions": ""}
    model: str = Field(description="directory or hub name")
    question: Template = Field("does the image show {prompt}?", description="asked of every image")
    answer: str = Field("yes", min_length=1, description="the answer whose probability is the score")
    questions: str | None = Field(
        None, description="YAML file of each prompt's own questions: prompt → list of {question, answer}"
    )

    def asked(self, prompt: str) -> list[tuple[str, str]]:
        """Questions about an image of ``prompt``, and their answers. Raises ValueError if there is none."""
        if self.questions is None:
            return [(self.question.format(prompt=prompt), self.answer)]
        if prompt not in self._own:
            raise ValueError(f"{self.questions} holds no question for the prompt {prompt!r}")
        return [(pair.question, pair.answer) for pair in self._own[prompt]]

    def check(self, prompts: Sequence[str]) -> None:
        """The file holds a question for each prompt."""
        for prompt in prompts:
            self.asked(prompt)

    @cached_property
    def _own(self) -> dict[str, list[_Question]]:
        path = self.questions or ""
        try:
            held = read_yaml(find(path) or Path(path), words=True)  # an answer is never a truth value or a number
            return TypeAdapter(dict[str, Annotated[list[_Question], Len(1)]]).validate_python(held)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path} is not a mapping of prompts to lists of {{question, answer}}: {why}") from error

    def load(self, name: str, device: str) -> RewardFunction:
        """BLIP."""
        return Vqa(self, device)


class Vqa:
    """The probability that a BLIP model for question answering answers as it should, in [0, 1].

    That of exactly the answer: the product over its tokens and the end token, each given those before it, which is what
    sampling from ``generate`` would say it with. The mean over the questions of a prompt, if it has several.
    """

    def __init__(self, options: VqaOptions, device: str = "cpu") -> None:
        import torch
        import transformers

        path = resolve_model(options.model)
        self.model = load_whole(transformers.BlipForQuestionAnswering, path, device, dtype=torch.float32)
        self.processor: Any = transformers.BlipImageProcessorPil.from_pretrained(path)
        self.tokenizer: Any = load_tokenizer(path)
        self.options = options

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
            return self._score(pixels, prompts).double().cpu().numpy()

    def differentiable(self, images: "Tensor", prompts: Sequence[str]) -> "Tensor":
        """The logarithm of the score (batch,) of images (batch, 3, height, width) in [0, 1]."""
        from pipelines.processing import preprocessed

        return self._score(preprocessed(self.processor, images), prompts).clamp(min=1e-30).log()

    def _score(self, pixels: "Tensor", prompts: Sequence[str]) -> "Tensor":
        import torch

        seen, rows = self.model.vision_model(pixel_values=pixels).last_hidden_state, defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows[prompt].append(row)
        scores = seen.new_zeros(len(prompts))
        for prompt, same in rows.items():  # questions of one prompt need no padding
            answers = [self._probabilities(seen[same], *pair) for pair in self.options.asked(prompt)]
            scores = scores.index_put((torch.tensor(same, device=seen.device),), torch.stack(answers).mean(dim=0))
        return scores

    def _probabilities(self, seen: "Tensor", question: str, answer: str) -> "Tensor":
        """Of ``answer`` (batch,), given the image embeddings (batch, patches, width) and ``question``."""
        import torch

        config = self.model.config.text_config
        words = self.tokenizer(question, truncation=True, return_tensors="pt")["input_ids"]
        said = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[config.bos_token_id, *said, config.sep_token_id]])
        words, labels = (ids.to(seen.device).expand(len(seen), -1) for ids in (words, labels))
        read = self.model.text_encoder(
            input_ids=words,
            attention_mask=torch.ones_like(words),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        logits = self.model.text_decoder(
            input_ids=labels[:, :-1], encoder_hidden_states=read, encoder_attention_mask=torch.ones_like(words)
        ).logits
        return logits.log_softmax(dim=-1).gather(2, labels[:, 1:, None]).sum(dim=(1, 2)).exp()


class ClipScoreOptions(Reward):
    """Cosine of a CLIPModel's embeddings of image and prompt."""

    names = ("clip_score",)
    in_half = True
    models: ClassVar = {"model": "config.json"}
    model: str = Field(description="directory or hub name")
    template: Template = Field("{prompt}", description="what the image is compared with")

    def load(self, name: str, device: str) -> RewardFunction:
        """CLIP, image and text."""
        return ClipScore(self, device)


class AestheticOptions(Reward):
    """LAION's aesthetic predictor on a CLIPModel's embedding of the image."""

    names = ("aesthetic",)
    in_half = True
    models: ClassVar = {"model": "config.json", "head": ""}
    model: str = Field(description="directory or hub name")
    head: str = Field(description="safetensors file of the head's linear layers")

    def load(self, name: str, device: str) -> RewardFunction:
        """CLIP's image side, and the head."""
        return Aesthetic(self, device)


class _Clip:
    """A ``CLIPModel`` with its image processor."""

    def __init__(self, options: ClipScoreOptions | AestheticOptions, device: str = "cpu") -> None:
        import torch
        import transformers

        self.path = resolve_model(options.model)
        self.model = load_whole(transformers.CLIPModel, self.path, device, dtype=torch.float32)
        self.processor: Any = transformers.CLIPImageProcessorPil.from_pretrained(self.path)

    def embed(self, images: "np.ndarray | Tensor") -> "Tensor":
        """Unit embeddings (batch, width) of images: uint8 (batch, height, width, 3), or (batch, 3, height, width) in
        [0, 1], of which gradients are known."""
        from torch.nn import functional

        from pipelines.processing import preprocessed

        if isinstance(images, np.ndarray):
            pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        else:
            pixels = preprocessed(self.processor, images)
        return functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


class ClipScore(_Clip):
    """Cosine of CLIP's embeddings of image and prompt, in [−1, 1]: neither scaled by 2.5 or 100, nor cut off at 0."""

    def __init__(self, options: ClipScoreOptions, device: str = "cpu") -> None:
        super().__init__(options, device)
        self.template, self.tokenizer = options.template, load_tokenizer(self.path)
        self._text = lru_cache(4096)(self._embed_text)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.differentiable(images, prompts).cpu().numpy()

    def differentiable(self, images: "np.ndarray | Tensor", prompts: Sequence[str]) -> "Tensor":
        """The score itself (batch,) of images as :meth:`embed` takes them."""
        import torch

        texts = torch.stack([self._text(self.template.format(prompt=prompt)) for prompt in prompts])
        return (self.embed(images) * texts).sum(dim=-1)

    def _embed_text(self, text: str) -> "Tensor":
        """The unit embedding (width,) of a text; what is longer than CLIP reads is cut off."""
        import torch
        from torch.nn import functional

        tokens = self.tokenizer(text, truncation=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode(False), torch.no_grad():  # it is kept, and gradients pass by it later
            return functional.normalize(self.model.get_text_features(**tokens).pooler_output[0], dim=-1)


class Aesthetic(_Clip):
    """LAION's aesthetic predictor: CLIP's unit embedding of the image through linear layers, to about 1 to 10.

    The published head has no activations between its layers (its dropout is for training), so none are applied.
    """

    def __init__(self, options: AestheticOptions, device: str = "cpu") -> None:
        super().__init__(options, device)
        from safetensors.torch import load_file

        with reading(options.head):
            held = load_file(resolve_model(options.head), device="cpu" if device == "meta" else device)
        numbered = (re.fullmatch(r"(.*?(\d+))\.weight", key) for key in held)
        names = [name for _, name in sorted((int(match[2]), match[1]) for match in numbered if match)]
        self.layers = [(held[f"{name}.weight"].float(), held[f"{name}.bias"].float()) for name in names]
        width, shapes = self.model.config.projection_dim, [tuple(weight.shape) for weight, _ in self.layers]
        if [1, *(into for _, into in reversed(shapes))] != [*(out for out, _ in reversed(shapes)), width]:
            raise ModelFilesError(
                f"{options.head}: layers {shapes} do not lead from the {width} numbers of CLIP to one"
            )

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.differentiable(images, prompts).cpu().numpy()

    def differentiable(self, images: "np.ndarray | Tensor", prompts: Sequence[str]) -> "Tensor":
        """The score itself (batch,) of images as :meth:`embed` takes them."""
        from torch.nn import functional

        values = self.embed(images)
        for weight, bias in self.layers:
            values = functional.linear(values, weight, bias)
        return values[:, 0]
