"""What every actor has in common."""

import os
import time


class Worker:
    """A process that holds a model. Threads are set first, as they decide floating-point order."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    def cpu_seconds(self) -> float:
        """CPU time of this process so far."""
        return time.process_time()
