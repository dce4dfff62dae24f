"""Weights on their way from one process to several without a copy on the host: NCCL between cards, Gloo between CPUs.

A shortcut that may fail: whoever is lost takes it away from all, and none of them waits for long.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from policies.rl.group import network_to

_LOST = "lost"  # in the store: that a member is not the process that joined
_SOON = datetime.timedelta(seconds=20)


class BroadcastLostError(RuntimeError):
    """A member of a broadcast is gone."""


class Broadcast:
    """The ``rank``-th of ``size`` processes, of which the first sends. They meet at the ``TCPStore`` of
    :func:`policies.rl.group.meeting_place`; ``timeout`` (seconds) bounds every wait."""

    def __init__(self, host: str, port: int, rank: int, size: int, device: str, timeout: float) -> None:
        dist: Any = torch.distributed
        self.meeting, self._timeout = (host, port), timeout
        own, bound = network_to(host, port, timeout), datetime.timedelta(seconds=timeout)
        self._store = dist.TCPStore(host, port, is_master=False, timeout=bound)
        kind = dist.ProcessGroupNCCL if device == "cuda" else dist.ProcessGroupGloo
        options = kind.Options() if device == "cuda" else kind._Options()
        options._timeout = bound
        if device != "cuda":  # which by itself takes the network of the host's name
            options._devices = [kind.create_device(hostname=own)]
        self._group: Any = kind(self._store, rank, size, options)

    def transfer(self, tensors: Iterable[Tensor]) -> bool:
        """Send ``tensors``, or, in all but the first, write what comes into them, which are of the same shapes and
        types in the same order. Returns whether what is here now is what was sent. Raises BroadcastLostError."""
        given = [tensor.contiguous() for tensor in tensors]
        try:
            for tensor in given:
                self._wait(self._group.broadcast([tensor]))
            own = _digests(given)
            sent = own.clone()
            self._wait(self._group.broadcast([sent]))
        except Exception as error:  # torch's, of a peer that is gone or of a network that does not carry
            leave(*self.meeting)
            raise BroadcastLostError(f"a member of the broadcast is gone: {error}") from error
        return torch.equal(own, sent)

    def _wait(self, work: Any) -> None:
        """Until it is done, or somebody says that a member is lost, of which NCCL does not know."""
        deadline, pause = time.monotonic() + self._timeout, 1e-4
        while not work.is_completed():
            if pause > 0.05 and (self._store.check([_LOST]) or time.monotonic() > deadline):
                self._group.abort()
                raise BroadcastLostError("a member of the broadcast is gone")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        work.wait()


def joined(host: str, port: int, rank: int, size: int, device: str, timeout: float) -> Broadcast | None:
    """A member, to which the others have been shown to be connected; None where they are not. Whatever the reason, the
    object store carries as well."""
    try:
        member = Broadcast(host, port, rank, size, device, timeout)
        return member if member.transfer([torch.full((1,), float(rank == 0), device=device)]) else None
    except Exception as error:
        print(f"no broadcast of weights: {error}", file=sys.stderr, flush=True)
        leave(host, port)
        return None


def leave(host: str, port: int) -> None:
    """Tell the members of a broadcast that one of them is gone."""
    with contextlib.suppress(RuntimeError):  # whoever keeps the store is gone: the run is
        torch.distributed.TCPStore(host, port, is_master=False, timeout=_SOON).set(_LOST, "")


def _digests(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,): of each the bits of its numbers, one on the other, computed where it lies."""
    return torch.stack([torch.hash_tensor(tensor).view(torch.int64) for tensor in tensors])
