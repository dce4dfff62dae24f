"""Settings of the models. Importable without torch."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.rewards import REWARDS, Reward, parse_options
from policies.rl.settings import Settings


class ModelSettings(Settings):
    """The diffusion model: a pipeline of a known family (``pipelines/denoisers``), from a directory or the hub."""

    path: str = Field("models/digits/pipeline", description="directory or hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="numbers that the model computes in"
    )
    kernels: tuple[Literal["channels_last", "compiled", "graphs"], ...] = Field(
        (),
        description="how samplers and learners compute: memory layout of tensor cores, torch.compile, or that with "
        "CUDA graphs; measure first (docs/gpu.md)",
    )
    lora_rank: int = Field(0, ge=0, description="0 trains the whole network; the scale of LoRA is 1 (alpha = rank)")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="modules of the network that LoRA binds to"
    )


class CaptionerSettings(Settings):
    """The captioner: any of BLIP or BLIP-2, from a directory or the hub; null for rewards that need no caption."""

    path: str | None = Field("models/digits/captioner", description="directory or hub name; null: no captions")
    max_new_tokens: int = Field(16, ge=1, description="longest caption, in tokens")


class RewardSettings(Settings):
    """What is rewarded, and what is only measured."""

    function: str | dict[str, float] = Field(
        "sentence_cosine",
        description=f"{', '.join(REWARDS.built_in)}, or 'module:function', 'file.py:function'; or several with weights",
    )
    options: dict[str, dict[str, Any]] = Field({}, description="of each function by its name: docs/rewards.md")
    held_out: tuple[str, ...] = Field((), description="functions that evaluations measure and nothing is trained on")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each function that is trained on: their weighted sum is the reward."""
        return self.function if isinstance(self.function, dict) else {self.function: 1.0}

    @property
    def title(self) -> str:
        """For people and charts."""
        if isinstance(self.function, str):
            return self.function
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    @property
    def functions(self) -> dict[str, Reward]:
        """Every function, trained on or held out, with its options."""
        return {name: parse_options(name, self.options.get(name, {})) for name in (*self.weights, *self.held_out)}

    @property
    def needs_captions(self) -> bool:
        """Whether any function reads captions (one's own function gets them if there is a captioner)."""
        return any(options.needs_captions for options in self.functions.values())

    @model_validator(mode="after")
    def _are_functions(self) -> "RewardSettings":
        if not self.weights or not all(math.isfinite(weight) and weight for weight in self.weights.values()):
            raise ValueError("function needs a name, or several with weights that are finite and not 0")
        if both := [name for name in self.held_out if name in self.weights]:
            raise ValueError(f"held_out: {both[0]} is trained on; measure with another function")
        if unused := [name for name in self.options if name not in self.functions]:
            remedy = "leave its options out, as reward.options={} does"
            raise ValueError(f"options: {unused[0]!r} is neither in function nor in held_out: {remedy}")
        return self


class MotionSettings(Settings):
    """How large motion modules are: two self-attentions over frames and a small network, after each block's layers."""

    heads: int = Field(2, ge=1, description="of their attention; divides the channels of every level")
    longest: int = Field(24, ge=2, le=512, description="frames that a window can have")
    middle: bool = Field(False, description="one in the middle block, too")


class FittingSettings(Settings):
    """How a part of a video model is trained."""

    steps: int = Field(300, ge=1, description="optimiser updates, annealed to rate 0")
    batch_size: int = Field(4, ge=1, description="videos of an update")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the one-cycle schedule")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of conditions hidden, for guidance")
    earliest: int = Field(
        0, ge=0, le=900, description="timestep from which it learns: sampling in few steps begins late"
    )
