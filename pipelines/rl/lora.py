"""LoRA (Hu et al., 2106.09685) computed as one weight, W + BA, where peft computes two paths.

A layer costs what it costs without LoRA plus one small product a call, whatever the batch, and a sampler, which holds
the merged weight, computes the same to the bit. peft configures, initialises and names. The scale, alpha / rank, is 1.
"""

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional

from pipelines.rl.weights import merged


class Merged:
    """What both kinds of layers share."""

    def whole(self: Any) -> Tensor:
        """W + BA."""
        return merged(self.get_base_layer().weight, *self.factors())

    def factors(self: Any) -> tuple[Tensor, Tensor]:
        """A (rank, inputs, …) and B (outputs, rank, …)."""
        return self.lora_A["default"].weight, self.lora_B["default"].weight


class MergedLinear(Merged, Linear):
    """A linear layer."""

    def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        return functional.linear(inputs, self.whole(), self.get_base_layer().bias)


class MergedConv2d(Merged, Conv2d):
    """A convolution."""

    def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        layer = self.get_base_layer()
        return layer._conv_forward(inputs, self.whole(), layer.bias)


def attach(network: nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """Bind LoRA to ``targets``, to begin at the identity; its parameters are float32 whatever the network's type.

    There is no dropout, which would make the first update's ratio differ from 1. Raises ValueError if a target
    binds to no module, or to one that is neither linear nor a convolution.
    """
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ValueError(f"LoRA target {target!r} matches no module of the network")
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=list(targets)
    )
    config._register_custom_module({nn.Linear: MergedLinear, nn.Conv2d: MergedConv2d})
    inject_adapter_in_model(config, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
