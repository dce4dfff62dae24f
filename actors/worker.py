"""What every actor has in common: it sets its threads, and notes what it spends its time on."""

import ctypes
import functools
import gc
import inspect
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.rl.trajectory import Trajectory

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
ACTIVITIES = {
    "ready": "loading",
    "set_weights": "taking weights",
    "receive": "taking weights",
    "send": "sending weights",
    "rollout": "drawing",
    "caption": "captioning",
    "score": "scoring",
    "judge": "judging",
    "learn": "learning",
    "state_part": "handing over its state",
    "restore_part": "taking a state",
    "pipeline": "saving the pipeline",
    "pipeline_part": "handing over the pipeline",
    "divergence": "comparing with the base",
}

_BY_IMAGE = {"rollout", "caption", "score", "judge"}

Span = tuple[str, float, float]  # what, start and end in seconds since 1970; one within another is a part of it


@dataclass(frozen=True)
class Account:
    """What a process has used since it began, memory at its highest in bytes, and its spans since it was last asked."""

    cpu_seconds: float
    memory: int
    gpu_memory: int
    spans: list[Span]

    @classmethod
    def of_this_process(cls, spans: list[Span]) -> "Account":
        cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
        on_gpu = cuda.max_memory_allocated() if cuda and cuda.is_initialized() else 0
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return cls(time.process_time(), 1024 * kilobytes, on_gpu, spans)


class Worker:
    """A process that holds a model. Threads are set first, as they decide floating-point order.

    While a worker is made, no garbage is looked for, nor later among what was made: all that it imports and loads is
    there to stay, and to look through it again and again takes a sixth of a start's processor time.
    """

    spans: list[Span]

    def __init_subclass__(cls) -> None:
        made: Any = cls.__init__

        @functools.wraps(made)
        def make(self: Any, *arguments: Any) -> None:
            self.spans = []
            gc.disable()
            try:
                made(self, *arguments)
            finally:
                gc.freeze()
                gc.enable()

        cls.__init__ = make  # type: ignore[method-assign, assignment]
        for name, method in [*vars(cls).items()]:
            if inspect.isfunction(method) and not name.startswith("_"):
                done = _in_halves(method) if name in _BY_IMAGE else method
                setattr(cls, name, _noted(done, ACTIVITIES.get(name, name)))

    def __init__(self, threads: int, uses_torch: bool = True) -> None:
        keep_memory()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that a user's own function imports later
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if uses_torch:
            import torch

            torch.set_num_threads(threads)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    def card(self) -> str | None:
        """The card that this process computes on; None: it computes on CPUs."""
        cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
        return str(cuda.get_device_properties(0).uuid) if cuda and cuda.is_initialized() else None

    def account(self) -> Account:
        """What this process has used."""
        spans = list(self.spans)
        self.spans.clear()
        return Account.of_this_process(spans)

    def profile(self) -> None:
        """From now on note what the work consists of, too."""
        for owner, name, what in self._insides():
            setattr(owner, name, _timed(self, getattr(owner, name), what))

    def _insides(self) -> list[tuple[Any, str, str]]:
        """(object, its function, what that does) of the parts of the work that a profile tells apart."""
        return []


def keep_memory() -> None:
    """Let this process keep the memory of what it computed for what it computes next, where the C library is glibc.

    By itself glibc returns large blocks to the system after each call of a network, and the system clears every page
    of them anew: up to a sixth of a small network's training.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest it takes
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def device_is_lost(error: BaseException) -> bool:
    """Whether a GPU failed this process in a way that leaves it unusable: only a new process can go on."""
    failed = any(
        type(each).__name__ == "AcceleratorError" or (isinstance(each, RuntimeError) and "CUDA error" in str(each))
        for each in _causes(error)
    )
    return failed and not is_short_of_memory(error)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory for what was asked, or for a part of it."""
    marks = "OutOfMemoryError", "CUDA error: out of memory"
    return any(type(each).__name__ == marks[0] or marks[1] in str(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def end_if_lost(error: BaseException) -> None:
    """End this process if its device is lost: Ray starts another, which does the work again."""
    if device_is_lost(error):
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _in_halves(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, of which every list and array has a row an image: where memory is short, half of the images are done
    after the other, and what comes of them is joined."""

    @functools.wraps(method)
    def work(self: Worker, *arguments: Any) -> Any:
        rows = next(len(each) for each in arguments if isinstance(each, list | np.ndarray))
        try:
            return method(self, *arguments)
        except Exception as error:
            if rows < 2 or not is_short_of_memory(error):
                raise
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        halves = slice(rows // 2), slice(rows // 2, None)
        parts = [[each[half] if isinstance(each, list | np.ndarray) else each for each in arguments] for half in halves]
        return _joined(*(work(self, *part) for part in parts))

    return work


def _joined(one: Any, other: Any) -> Any:
    """What was made of some images and of others, as if of all."""
    if isinstance(one, tuple):
        return tuple(map(_joined, one, other))
    if isinstance(one, dict):
        return {name: _joined(one[name], other[name]) for name in one}
    if isinstance(one, Trajectory):
        return Trajectory.concatenate((one, other))
    return np.concatenate((one, other)) if isinstance(one, np.ndarray) else one + other


def _noted(method: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def work(self: Worker, *arguments: Any) -> Any:
        started = time.time()
        try:
            return method(self, *arguments)
        except Exception as error:
            end_if_lost(error)
            raise
        finally:
            self.spans.append((what, started, time.time()))

    return work


def _timed(worker: Worker, function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``function``, noted; what it gave a GPU to do is waited for."""
    import torch

    def inside(*arguments: Any, **options: Any) -> Any:
        started = time.time()
        result = function(*arguments, **options)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        worker.spans.append((what, started, time.time()))
        return result

    return inside
