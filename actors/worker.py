"""What every actor has in common."""

import ctypes
import functools
import gc
import os
import time
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class Worker:
    """A process that holds a model. Threads are set first, as they decide floating-point order.

    While a worker is made, no garbage is looked for, nor later among what was made: all that it imports and loads is
    there to stay, and to look through it again and again takes a sixth of a start's processor time.
    """

    def __init_subclass__(cls) -> None:
        made: Any = cls.__init__

        @functools.wraps(made)
        def make(self: Any, *arguments: Any) -> None:
            gc.disable()
            try:
                made(self, *arguments)
            finally:
                gc.freeze()
                gc.enable()

        cls.__init__ = make  # type: ignore[method-assign, assignment]

    def __init__(self, threads: int, uses_torch: bool = True) -> None:
        keep_memory()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that somebody's own function imports later
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if uses_torch:
            import torch

            torch.set_num_threads(threads)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    def cpu_seconds(self) -> float:
        """CPU time of this process so far."""
        return time.process_time()


def keep_memory() -> None:
    """Let this process keep the memory of what it computed for what it computes next, where the C library is glibc.

    By itself glibc returns large blocks to the system after each call of a network, and the system clears every page
    of them anew: up to a sixth of a small network's training.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest it takes
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
