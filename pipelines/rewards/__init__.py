"""Rewards: how well an image, or what the captioner says of it, fits its prompt. One class a reward, options included.

A reward is a function ``(images, prompts, captions) → scores`` with images (batch, height, width, 3) uint8, one
prompt and one caption (or None, if there is no captioner) an image, and one finite float an image, higher being
better. One's own is named by its import path, ``reward.function=my_module:my_function``: a function, a class whose
instances are called, or a class derived from :class:`Reward`. Importable without torch, which is imported where it is
needed.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, ValidationError

from pipelines.storage.locations import portable
from pipelines.videos import apart, frames_of, of_each_frame
from policies.common import user_code
from policies.common.user_code import IN_PROCESS, Named, Registry, described, file_of, noted, traced
from policies.rl.health import DegenerateBatch, RewardError, check_finite
from policies.rl.settings import Settings, explain

if TYPE_CHECKING:
    from torch import Tensor

RewardFunction = Callable[[np.ndarray, Sequence[str], Sequence[str] | None], Sequence[float] | np.ndarray]
Differentiable = Callable[["Tensor", Sequence[str]], "Tensor"]
_SETTING, _ASKED = "reward.function", ("images", "prompts", "captions")


class UnreachableError(RewardError):
    """A reward's server is away, ended in the middle of its answer, has too much to do, or failed."""


class TooSlowError(RewardError):
    """A reward's server took longer than it was given."""


class NonsenseError(RewardError):
    """A reward's server answered what cannot be scores, or refused the question."""


class Reward(Named, Settings):
    """A reward: its options, ``reward.options.<name>.<option>``, what it asks of a run, and the function itself."""

    names: ClassVar[tuple[str, ...]] = ()
    needs_captions: ClassVar[bool] = False
    of_videos: ClassVar[bool] = False  # whether it is given whole videos; others are asked about each of their frames
    in_half: ClassVar[bool] = False  # whether its models may compute in half precision on a card, if the run's do
    models: ClassVar[dict[str, str]] = {}  # option that names a model → a file that its directory holds; "" → a file

    @property
    def on_gpu(self) -> bool:
        """Whether it takes a share of a GPU where there is one: if a model is named (the default encoder is small)."""
        return bool(self.model_paths)

    @property
    def model_paths(self) -> dict[str, str]:
        """The models that are named, by option."""
        return {option: path for option in self.models if (path := getattr(self, option))}

    def load(self, name: str, device: str) -> RewardFunction:
        """The function, with whatever models it needs on ``device``; ``name`` is that of ``names`` which was asked for.

        Called where images are scored. Raises ValueError or RewardError."""
        raise NotImplementedError

    def differentiable(self, function: RewardFunction, captioner: Any) -> "Differentiable | None":
        """What gradients can raise the score by, where there is such a thing, for ``reward audit``.

        A function of images (batch, 3, height, width), float in [0, 1], and their prompts → (batch,), which torch can
        differentiate and which rises with the score, though it need not be the score: the loaded ``function``'s own
        method ``differentiable``, if it has one. ``captioner``: a loaded one, or None."""
        own: Differentiable | None = getattr(function, "differentiable", None)
        return own

    def resolved(self, name: str) -> "Reward":
        """The reward with its options typed, for which one's own is imported. Raises ValueError."""
        return self

    def check_call(self, name: str) -> None:
        """Raise ValueError if the function cannot be called as a reward."""

    def try_out(self, name: str, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> None:
        """Raise ValueError if one's own function, which is called, gives other than one finite number an image.
        ``images``: (n, height, width, 3), or videos (n, frames, height, width, 3) for a reward that is of videos."""

    def everywhere(self, name: str) -> "tuple[str, Reward]":
        """The name and the options as all nodes understand them."""
        return name, self.model_copy(update={each: portable(path) for each, path in self.model_paths.items()})

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if ``prompts`` cannot be scored, as far as that is known without loading a model."""


REWARDS = Registry(Reward, __name__, "ouroboros.rewards", _SETTING, besides=["server"])


class OwnReward(Reward):
    """Whatever one's own function takes as keywords."""

    model_config = ConfigDict(extra="allow", strict=False)
    _function: Any = None  # of the process that began the run, where it has no import path

    def resolved(self, name: str) -> Reward:
        """Typed, if the import path leads to a class derived from :class:`Reward`."""
        own = self._found(name)
        return _parsed(own, name, self.model_dump()) if isinstance(own, type) and issubclass(own, Reward) else self

    def load(self, name: str, device: str) -> RewardFunction:
        """The function that an import path leads to, given these options."""
        own, given = self._found(name), self.model_dump()
        if isinstance(own, type):
            try:
                made: RewardFunction = own(**given)  # a class holds what it needs, and is called
                return made
            except (Exception, SystemExit) as error:
                raise traced(RewardError(f"{name} could not be made: {described(error)}"), error) from error
        return functools.partial(own, **given) if given else own

    def check_call(self, name: str) -> None:
        """It takes what a reward is given, and these options."""
        user_code.check_function(REWARDS.path(name) or name, _SETTING, _ASKED, self.model_dump(), REWARDS.all_names)

    def try_out(self, name: str, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> None:
        """Once a process for each function, options and size of images."""
        own, reward = self._found(name), self.resolved(name)
        asked = id(own), repr(self), images.shape, captions is None
        if reward.on_gpu or asked in _tried:  # a large model is loaded where it scores
            return
        try:
            score(reward.load(name, "cpu"), images, prompts, captions)
        except (RewardError, DegenerateBatch) as error:
            code = _code(own)
            place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
            what = f"{_SETTING} {name!r}{place} has to return one finite number an image, see docs/own_reward.md"
            raise noted(ValueError(f"{what}; tried on images of noise, {images.shape}: {error}"), error) from error
        _tried[asked] = own  # which keeps its id

    def is_light(self, name: str) -> bool:
        """Whether it asks for nothing but the function, as far as can be seen: one that mentions its captions may
        need some, one that names a model a GPU."""
        own = self._found(name)
        code, position = _code(own), 2 + (not inspect.isroutine(own))
        if self.resolved(name).on_gpu or code is None or code.co_argcount <= position:
            return False
        used = (code.co_cellvars, *(str(each.argval) for each in dis.get_instructions(code)))
        return not any(code.co_varnames[position] in each for each in used)

    def everywhere(self, name: str) -> tuple[str, Reward]:
        """A file by a path that all nodes understand, a function that has no import path along with its options."""
        copy, file = self.model_copy(), file_of(name)
        copy._function = self._found(name) if name.startswith(f"{IN_PROCESS}:") else None
        return (f"{portable(str(file))}:{name.rpartition(':')[2]}" if file else name), copy

    def _found(self, name: str) -> Any:
        return self._function or user_code.import_function(REWARDS.path(name) or name, _SETTING, REWARDS.all_names)


def _code(own: Any) -> Any:
    """The code of one's own function, or of what runs when an object or an instance is called; None if it is in C."""
    return getattr(own, "__code__", None) or getattr(own.__call__, "__code__", None)


_tried: dict[Any, Any] = {}


def parse_options(name: str, given: Mapping[str, Any]) -> Reward:
    """The reward ``name`` with its typed options, those of an import path untyped as yet. Raises ValueError naming the
    option."""
    return _parsed(REWARDS.built_in.get(name, OwnReward), name, given)


def load_reward(name: str, reward: Reward, device: str = "cpu", frames: int = 1) -> RewardFunction:
    """The function of the reward ``name``, of images or of videos of so many ``frames``. Raises ValueError if an import
    path leads nowhere."""
    resolved = reward.resolved(name)
    function = resolved.load(name, device)
    return function if frames == 1 else _of_videos(function, frames, resolved.of_videos)


def _of_videos(function: RewardFunction, frames: int, whole: bool) -> RewardFunction:
    """``function`` of videos that come as images with their frames below each other: given them ``whole``
    (n, frames, height, width, 3), or frame by frame, each with its caption, of which the mean counts."""

    def of_videos(videos: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> Any:
        if whole:
            return function(apart(videos, frames), prompts, captions)
        said = None if captions is None else of_each_frame(captions)
        scores = function(frames_of(videos, frames), [each for each in prompts for _ in range(frames)], said)
        return np.asarray(scores, dtype=np.float64).reshape(len(videos), frames).mean(axis=1)

    return of_videos


def _parsed(kind: type[Reward], name: str, given: Mapping[str, Any]) -> Reward:
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(f"options of {name}: {explain(kind, error, shows_input=False)}") from error


def score(
    function: RewardFunction, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None
) -> np.ndarray:
    """Call a reward function and check what it gives: scores (batch,) float64. Raises RewardError, DegenerateBatch."""
    try:
        scores = np.asarray(function(images, prompts, captions), dtype=np.float64)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise traced(RewardError(f"the reward function failed: {described(error)}"), error) from error
    if scores.shape != (len(images),):
        raise RewardError(f"the reward function returned shape {scores.shape} for {len(images)} images")
    check_finite(scores, prompts)
    return scores
