"""What each built-in reward can be told, by name. Importable without torch."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError

from policies.settings import Settings


class RewardOptions(Settings):
    """Options of a reward, ``reward.options.<name>.<option>``, and what the reward asks of a run."""

    needs_captions: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = False  # takes a share of a GPU where there is one
    models: ClassVar[dict[str, str]] = {}  # option that names a model → a file that the model's directory holds

    @property
    def model_paths(self) -> dict[str, str]:
        """The models that are named, by option."""
        return {option: path for option in self.models if (path := getattr(self, option))}


class CosineOptions(RewardOptions):
    """Cosine of the sentence embeddings of prompt and caption."""

    needs_captions = True
    models: ClassVar = {"model": "modules.json"}
    model: str | None = Field(None, description="sentence encoder: directory or hub name; null is all-MiniLM-L6-v2")
    template: str = Field("{prompt}", description="what the caption is compared with")


class JpegOptions(RewardOptions):
    """Size as JPEG."""


class OwnOptions(RewardOptions):
    """Whatever one's own function takes as keywords."""

    model_config = ConfigDict(extra="allow", strict=False)


OPTIONS: dict[str, type[RewardOptions]] = {
    "sentence_cosine": CosineOptions,
    "bertscore_precision": CosineOptions,
    "bertscore_recall": CosineOptions,
    "bertscore_f1": CosineOptions,
    "jpeg_compressibility": JpegOptions,
    "jpeg_incompressibility": JpegOptions,
}


def parse_options(name: str, given: Mapping[str, Any]) -> RewardOptions:
    """The typed options of the reward ``name``, a built-in or an import path. Raises ValueError naming the option."""
    kind = OPTIONS.get(name, OwnOptions)
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        option, where = ".".join(map(str, first["loc"])), f"options of {name}"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(option, kind.model_fields, n=1)
            known = ", ".join(kind.model_fields) or "none"
            hint = f"did you mean {near[0]!r}?" if near else f"it has {known}"
            raise ValueError(f"{where}: there is no {option!r}; {hint}") from error
        raise ValueError(f"{where}: {option}: {first['msg'].removeprefix('Value error, ')}") from error
