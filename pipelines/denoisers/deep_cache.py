"""Fewer multiply-adds from a stock ``UNet2DConditionModel`` whose weights stay as they are: between denoising steps
(DeepCache: Ma et al., 2312.00858, section 3) and between the two halves of guidance. Importable without torch.

Branch m is the m-th up-resnet from the end, 0 the last; the skip that it takes is the m-th from the start, 0 that of
``conv_in``. What enters it from below changes slowly from step to step: a full step returns it, and a cached step
begins there. Branch 0 runs one up-resnet; the code of the paper never runs fewer than two, which is branch 1 here.

A cached step depends on the latents of an earlier one, so its output is no function of x_t alone: ratios of densities
have to be taken with the features computed anew from those earlier latents.

What others attach to a network's own forward is passed by: FreeU, ControlNets, a compiled network.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
# Of a configuration, what would add an input, or a layer that is not looked for here.
_PLAIN = (
    *("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim"),
    *("center_input_sample", "dual_cross_attention", "attention_type"),
)


def check(unet_config: Mapping[str, Any], branch: int) -> None:
    """Raise ValueError unless a network with this ``config.json`` can be run here, and has up-resnet ``branch``."""
    if (kind := unet_config.get("_class_name")) != "UNet2DConditionModel":
        raise ValueError(f"features of a {kind} cannot be cached, only those of a UNet2DConditionModel")
    for name in ("down_block_types", "up_block_types"):
        if strange := [each for each in unet_config.get(name, ()) if each not in _BLOCKS]:
            raise ValueError(
                f"{name} {strange[0]!r} is not supported by cached features: known are {', '.join(_BLOCKS)}"
            )
    for name in _PLAIN:
        if (value := unet_config.get(name)) not in (None, False, "default"):
            raise ValueError(f"{name} {value!r} is not supported by cached features")
    if (added := unet_config.get("addition_embed_type")) not in (None, "text_time"):
        raise ValueError(f"addition_embed_type {added!r} is not supported by cached features, only 'text_time'")
    blocks, layers = len(unet_config.get("block_out_channels", range(4))), unet_config.get("layers_per_block", 2)
    resnets = blocks + (blocks * layers if isinstance(layers, int) else sum(layers))  # one for each skip
    if not 0 <= branch < resnets:
        raise ValueError(f"branch {branch} of cached features: this network has up-resnets 0 to {resnets - 1}")


def can_be_run(unet_config: Mapping[str, Any]) -> bool:
    """Whether :func:`check` has nothing against it."""
    try:
        check(unet_config, 0)
    except ValueError:
        return False
    return True


def forward(
    unet: Any,
    latents: "Tensor",
    timesteps: "Tensor",
    conditions: Mapping[str, "Tensor"],
    branch: int = 0,
    features: "Tensor | None" = None,
) -> tuple["Tensor", "Tensor"]:
    """What ``unet`` says of ``latents`` (batch, channels, height, width), and the features to cache.

    Without ``features`` the output is the stock forward's, bit by bit, and the features (rows, channels, height, width)
    are what enters up-resnet ``branch``, one that :func:`check` lets pass, before its skip is concatenated. With those
    that an earlier call returned for the same branch and rows, only the layers down to that skip and those from that
    up-resnet on are computed, and the features are returned as they came.

    ``timesteps`` is (batch,); ``conditions`` hold ``encoder_hidden_states`` (rows, tokens, width), of XL also
    ``text_embeds`` and ``time_ids``. Rows are batch, or a multiple of it: then the latents stand for all of them as if
    they were repeated, and what does not depend on the conditions yet is computed once.

    Raises:
        ValueError: if the rows of latents, conditions and features do not fit.
    """
    import torch

    states = conditions["encoder_hidden_states"]
    if len(states) % len(latents) or (features is not None and len(features) != len(states)):
        cached = "" if features is None else f", and features of {len(features)}"
        raise ValueError(f"{len(latents)} latents cannot have conditions of {len(states)} rows{cached}")
    embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    added = unet.get_aug_embed(emb=embedding, encoder_hidden_states=states, added_cond_kwargs=conditions)
    if added is not None:  # XL's depends on the conditions: from here on all rows differ
        embedding = torch.add(*_alike(embedding, added))
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)

    down, up = _down(unet, latents, embedding, states), _up_layers(unet)
    if features is None:
        first, skips = len(up) - 1, list(down)
        hidden = _middle(unet.mid_block, *_alike(skips[-1], embedding, states))
    else:
        first, skips, hidden = branch, list(islice(down, branch + 1)), features
    # As in the stock forward, upsampling is told the size only where doubling would miss that of the skip.
    uneven = any(side % 2**unet.num_upsamplers for side in latents.shape[-2:])
    kept = hidden
    for number in range(first, -1, -1):
        if number == branch:
            kept = hidden
        block, resnet, attention, upsamplers = up[number]
        joined = torch.cat(_alike(hidden, skips[number]), dim=1)
        hidden = _layer(block, resnet, attention, joined, embedding, states)
        for upsampler in upsamplers:
            hidden = upsampler(hidden, skips[number - 1].shape[2:] if uneven else None)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))), kept


def guided_halves(
    unet: Any,
    latents: "Tensor",
    timesteps: "Tensor",
    empty_conditions: Mapping[str, "Tensor"],
    given_conditions: Mapping[str, "Tensor"],
    branch: int = 0,
    features: "Tensor | None" = None,
) -> tuple["Tensor", "Tensor"]:
    """:func:`forward` for classifier-free guidance (Ho & Salimans, 2207.12598): 2·batch rows, the unconditional ones
    first, of output and features alike.

    Both halves have the same latents and timesteps, so what lies before the first cross-attention is computed for one
    of them; of XL ``conv_in`` alone, as its time embedding holds the pooled prompt. ``empty_conditions`` may have one
    row for all. The doubled batch gives the same but for rounding.
    """
    import torch

    both = {name: torch.cat([empty_conditions[name].expand_as(each), each]) for name, each in given_conditions.items()}
    return forward(unet, latents, timesteps, both, branch, features)


@contextmanager
def caching(unet: Any, interval: int, branch: int) -> Iterator[None]:
    """In this block a stock pipeline's calls of ``unet`` are cached ones, but for the first of an image and every
    ``interval``-th after it. An image begins where the time is no earlier than in the call before."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    last, done, features = -math.inf, 0, None

    def cached(
        sample: "Tensor", timestep: Any, encoder_hidden_states: "Tensor", return_dict: bool = True, **others: Any
    ) -> Any:
        nonlocal last, done, features
        import torch

        done, last = done + 1 if float(timestep) < last else 0, float(timestep)
        conditions = {"encoder_hidden_states": encoder_hidden_states, **(others.get("added_cond_kwargs") or {})}
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        kept = features if done % interval else None
        output, features = forward(unet, sample, times, conditions, branch, kept)
        return UNet2DConditionOutput(output) if return_dict else (output,)

    unet.forward = cached
    try:
        yield
    finally:
        del unet.forward  # its class's own is there again


def multiply_adds(unet: Any, latents: "Tensor", conditions: Mapping[str, "Tensor"], branch: int = 0) -> tuple[int, int]:
    """Multiply-adds of a full step and of a cached one, for such inputs of :func:`forward`: those of convolutions and
    linear layers, without the products inside attention. Their ratio is what a cached step costs."""
    import torch
    from torch import nn

    counted = [0]

    def count(layer: Any, _: Any, output: "Tensor") -> None:
        counted[-1] += output.numel() * layer.weight[0].numel()

    layers = [each for each in unet.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    timesteps = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
    try:
        with torch.no_grad():
            _, features = forward(unet, latents, timesteps, conditions, branch)
            counted.append(0)
            forward(unet, latents, timesteps, conditions, branch, features)
    finally:
        for hook in hooks:
            hook.remove()
    return counted[0], counted[1]


def _down(unet: Any, latents: "Tensor", embedding: "Tensor", states: "Tensor") -> Iterator["Tensor"]:
    """The skips, from the first; none is computed before it is asked for."""
    yield (hidden := unet.conv_in(latents))
    for block in unet.down_blocks:
        for resnet, attention in _layers(block):
            yield (hidden := _layer(block, resnet, attention, hidden, embedding, states))
        for downsampler in block.downsamplers or ():
            yield (hidden := downsampler(hidden))


def _middle(block: Any, hidden: "Tensor", embedding: "Tensor", states: "Tensor") -> "Tensor":
    if block is None:
        return hidden
    if not getattr(block, "has_cross_attention", False):
        return block(hidden, embedding)
    return block(hidden, embedding, encoder_hidden_states=states)


def _up_layers(unet: Any) -> list[tuple[Any, Any, Any, Any]]:
    """By branch: the block, its resnet, the attention or None, and the upsamplers that follow."""
    found = []
    for block in unet.up_blocks:
        layers = _layers(block)
        found += [(block, *layer, ()) for layer in layers[:-1]]
        found.append((block, *layers[-1], block.upsamplers or ()))
    return found[::-1]


def _layers(block: Any) -> list[tuple[Any, Any]]:
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    return list(zip(block.resnets, attentions, strict=True))


def _layer(
    block: Any, resnet: Any, attention: Any, hidden: "Tensor", embedding: "Tensor", states: "Tensor"
) -> "Tensor":
    """A resnet and, unless it is None, the attention behind it."""
    import torch

    hidden, embedding = _alike(hidden, embedding)
    if torch.is_grad_enabled() and block.gradient_checkpointing:  # as the stock block, of its resnets alone
        from torch.utils.checkpoint import checkpoint

        hidden = checkpoint(resnet, hidden, embedding, use_reentrant=False)
    else:
        hidden = resnet(hidden, embedding)
    if attention is None:
        return hidden
    hidden, states = _alike(hidden, states)
    return attention(hidden, encoder_hidden_states=states, return_dict=False)[0]


def _alike(*tensors: "Tensor") -> list["Tensor"]:
    """All with as many rows as the longest one, the others repeated."""
    rows = max(len(each) for each in tensors)
    return [each if len(each) == rows else each.repeat(rows // len(each), *[1] * (each.dim() - 1)) for each in tensors]
