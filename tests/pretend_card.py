"""A GPU that is not there: tensors that say they are on one, computed by the CPU, and refused where a GPU would refuse.

An operation whose tensors are on the card and in the machine's memory fails as it does on a card. What the machine has
to wait for (a number that is asked for, a copy to it) is counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "card"
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten._to_copy.default, _aten.copy_.default, _aten.set_.source_Tensor}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_WAITED_FOR = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default}


class OnCard(torch.Tensor):
    """A tensor on the card; ``held``: what it is, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnCard":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=f"{KIND}:0"
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return OnCard(self.held)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        assert isinstance(other, OnCard), f"{other.device} memory was put into a tensor on the card"
        self.held = other.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> "OnCard":
        return OnCard(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` gives, and where."""
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    places = {isinstance(each, OnCard) for each in given if each.dim() or isinstance(each, OnCard)}
    if len(places) > 1 and func not in _BETWEEN_DEVICES and not (func in _INDEXING and isinstance(args[0], OnCard)):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    on_card = asked.type == KIND if asked else True in places
    if func in _BETWEEN_DEVICES and not asked:
        on_card = isinstance(args[0], OnCard)
    inner = tree_map(lambda each: each.held if isinstance(each, OnCard) else each, (args, kwargs))
    if asked:
        inner[1]["device"] = torch.device("cpu")
    out = tree_map(
        lambda each: OnCard(each) if on_card and isinstance(each, torch.Tensor) else each, func(*inner[0], **inner[1])
    )
    return return_and_correct_aliasing(func, args, kwargs, out) if True in places and on_card else out


class _Machine(TorchDispatchMode):
    """What is made here, too, may be made on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = func is _aten._to_copy.default and str(kwargs.get("device", "")).startswith("cpu")
        if (func in _WAITED_FOR or to_host) and isinstance(args[0], OnCard):
            self.waits[str(func)] += 1
        return computed(func, args, kwargs)


@contextmanager
def pretend_card() -> Iterator[Counter[str]]:
    """In this block there is a card, ``KIND``. Yields how often it was waited for, by operation."""
    if not hasattr(torch, KIND):
        _setup_privateuseone_for_python_backend(KIND)
    make = torch.tensor  # which asks no mode

    def tensor(data: Any, device: Any = None, **how: Any) -> torch.Tensor:
        on_card = str(device).startswith(KIND)
        return make(data, **how).to(device) if on_card else make(data, device=device, **how)

    with (
        patch.object(torch, "tensor", tensor),
        torch.autograd.set_multithreading_enabled(False),  # a thread for each card that was there at the start
        _Machine() as machine,
    ):
        yield machine.waits


def main() -> None:
    """Print what each of three mistakes leads to."""
    with pretend_card() as waits:
        there = torch.ones(2).to(KIND)
        assert (there + there.sum()).device.type == KIND
        assert there.sum().item() == 2
        assert sum(waits.values()) == 1
        parameter = torch.nn.Parameter(there)
        (2 * parameter).sum().backward()
        assert parameter.grad is not None
        assert parameter.grad.device.type == KIND
        for mistake in (lambda: there + torch.ones(2), lambda: torch.cat([there, torch.ones(2)]), there.numpy):
            try:
                mistake()
            except (RuntimeError, TypeError) as error:
                print(type(error).__name__, str(error)[:45])


if __name__ == "__main__":
    main()
