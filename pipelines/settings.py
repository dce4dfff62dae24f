"""Settings of the models. Importable without torch."""

from typing import Literal

from pydantic import Field

from policies.settings import Settings

BUILT_IN_REWARDS = (
    "sentence_cosine",
    "bertscore_precision",
    "bertscore_recall",
    "bertscore_f1",
    "jpeg_compressibility",
    "jpeg_incompressibility",
)


class ModelSettings(Settings):
    """The diffusion model: a pipeline of a known family (``pipelines/denoisers``), from a directory or the hub."""

    path: str = Field("models/digits/pipeline", description="directory or hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora_rank: int = Field(0, ge=0, description="0 trains the whole network; the scale of LoRA is 1 (alpha = rank)")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="modules of the network that LoRA binds to"
    )


class CaptionerSettings(Settings):
    """The captioner: any BLIP captioning model, from a directory or the hub; null for rewards that need no caption."""

    path: str | None = "models/digits/captioner"
    max_new_tokens: int = Field(16, ge=1)


class RewardSettings(Settings):
    """What is rewarded."""

    function: str = Field(
        "sentence_cosine", description=f"one of {', '.join(BUILT_IN_REWARDS)}, or an import path 'module:function'"
    )
    encoder: str | None = Field(None, description="sentence encoder: directory or hub name; null is all-MiniLM-L6-v2")

    @property
    def needs_captions(self) -> bool:
        """Whether the function reads captions (one's own function gets them if there is a captioner)."""
        return self.function.startswith(("sentence_", "bertscore_"))
