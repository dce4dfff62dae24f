"""Learners that make each update together: all know the same transitions, and each computes a part of them.

Data parallelism by ``torch.distributed``, written so that no rank waits for one that does not come: whether to go on,
to try again or to stop follows from what all of them found, and every wait has a bound. What a lost peer or a wait that
is over raises is torch's own.
"""

import datetime
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET = 25 * 2**20  # bytes


class DivergedError(RuntimeError):
    """Learners that began alike and made the same updates hold different weights."""


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. All learners have to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meeting_place(host: str) -> "torch.distributed.TCPStore":
    """Where learners find each other: listens on ``host`` alone, at a port of the system's choice, while kept."""
    listener = socket.create_server((host, 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    return torch.distributed.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def network_to(host: str, port: int, timeout: float) -> str:
    """The own address by which this process reaches another; Gloo and NCCL are to use its network. Raises OSError
    within ``timeout`` seconds."""
    import psutil

    with socket.create_connection((host, port), timeout) as connection:
        own: str = connection.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    return own


class Group:
    """The ``rank``-th of ``size`` learners. Alone, nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.sharded = False  # whether the calls of the network are exchanges themselves

    @classmethod
    def join(cls, host: str, port: int, rank: int, size: int, device: str, timeout: float) -> "Group":
        """Meet the others at a ``TCPStore``. ``timeout`` (seconds) bounds this and every later exchange.

        Gloo carries what is on CPUs, NCCL what is on GPUs; both use the network by which the store is reached.
        """
        import torch.distributed as dist

        network_to(host, port, timeout)
        bound = datetime.timedelta(seconds=timeout)
        options: dict[str, Any] = {"backend": "gloo"}
        if device == "cuda":
            options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", torch.cuda.current_device())}
        store = dist.TCPStore(host, port, is_master=False, timeout=bound)
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=bound, **options)
        # Who leaves at once would close the connections that others are still making.
        store.set(f"joined/{rank}", "")
        store.wait([f"joined/{each}" for each in range(size)], bound)
        return cls(rank, size)

    def share(self, *columns: Tensor) -> tuple[list[Tensor], int]:
        """This learner's part of each of ``columns`` (transitions,), and how many of its rows are real.

        All parts are ⌈transitions / size⌉ long, so that all make the same calls of a sharded network; what the last
        ones lack is filled up with the first transition.
        """
        count = len(columns[0])
        each = -(-count // self.size)
        rows = torch.arange(self.rank * each, (self.rank + 1) * each)
        part = torch.where(rows < count, rows, 0)
        return [column[part] for column in columns], int((rows < count).sum())

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all, which have one shape, joined along their first dimension in the order of ranks."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def any(self, *flags: bool) -> list[bool]:
        """Whether any learner raised each of ``flags``."""
        if self.size == 1:
            return list(flags)
        own = torch.tensor([flags], dtype=torch.uint8)
        return self.gather(own).any(dim=0).tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up all ranks' gradients, in place. Those of sharded parameters have been added up on their way back."""
        if self.size == 1:
            return
        from torch.distributed.tensor import DTensor

        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
        for bucket in _buckets(gradients):  # one is sent while the next is packed; more would hold all of them twice
            packed = torch.cat([gradient.flatten() for gradient in bucket])
            under_way.append((bucket, packed, torch.distributed.all_reduce(packed, async_op=True)))
            if len(under_way) > 1:
                _unpack(*under_way.popleft())
        for each in under_way:
            _unpack(*each)

    def check_same(self, checksum: str) -> None:
        """Raise DivergedError, in all learners, unless all have the same ``checksum`` (hexadecimal digits)."""
        own = torch.frombuffer(bytearray.fromhex(checksum), dtype=torch.uint8)
        digests = self.gather(own[None])
        different = (digests != digests[0]).any(dim=1).nonzero().flatten().tolist()
        if different:
            raise DivergedError(
                f"after the same updates learners {different} hold other weights than learner 0: are all nodes of one "
                "kind, with the same versions of torch?"
            )


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In parts of some ``_BUCKET`` bytes and one type: an exchange has a cost of its own, whatever it carries."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or sum(each.nbytes for each in bucket) >= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _unpack(bucket: Sequence[Tensor], packed: Tensor, work: Any) -> None:
    work.wait()
    for gradient, summed in zip(bucket, packed.split([each.numel() for each in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))
