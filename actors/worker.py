"""What every actor has in common."""

import functools
import gc
import os
import time
from typing import Any


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
