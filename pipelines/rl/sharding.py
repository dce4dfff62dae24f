"""A network whose weights, gradients and optimiser state are spread over several learners (PyTorch's FSDP2)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, size: int, device: str | None = None) -> None:
    """Leave each of ``size`` learners its part of every parameter, on a ``device``, by default where it is. A block is
    whole only while it computes.

    Gradients are summed over learners, in float32 whatever the weights are. The outermost part is given back after each
    pass, too: it would miss that other weights were put in for a pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device or next(network.parameters()).device.type, (size,))
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*blocks, network):
        part: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # Gloo knows no other way to leave a sum undivided


@contextlib.contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """In this block every parameter is whole. All learners have to enter it."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor that may be sharded is held here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that all learners have, on the device of ``like`` and sharded as it is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
