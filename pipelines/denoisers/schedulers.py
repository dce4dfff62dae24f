"""What a scheduler's configuration means: its denoising steps, and which have a density. Importable without torch, so
that a plan counts by the very function that samplers and learners go by.

UNets are sampled by DDIM, whatever scheduler a model comes with, if its class says the same by its fields, and those
that were distilled by what they were distilled for; flows by their SDE. What would draw other images than the stock
pipeline with ``DDIMScheduler.from_config`` is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from policies.rl.settings import Method, SamplingSettings, Settings, explain

# Classes whose β are those of x_t = √ᾱ x_0 + √(1 − ᾱ) ε, at DDIM's timesteps; and whether they clip x̂_0 by themselves.
_SAME_BETAS = {
    "DDIMScheduler": True,
    "DDIMParallelScheduler": True,
    "DDPMScheduler": True,
    "DDPMParallelScheduler": True,
    "PNDMScheduler": None,
    "LMSDiscreteScheduler": None,
    "EulerDiscreteScheduler": None,
    "EulerAncestralDiscreteScheduler": None,
    "HeunDiscreteScheduler": False,
    "KDPM2DiscreteScheduler": None,
    "KDPM2AncestralDiscreteScheduler": None,
    "DPMSolverMultistepScheduler": None,
    "DPMSolverSinglestepScheduler": None,
    "DEISMultistepScheduler": None,
    "UniPCMultistepScheduler": None,
    "LCMScheduler": False,
    "TCDScheduler": False,
}
_OTHER_DEFAULTS = ("Heun", "KDPM2", "LCM", "TCD")  # of β: a file of theirs has to say them
# How other solvers go, which changes nothing for DDIM, whatever the value; and where one value does not.
_OF_SOLVERS = {
    *("skip_prk_steps", "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
    *("final_sigmas_type", "flow_shift", "lambda_min_clipped", "time_shift_type", "predict_x0", "disable_corrector"),
    *("solver_p", "timestep_scaling"),
}
CLASSES = {"ddim": "DDIMScheduler", "consistency": "LCMScheduler", "tcd": "TCDScheduler"}  # by the method
_METHODS = {name: method for method, name in CLASSES.items()}
_OF_FLOWS = {"stochastic_sampling"}
_FLOWS = ("StableDiffusion3Pipeline", "FluxPipeline")
_NEUTRAL = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


@dataclass(frozen=True)
class DenoisingSteps:
    """The steps of a sampler, noisiest first. ``timesteps`` and ``previous``, where each step starts and ends, of a
    flow empty; negative is the final level of noise. ``stochastic``: which of them have a density."""

    timesteps: list[int]
    previous: list[int]
    stochastic: list[int]


class DdimConfig(Settings):
    """The fields of diffusers' ``DDIMScheduler`` that it can be sampled by."""

    num_train_timesteps: int = Field(1000, ge=1, le=100_000)
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, gt=0, allow_inf_nan=False)
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False
    original_inference_steps: int = Field(50, ge=1)  # from which a distilled model's few times are taken
    own: Literal["ddim", "consistency", "tcd"] = "ddim"  # the method that the model is made for

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """That of a diffusers scheduler."""
        known = {name: scheduler.config[name] for name in cls.model_fields if name in scheduler.config}
        return cls.model_validate(known | {"own": _METHODS.get(type(scheduler).__name__, "ddim")})

    def arguments(self, method: str) -> dict[str, Any]:
        """Those of the scheduler's class of a ``method``."""
        return self.model_dump(exclude={"own", *(["original_inference_steps"] if method == "ddim" else [])})

    def steps(self, sampling: SamplingSettings) -> DenoisingSteps:
        """As many as are asked for, by diffusers' arithmetic, but for its rounding that gives some counts one more.
        Raises ValueError where they leave the timesteps that the network was trained on, or the method is of flows."""
        method, count, total = sampling.method or self.own, sampling.grid, self.num_train_timesteps
        if method not in CLASSES:
            raise ValueError(f"sampling.method {method} is for flows; this model has {', '.join(CLASSES)}")
        if method != "ddim":
            return self._few(method, sampling)
        if count > total:
            raise ValueError(f"sampling.steps ({count}) is more than the model's {total} timesteps (its scheduler)")
        if self.timestep_spacing == "linspace":
            times = np.linspace(0, total - 1, count).round()[::-1].astype(np.int64)
        elif self.timestep_spacing == "leading":
            times = np.arange(count)[::-1] * (total // count) + self.steps_offset
        else:
            times = np.round(np.arange(total, 0, -total / count)).astype(np.int64)[:count] - 1
        if times.min() < 0 or times.max() >= total or (np.diff(times) >= 0).any() or len(times) != count:
            raise ValueError(
                f"sampling.steps ({count}) by the scheduler's timestep_spacing {self.timestep_spacing}, steps_offset "
                f"{self.steps_offset}, are timesteps {times.max()} to {times.min()} of {total}: choose other steps"
            )
        previous = times - total // count
        noisy = (previous >= 0) | ((times > 0) & (not self.set_alpha_to_one))
        stochastic = [step for step in np.flatnonzero(noisy).tolist() if step in sampling.noisy]
        kept = sampling.kept
        ends = [after - 1 for after in (*kept[1:], count)]  # a step is as long as those that it takes the place of
        return DenoisingSteps(times[kept].tolist(), previous[ends].tolist(), stochastic)

    def _few(self, method: Method, sampling: SamplingSettings) -> DenoisingSteps:
        """Of the times that a model was distilled at, some as far from each other as can be, noisiest first. The last
        call is deterministic, so there is a transition less than calls."""
        most, total, count = self.original_inference_steps, self.num_train_timesteps, sampling.grid
        if isinstance(sampling.steps, tuple):
            raise ValueError(f"sampling.steps {list(sampling.steps)}: of method {method} they are one number")
        if count > most or most > total:
            raise ValueError(f"sampling.steps ({count}) of method {method} are taken of {most} times: {most} at most")
        times = np.arange(most, 0, -1) * (total // most) - 1
        chosen = times[np.floor(np.linspace(0, most, count, endpoint=False)).astype(np.int64)].tolist()
        stochastic = [step for step in range(count - 1) if step in sampling.noisy]
        if method == "consistency" and len(stochastic) < count - 1:
            raise ValueError("sampling.eta: a consistency model's steps have their noise, all of them: set it to 1")
        return DenoisingSteps(chosen, [*chosen[1:], -1 if method == "consistency" else 0], stochastic)

    @model_validator(mode="after")
    def _leaves_an_image(self) -> Self:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr leaves no image in the first step, where a network that predicts epsilon gives "
                "no number: set it to false, or bring a network with prediction_type v_prediction"
            )
        return self


class FlowConfig(Settings):
    """The fields of diffusers' ``FlowMatchEulerDiscreteScheduler`` that it can be sampled by."""

    num_train_timesteps: int = Field(1000, ge=1, le=100_000)
    shift: float = Field(1.0, gt=0, allow_inf_nan=False)
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = Field(256, ge=1)
    max_image_seq_len: int = Field(4096, ge=2)
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = Field(None, ge=0, lt=1)

    def shift_of(self, tokens: int) -> float:
        """By how much a dynamic shift moves times of images of so many ``tokens`` towards noise: linear in them,
        through the ``base`` and the ``max`` point."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)

    @model_validator(mode="after")
    def _two_points(self) -> Self:
        if self.use_dynamic_shifting and self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError("max_image_seq_len has to be above base_image_seq_len")
        return self

    def steps(self, sampling: SamplingSettings) -> DenoisingSteps:
        """The last one follows the flow itself and has no density. Raises ValueError for a method of other models."""
        if sampling.method not in (None, "sde", "cps"):
            raise ValueError(f"sampling.method {sampling.method} is for UNets; this model is a flow: sde or cps")
        return DenoisingSteps([], [], [step for step in range(sampling.grid - 1) if step in sampling.noisy])


def read_scheduler(content: Mapping[str, Any], pipeline_class: str) -> DdimConfig | FlowConfig:
    """What a model is sampled by, of its scheduler's configuration and the class of its pipeline. Raises ValueError
    naming the class or field that means something else."""
    name, unsaid = content.get("_class_name"), set(content.get("_use_default_values", ()))
    fields = {k: v for k, v in content.items() if not k.startswith("_") and k not in unsaid}
    flow = pipeline_class in _FLOWS
    schema, free = (FlowConfig, _OF_FLOWS) if flow else (DdimConfig, _OF_SOLVERS)
    known = ("FlowMatchEulerDiscreteScheduler",) if flow else tuple(_SAME_BETAS)
    if name not in known:
        raise ValueError(
            f"scheduler: a {name} means something else by its fields than what a {pipeline_class} is sampled by here; "
            f"known are {', '.join(known)}. Bring the model with one of them, if it was trained for it"
        )
    for key, value in fields.items():
        if key not in schema.model_fields and key not in free and value and value not in _NEUTRAL.get(key, ()):
            raise ValueError(
                f"scheduler: {key} is not supported ({value!r}, of a {name}): leave it out, or set it to null"
            )
    if name.startswith(_OTHER_DEFAULTS) and not {"beta_start", "beta_end"} <= fields.keys():
        raise ValueError(f"scheduler: a {name} has to say its beta_start and beta_end")
    if not flow:
        fields["own"] = _METHODS.get(name, "ddim")
        fields["clip_sample"] = _SAME_BETAS[name] is not None and fields.get("clip_sample", _SAME_BETAS[name])
        if pipeline_class == "StableDiffusionPipeline":  # which corrects these two by itself
            fields["clip_sample"] = False
            if name == "DDIMScheduler" or "steps_offset" in fields:
                fields["steps_offset"] = 1
    try:
        return schema.model_validate({key: value for key, value in fields.items() if key in schema.model_fields})
    except ValidationError as error:
        raise ValueError(f"scheduler: {explain(schema, error)}") from error


# What Stable Diffusion and XL are sampled by: taken for granted of a model that is still on the hub.
ASSUMED = DdimConfig(steps_offset=1, set_alpha_to_one=False, clip_sample=False)
