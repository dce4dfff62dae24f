"""Settings of the DDPO algorithm. Importable without torch."""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from policies.rl.objectives import ALGORITHMS, Algorithm


class Settings(BaseModel):
    """A settings block: frozen, every key known, every number finite. Its validator is made when it is first used, as
    most commands need few of them."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raises TypeError for a field of lists, which settings read as tuples: frozen ones hold no others."""
        super().__init_subclass__(**arguments)
        for name, kind in inspect.get_annotations(cls).items():
            if re.search(r"\blist\b", kind if isinstance(kind, str) else str(kind), re.IGNORECASE):
                raise TypeError(f"{cls.__name__}.{name} is annotated {kind}: settings hold tuples, tuple[T, ...]")

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, content: Any) -> Any:
        """As files and parameters of tasks have no tuples."""
        return {key: tupled(value) for key, value in content.items()} if isinstance(content, Mapping) else content


def tupled(content: Any) -> Any:
    """Plain ``content`` with tuples for lists, however deep."""
    if isinstance(content, list | tuple):
        return tuple(map(tupled, content))
    return {key: tupled(value) for key, value in content.items()} if isinstance(content, dict) else content


def check_name(name: str, most: int = 150) -> str:
    """A name as it is. Raises ValueError if no directory, no job and no part of an address could have it."""
    if not re.fullmatch(r"[\w.-]+", name) or len(name.encode()) > most or not name.strip("."):
        raise ValueError(f"a name has letters, digits, '.', '-' and '_', {most} bytes at most, and more than dots")
    return name


Name = Annotated[
    str, AfterValidator(lambda name: check_name(name)), Field(description="what it is called, in files too")
]


OF_THE_PROGRAM: dict[str, Any] = {"set by": "the program"}  # as ``json_schema_extra`` of a key that no person sets

# What pydantic calls the ways in which a value of several types can be given.
_BRANCH = re.compile(r"constrained-\w+|(function-\w+|tuple|list|dict|literal)\[.*\]|float|int|str|bool")


_NOW = {
    "advantage.history_size": "advantage.baseline={history: …}",
    "training.objective_beta": "training.objective={…: β}",
}


def explain(schema: type[BaseModel], error: ValidationError, shows_input: bool = True) -> str:
    """The first problem as one line, with the nearest known key if one was not known."""
    errors = error.errors()
    where = _plain(errors[0]["loc"])
    # Of a value that may be of several types each type has its errors: the one that it came nearest to is meant.
    same = [each for each in errors if _plain(each["loc"])[: len(where)] == where]
    first = max(same, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    location = ".".join(_plain(first["loc"]))
    if first["type"] == "extra_forbidden":
        known = list(known_keys(schema))
        near = nearest(location, known)
        if location in _NOW:
            return f"unknown key {location!r}: it is {_NOW[location]} now"
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known) or 'none'}"
        return f"unknown key {location!r}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if below := [key for key in known_keys(schema) if first["type"] == "model_type" and key.startswith(f"{location}.")]:
        message = f"a block of keys, such as {below[0]}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        near = difflib.get_close_matches(first["input"], re.findall("'([^']*)'", first["msg"]), n=1)
        message += f" (did you mean {near[0]!r}?)" if near else ""
    given = repr(first["input"])
    shown = (
        f", not {given if len(given) < 120 else given[:120] + '…'}"
        if shows_input and not isinstance(first["input"], dict)
        else ""
    )
    return f"{location}: {message}{shown}" if location else message


def _plain(location: Sequence[int | str]) -> list[str]:
    """Where a value stands, without the types that it was tried as."""
    return [str(part) for part in location if not _BRANCH.fullmatch(str(part)) and part != "[key]"]


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The known dotted key that a mistyped one is nearest to, by the whole of it or by its last part; none if it is to
    none."""
    leaf = {each.rsplit(".", 1)[-1]: each for each in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return near or [leaf[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, n=1)]


def known_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a schema that people set, with its field."""
    keys: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys |= known_keys(annotation, f"{prefix}{name}.")
        elif field.json_schema_extra != OF_THE_PROGRAM:
            keys[prefix + name] = field
    return keys


Method = Literal["ddim", "consistency", "tcd", "sde", "cps"]
Noise = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Moving = dict[Literal["sliding", "random"], tuple[Noise, Share, Annotated[int, Field(ge=1)]]]


def part_of(window: Sequence[float], steps: int) -> range:
    """Of so many denoising steps those in a part of them, 0 being noise and 1 the image."""
    first, last = (round(end * steps) for end in window)
    return range(first, last)


class SamplingSettings(Settings):
    """The denoising process, the same in sampling and in training (guidance included)."""

    method: Method | None = Field(
        None, description="the sampler; null: the model's own, by its scheduler: DDIM, LCM's, TCD's, a flow's SDE"
    )
    steps: Steps | tuple[Steps, Steps] = Field(
        10,
        description="denoising steps T, a call of the network each; [10, 3]: those of ten that come after the noise of "
        "eta are made in three, by DPM-Solver++",
    )
    eta: Noise | tuple[Noise, Share, Share] | Moving = Field(
        1.0,
        description="its noise: DDIM's η, TCD's γ, a flow's a or CPS's η; consistency models have none. [0.7, 0, 0.5]: "
        "only in this part of the denoising, 0 being noise and 1 the image, as MixGRPO has it. {sliding: [0.7, 0.3, "
        "5]}: in so large a part, which begins at the noise and is moved on by one step after every fifth of training, "
        "or {random: …} to anywhere",
    )
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance; 1 is none (half the work)")
    cache: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="[interval, branch] of DeepCache: only every so many steps compute a UNet whole (SD 1, 2, XL)"
    )

    @property
    def grid(self) -> int:
        """T, of which some may be taken together."""
        return self.steps[0] if isinstance(self.steps, tuple) else self.steps

    @property
    def noise(self) -> float:
        """How much of it there is, where there is any."""
        given = next(iter(self.eta.values())) if isinstance(self.eta, dict) else self.eta
        return given[0] if isinstance(given, tuple) else given

    @property
    def noisy(self) -> range:
        """The steps that may have noise; where these move, the first of them."""
        given = self.at(0).eta
        return part_of(given[1:] if isinstance(given, tuple) else (0.0, 1.0), self.grid)

    @property
    def kept(self) -> list[int]:
        """Of T steps those that are made, each as long as it is to the next of them."""
        if not isinstance(self.steps, tuple):
            return list(range(self.steps))
        last, (grid, most) = self.noisy.stop, self.steps
        few = min(most, grid - last)
        return [*range(last), *(last + number * (grid - last) // few for number in range(few))]

    @property
    def calls(self) -> int:
        """Of the network, for an image: the most, where the noise moves."""
        return max(len(each.kept) for each in self.everywhere)

    @property
    def everywhere(self) -> list["SamplingSettings"]:
        """With noise in each of the parts that it can be in."""
        if not isinstance(self.eta, dict):
            return [self]
        ((noise, share, _),) = self.eta.values()
        size = max(1, round(share * self.grid))
        parts = [(first / self.grid, (first + size) / self.grid) for first in range(self.grid - size + 1)]
        return [self.model_copy(update={"eta": (noise, *part)}) for part in parts]

    def at(self, version: int) -> "SamplingSettings":
        """As the weights of this version draw to be learned from: those before the first step of training are 0. Where
        random noise is follows from the version alone, and is the same in all runs."""
        if not isinstance(self.eta, dict):
            return self
        from policies.common.seeding import derive_seed

        ((movement, (_, _, every)),) = self.eta.items()
        turn, places = version // every, self.everywhere
        return places[(turn if movement == "sliding" else derive_seed(0, "noisy part", turn)) % len(places)]

    @model_validator(mode="after")
    def _has_noise(self) -> "SamplingSettings":
        if isinstance(self.eta, dict) and len(self.eta) != 1:
            raise ValueError("eta: name one way in which its part moves, sliding or random")
        if isinstance(self.eta, tuple) and not self.noisy:
            raise ValueError(f"eta {list(self.eta)}: of {self.grid} steps none is in this part")
        if isinstance(self.steps, tuple) and not isinstance(self.eta, tuple | dict):
            raise ValueError(
                f"steps {list(self.steps)} are for noise in a part of them: give eta one, as in [{self.eta:g}, 0, 0.3]"
            )
        return self


ObjectiveName = Annotated[str, AfterValidator(ALGORITHMS.check)]


class AdvantageSettings(Settings):
    """How rewards become advantages."""

    baseline: Literal["group", "history", "batch"] | dict[Literal["history"], Annotated[int, Field(ge=2)]] = Field(
        "group",
        description="normalise by the prompt's images of this step, by its history over steps, or by all images; "
        "{history: 16}: of so many rewards (32), below half of which the step's statistics are used",
    )
    clip: float = Field(10.0, gt=0, description="advantages are clipped to ± this")

    @property
    def compares(self) -> str:
        """The name of the baseline."""
        return next(iter(self.baseline)) if isinstance(self.baseline, dict) else self.baseline

    @property
    def history_size(self) -> int:
        """Rewards that are remembered of each prompt."""
        return self.baseline["history"] if isinstance(self.baseline, dict) else 32

    @model_validator(mode="after")
    def _is_one(self) -> "AdvantageSettings":
        if self.baseline == {}:
            raise ValueError("baseline: name one")
        return self


class TrainingSettings(Settings):
    """The DDPO update: Black et al. 2023, equations 5 (score function) and 6 (importance sampling)."""

    steps: int = Field(80, ge=1, description="sample → reward → learn rounds")
    depth: int = Field(
        0, ge=0, le=1, description="steps drawn ahead: 1 draws the next one while this one is learned from (overlap)"
    )
    images_per_step: int = Field(256, ge=1, description="images drawn, scored and learned from in a step")
    images_per_prompt: int = Field(8, ge=1, description="images of each prompt of a step: a group")
    updates_per_step: int = Field(4, ge=1, description="optimiser updates a pass over the images, each on its share")
    inner_epochs: int = Field(1, ge=1, description="passes over a step's images")
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="random share of each image's timesteps to learn from"
    )
    timestep_window: tuple[float, float] = Field(
        (0.0, 1.0), description="part of the denoising to learn from: 0 is noise, 1 the image"
    )
    objective: ObjectiveName | dict[ObjectiveName, Annotated[float, Field(gt=0)]] = Field(
        "importance_sampling",
        description="what is minimised: DDPO_IS; or score_function, reward_weighted, negative_aware; "
        "{reward_weighted: 3}: with a β other than 1, there the sharpness of the weights, of negative_aware the length "
        "of its step",
    )
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL to the first model, for DDPO_IS and DDPO_SF")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="of an average over steps: what is evaluated and saved; 0: the weights themselves"
    )
    clip_range: float = Field(1e-4, gt=0, description="PPO's ε; its meaning depends on log_density")
    log_density: Literal["mean", "sum"] = Field(
        "mean", description="reduction of the log-density over channels and pixels; published clip ranges mean 'mean'"
    )
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's")
    max_gradient_norm: float = Field(1.0, gt=0, description="a longer gradient is scaled to this L2 norm")
    ratio_tolerance: Annotated[float, Field(gt=0)] | Literal["auto", "recompute"] = Field(
        "auto",
        description="largest |Δ log p| allowed on a step's first update, beyond which the run stops; auto: ten times "
        "what rounding does, found at the start; recompute: the learner computes old log-probabilities itself",
    )
    micro_batch: int | None = Field(
        None, ge=1, description="transitions in one network call; null: found by the program"
    )
    on_sick_numbers: Literal["stop", "skip"] = Field(
        "stop", description="rewards, captions or gradients to learn nothing from: end the run, or leave out the update"
    )

    @property
    def prompts_per_step(self) -> int:
        return self.images_per_step // self.images_per_prompt

    @property
    def updates(self) -> int:
        """Optimiser updates a step."""
        return self.updates_per_step * self.inner_epochs

    @property
    def images_per_update(self) -> int:
        return self.images_per_step // self.updates_per_step

    @property
    def algorithm(self) -> type[Algorithm]:
        """The objective's class."""
        return ALGORITHMS.find(self.objective_name)

    @property
    def objective_name(self) -> str:
        """That it is known by."""
        return next(iter(self.objective)) if isinstance(self.objective, dict) else self.objective

    @property
    def objective_beta(self) -> float:
        """β of those that have one."""
        return next(iter(self.objective.values())) if isinstance(self.objective, dict) else 1.0

    def learnable_steps(self, steps: int, stochastic: Sequence[int]) -> list[int]:
        """Which of ``steps`` denoising steps may be learned from: those in the window, and with a density if needed."""
        candidates = range(steps) if self.algorithm.on_forward_process else stochastic
        return [step for step in candidates if step in part_of(self.timestep_window, steps)]

    def timesteps_per_image(self, learnable: int) -> int:
        """How many of an image's ``learnable`` steps an update learns from."""
        return max(1, round(self.timestep_fraction * learnable))

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainingSettings":
        if isinstance(self.objective, dict) and len(self.objective) != 1:
            raise ValueError("objective: name one")
        images = self.images_per_step
        for name, parts in (("images_per_prompt", self.images_per_prompt), ("updates_per_step", self.updates_per_step)):
            if images % parts:
                raise ValueError(f"images_per_step ({images}) must be a multiple of {name} ({parts})")
        if not 0 <= self.timestep_window[0] < self.timestep_window[1] <= 1:
            raise ValueError(f"timestep_window {self.timestep_window} is not a part of 0 to 1, such as [0, 0.5]")
        if self.kl_weight and self.algorithm.on_forward_process:
            raise ValueError(f"kl_weight: objective {self.objective_name} has no density to take it of; set it to 0")
        if self.algorithm.on_policy and (self.updates > 1 or self.depth):
            raise ValueError(
                f"objective {self.objective_name} is on-policy: set updates_per_step and inner_epochs to 1, depth to "
                "0, or use objective importance_sampling"
            )
        return self
