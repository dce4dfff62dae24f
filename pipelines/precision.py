"""Half precision of models that look and are not trained: captioners and rewards, on a card."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def in_half(device: str, wanted: bool, kind: str = "float16") -> AbstractContextManager[Any]:
    """In this block models on a card multiply in half precision, if that is ``wanted``: torch's autocast, under which
    norms, softmax and sums stay float32, and so do the weights. On a CPU, where it would be slower, nothing changes.

    float16 has three bits more than bfloat16: ``python -m benchmarks.half_precision`` tells what it does to scores.
    """
    if not wanted or not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.autocast("cuda", getattr(torch, kind))
