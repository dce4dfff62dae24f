"""What of a network is trained, what of it travels to the samplers, and how each is named, counted and verified."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipelines.settings import ModelSettings
from pipelines.storage.tensor_files import parts

Weights = dict[str, np.ndarray]
_LORA = ".lora_A.weight", ".lora_B.weight"


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name], order="C")
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def prepare(network: nn.Module, model: ModelSettings) -> dict[str, nn.Parameter]:
    """Make ``network`` trainable, whole or by LoRA, and return the trained parameters by name. Raises ValueError."""
    if model.lora_rank:
        from pipelines.rl.lora import attach

        attach(network, model.lora_rank, model.lora_targets)
    else:
        network.requires_grad_(True)
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def masters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The float32 weights that an optimiser moves: a parameter itself, or, of one of fewer bits, in which a step of
    1e-5 would be lost, a copy that gathers its gradients. :func:`fill` puts what the copies hold into the network."""
    held = dict(parameters)
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            held[name] = nn.Parameter(parameter.detach().float())
            parameter.register_post_accumulate_grad_hook(partial(_hand_over, held[name]))
    return held


def _hand_over(master: nn.Parameter, parameter: Tensor) -> None:
    """Add a micro-batch's gradient to what ``master`` has, in float32."""
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad + gradient


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """``parameters`` hold ``values`` in this block: the same network with other weights. They are lent and not copied,
    but where a parameter is sharded, of another type or on another device."""
    sharded = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    written = copied(sharded)
    lent = {name: parameter.data for name, parameter in parameters.items() if name not in sharded}
    try:
        fill(sharded, values)
        for name in lent:
            parameters[name].data = values[name].detach().to(lent[name])
        yield
    finally:
        fill(sharded, written)
        for name, own in lent.items():
            parameters[name].data = own


def copied(parameters: Mapping[str, Tensor], device: str | None = None) -> dict[str, Tensor]:
    """What they hold now, on their own device or another."""
    return {
        name: parameter.detach().to(device or parameter.device, copy=True) for name, parameter in parameters.items()
    }


def fill(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into ``parameters``, rounded to their type."""
    for name, parameter in parameters.items():  # .data: autograd need not know, as all is put back before it looks
        parameter.data.copy_(values[name])


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """The :class:`pipelines.rl.lora.Merged` layers of ``network`` by name."""
    if not hasattr(network, "peft_config"):
        return {}
    from pipelines.rl.lora import Merged

    return {name: module for name, module in network.named_modules() if isinstance(module, Merged)}


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """In this block ``network`` has no LoRA, but what it makes of the weights."""
    layers = lora_layers(network)
    kept = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}

    def put(name: str, module: nn.Module, weight: Tensor) -> None:
        layers[name].get_base_layer().weight.data = weight
        parent, _, child = name.rpartition(".")
        network.get_submodule(parent)._modules[child] = module

    try:
        for name, layer in layers.items():
            put(name, layer.get_base_layer(), layer.whole().detach())
        yield
    finally:
        for name, weight in kept.items():
            put(name, layers[name], weight)


def exported(network: nn.Module) -> dict[str, Tensor]:
    """What travels to those who draw: the trained weights by their names, or LoRA's A and B under peft's, which
    :func:`load_weights` adds to what the layers had (alpha = rank, which is what other loaders take for granted)."""
    if not (layers := lora_layers(network)):
        return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}
    factors = {name: layer.factors() for name, layer in layers.items()}
    return {
        f"{name}{ending}": each.detach()
        for name, pair in factors.items()
        for ending, each in zip(_LORA, pair, strict=True)
    }


def portions(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names of exported weights of so many bytes in parts that can be loaded one after the other."""
    together = any(name.endswith(_LORA) for name in sizes)  # A and B of a layer are added at once
    return [[*sizes]] if together else [*parts(sizes)]


def changed_by(weights: Iterable[str]) -> list[str]:
    """The names of the parameters of a plain network that :func:`load_weights` writes."""
    a, b = _LORA
    names = (name for name in weights if not name.endswith(b))
    return [f"{name.removesuffix(a)}.weight" if name.endswith(a) else name for name in names]


@torch.no_grad()
def load_weights(
    network: nn.Module, weights: Mapping[str, np.ndarray | Tensor], base: Mapping[str, Tensor] | None = None
) -> int:
    """Write exported weights into a plain network, which then runs at full speed. LoRA is added to the ``base``, by
    default what the network holds: W + BA, computed as the learner does. Returns how many tensors changed. Raises
    KeyError on an unknown name."""
    parameters = dict(network.named_parameters())
    base, changed = parameters if base is None else base, []
    for name in changed_by(weights):
        parameter, layer = parameters[name], name.removesuffix(".weight")
        if layer + _LORA[0] in weights:
            a, b = (from_numpy(weights[layer + ending], torch.float32).to(parameter.device) for ending in _LORA)
            tensor = merged(base[name].to(parameter.device), a, b)
        else:
            tensor = from_numpy(weights[name], parameter.dtype).to(parameter.device)
        changed.append((parameter != tensor).any())
        parameter.copy_(tensor)
    return int(torch.stack(changed).sum()) if changed else 0


def merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + BA in W's shape and type, added up in the type of A and B, float32."""
    return torch.addmm(weight.flatten(1).to(a.dtype), b.flatten(1), a.flatten(1)).view_as(weight).to(weight.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16, which numpy lacks, as its 16 bits: uint16."""
    tensor = tensor.detach().to("cpu", copy=True)  # of a copy: FSDP frees the storage of what was gathered
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_numpy(array: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`to_numpy` was given, as ``dtype``. Arrays from Ray's object store are read-only: they are copied. One
    that is a tensor still has its numbers."""
    if isinstance(array, Tensor):
        return array.to(dtype)
    tensor = torch.from_numpy(np.array(array))
    return (tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor).to(dtype)
