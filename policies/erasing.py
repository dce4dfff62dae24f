"""Erasing a concept from a diffusion model's weights: ESD (Gandikota et al., "Erasing Concepts from Diffusion Models",
2303.07345) and, in closed form, UCE (Gandikota et al., "Unified Concept Editing in Diffusion Models", 2308.14761).

Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

Variant = Literal["esd-x", "esd-x-strict", "esd-u", "uce"]


class ErasingSettings(Settings):
    """How a concept is erased. The authors' program: 200 rounds of one image, one update and a batch of one."""

    eta: float = Field(0.0, ge=0, description="η of ESD: how far beyond ∅ the answers are led")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's at first; it falls linearly to 0")
    rounds: int = Field(1, ge=1, description="times that images are drawn")
    images: int = Field(128, ge=1, description="images a round, drawn step by step; updates learn from their x_t")
    updates: int = Field(200, ge=1, description="updates a round")
    batch: int = Field(16, ge=1, description="x_t an update, of random images and steps")
    retain: float = Field(0.0, ge=0, lt=1, description="share of images of other prompts, whose answers stay; ESD: 0")
    sampler: Literal["frozen", "edited"] = Field("frozen", description="the network that draws")
    steps: int = Field(10, ge=1, le=1000, description="DDIM steps of the images; the paper: 50")
    guidance_scale: float = Field(3.0, ge=1, description="guidance of the images; the paper: 3")
    stiffness: float = Field(0.5, gt=0, description="λ of UCE")


def esd_target(free: Tensor, concept: Tensor, eta: float) -> Tensor:
    """What the edited network is to answer to the concept: e*(∅) − η (e*(c) − e*(∅)), ESD's equation 7.

    ``free`` e*(∅) and ``concept`` e*(c) are outputs of the frozen network at one x_t, of equal shape; gradients flow
    through neither. The weights sum to 1, so the formula holds for ε, v and x_0 alike, which are affine in one another.
    The *loss* does not: ‖Δε‖² = ᾱ ‖Δv‖², so the squared error of v weighs noisy steps more, and a learning rate for one
    is none for the other.
    """
    return (free - eta * (concept - free)).detach()


def trained_modules(network: nn.Module, variant: Variant) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a variant changes, by name, of a network whose cross-attention is called ``attn2``.

    ``esd-x``: the linear layers of cross-attention, for what words name (styles); ``esd-x-strict``, ``uce``: of these
    the keys and values alone; ``esd-u``: linear layers and convolutions everywhere else, no norms, for objects.
    """
    from torch import nn

    elsewhere = variant == "esd-u"
    kinds = nn.Linear | nn.Conv2d if elsewhere else nn.Linear
    ends = (".to_k", ".to_v") if variant in ("esd-x-strict", "uce") else ("",)
    for name, module in network.named_modules():
        crossed = "attn2" in name.split(".")
        if isinstance(module, kinds) and crossed != elsewhere and name.endswith(ends):
            yield name, module


def uce_weight(weight: Tensor, concepts: Tensor, guides: Tensor, kept: Tensor, stiffness: float) -> Tensor:
    """The least-squares W (out, in) that maps ``concepts`` (n, in) to what the old ``weight`` makes of their ``guides``
    (n, in), while ``kept`` (m, in) stay and all else moves little: UCE's equation 7, in float64.

    W = (λ W₀ + Σ W₀ g cᵀ + Σ W₀ p pᵀ)(λ I + Σ c cᵀ + Σ p pᵀ)⁻¹, with λ the ``stiffness``: the smaller, the nearer both
    are to exact, as long as the states are independent.
    """
    import torch

    old, concepts, guides, kept = (each.double() for each in (weight, concepts, guides, kept))
    ridge = stiffness * torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    gram = ridge + concepts.T @ concepts + kept.T @ kept
    wanted = old @ (ridge + guides.T @ concepts + kept.T @ kept)
    return torch.linalg.solve(gram, wanted, left=False).to(weight.dtype)
