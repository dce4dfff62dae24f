"""Rewards: how well an image, or what the captioner says of it, fits its prompt.

A reward is a function ``(images, prompts, captions) → scores`` with images (batch, height, width, 3) uint8, one
prompt and one caption (or None, if there is no captioner) an image, and one finite float an image, higher being
better. One's own is named by its import path, ``reward.function=my_module:my_function``.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.rewards.options import OPTIONS, RewardOptions
from pipelines.user_code import described
from policies.rl.health import check_finite

RewardFunction = Callable[[np.ndarray, Sequence[str], Sequence[str] | None], Sequence[float] | np.ndarray]


class RewardError(RuntimeError):
    """A reward function failed or did not return one number an image. It is never scored as zero."""


class UnreachableError(RewardError):
    """A reward's server is away, ended in the middle of its answer, has too much to do, or failed."""


class TooSlowError(RewardError):
    """A reward's server took longer than it was given."""


class NonsenseError(RewardError):
    """A reward's server answered what cannot be scores, or refused the question."""


def load_reward(name: str, options: RewardOptions, device: str = "cpu") -> RewardFunction:
    """The reward function ``name`` with its options. Raises ValueError if an import path leads nowhere."""
    if name not in OPTIONS:
        own, given = import_function(name), options.model_dump()
        if isinstance(own, type):
            try:
                return own(**given)  # a class holds what it needs, and is called
            except (Exception, SystemExit) as error:
                raise RewardError(f"{name} could not be made: {described(error)}") from error
        return functools.partial(own, **given) if given else own
    told: Any = options  # each name has options of its own kind
    if name == "sentence_cosine":
        from pipelines.rewards.text import SentenceCosine

        return SentenceCosine(told, device)
    if name.startswith("bertscore_"):
        from pipelines.rewards.text import BertScore

        return BertScore(told, name.removeprefix("bertscore_"), device)
    if name == "strict":
        from pipelines.rewards.text import Strict

        return Strict(told)
    if name in ("blip_vqa", "clip_score", "aesthetic"):
        from pipelines.rewards.images import Aesthetic, ClipScore, Vqa

        return {"blip_vqa": Vqa, "clip_score": ClipScore, "aesthetic": Aesthetic}[name](told, device)
    if name.startswith("jpeg_"):
        from pipelines.rewards.jpeg import jpeg_kilobytes

        sign = 1 if name == "jpeg_incompressibility" else -1
        return lambda images, prompts, captions: sign * jpeg_kilobytes(images)
    if name == "no_writing":
        from pipelines.rewards.writing import vetoed

        return lambda images, prompts, captions: -vetoed(images, prompts).astype(np.float64)
    from pipelines.rewards.remote import HttpReward, Judge

    return HttpReward(told) if name == "http" else Judge(told)


def check_own(name: str, options: RewardOptions) -> None:
    """Raise ValueError if the reward ``name`` is one's own and cannot be called as a reward, with its ``options``."""
    if name not in OPTIONS:
        check_function(name, "reward.function", ("images", "prompts", "captions"), options.model_dump(), list(OPTIONS))


def import_function(path: str, setting: str = "reward.function", built_in: Sequence[str] = tuple(OPTIONS)) -> Any:
    """Import ``module:function``, the value of ``setting``. Raises ValueError that says which half is wrong."""
    module_name, separator, function_name = path.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(
            f"{setting} {path!r} is neither one of {', '.join(built_in)} nor an import path 'module:function'"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # an imported module may fail in any way
        reason = f"module {module_name!r} cannot be imported: {described(error)}"
        raise ValueError(f"{setting} {path!r}: {reason}") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"{setting} {path!r}: module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise ValueError(f"{setting} {path!r}: {function_name!r} cannot be called")
    return function


def check_function(
    path: str, setting: str, asked: Sequence[str], options: Mapping[str, Any] | None, built_in: Sequence[str]
) -> None:
    """Raise ValueError unless what ``module:function`` leads to can be called with the arguments ``asked`` and
    ``options``. Those of a class make the instance that is called; None: no class is wanted. Nothing is called."""
    own, given = import_function(path, setting, built_in), dict(options or {})
    if isinstance(own, type) and options is None:
        raise ValueError(f"{setting} {path!r} is a class: name a function of {', '.join(asked)}")
    steps = [(own, asked, given)]
    if isinstance(own, type):
        if "__call__" not in dir(own):
            raise ValueError(f"{setting} {path!r}: the class has no __call__(self, {', '.join(asked)})")
        steps = [(own, (), given), (functools.partial(own.__call__, None), asked, {})]
    for function, positional, keywords in steps:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(inspect.unwrap(function)):
            raise ValueError(f"{setting} {path!r} is async or yields: it has to return its numbers")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # written in C, some say nothing of their arguments
            continue
        try:
            signature.bind(*positional, **keywords)
        except TypeError as error:
            unknown = [name for name in keywords if name not in signature.parameters]
            near = difflib.get_close_matches(unknown[0], signature.parameters, n=1) if unknown else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{setting} {path!r} takes {signature}: {error}{hint}") from error


def score(
    function: RewardFunction, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None
) -> np.ndarray:
    """Call a reward function and check what it returns: scores (batch,) float64. Raises RewardError or SickNumbers."""
    try:
        scores = np.asarray(function(images, prompts, captions), dtype=np.float64)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"the reward function failed: {described(error)}") from error
    if scores.shape != (len(images),):
        raise RewardError(f"the reward function returned shape {scores.shape} for {len(images)} images")
    check_finite(scores, prompts)
    return scores
