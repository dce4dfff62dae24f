"""What of a network is trained, what of it travels to the samplers, and how each is named, counted and verified."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.settings import ModelSettings

Weights = dict[str, np.ndarray]


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name], order="C")
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def prepare(network: nn.Module, model: ModelSettings) -> dict[str, nn.Parameter]:
    """Make ``network`` trainable, whole or by LoRA, and return the trained parameters by name.

    LoRA starts at the identity and has no dropout, which would make the first update's ratio differ from 1.
    Raises ValueError if a LoRA target binds to no module.
    """
    if model.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        names = [name for name, _ in network.named_modules()]
        for target in model.lora_targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise ValueError(f"LoRA target {target!r} matches no module of the network")
        rank, targets = model.lora_rank, list(model.lora_targets)
        lora = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=targets
        )
        inject_adapter_in_model(lora, network)
    else:
        network.requires_grad_(True)
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """``parameters`` hold ``values`` in this block: the same network with other weights."""
    kept = copied(parameters)
    _fill(parameters, values)
    try:
        yield
    finally:
        _fill(parameters, kept)


def copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What they hold now."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _fill(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def exported_weights(network: nn.Module) -> Weights:
    """The trained weights under the plain network's names, LoRA merged (W + BA): samplers run at full speed."""
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in network.modules()):
        return {name: to_numpy(parameter) for name, parameter in network.named_parameters() if parameter.requires_grad}
    merged: Weights = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            merged[f"{name}.weight"] = to_numpy(layer.weight + module.get_delta_weight("default"))
    return merged


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, np.ndarray]) -> int:
    """Write ``weights`` into a plain network. Returns how many tensors changed. Raises KeyError on an unknown name."""
    parameters = dict(network.named_parameters())
    changed = 0
    for name, array in weights.items():
        tensor = from_numpy(array, parameters[name].dtype).to(parameters[name].device)
        changed += not torch.equal(parameters[name], tensor)
        parameters[name].copy_(tensor)
    return changed


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16, which numpy lacks, travels as float32 without loss."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().numpy().copy()


def from_numpy(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A tensor of ``dtype``. Arrays from Ray's object store are read-only, so they are copied."""
    return torch.from_numpy(np.array(array)).to(dtype)
