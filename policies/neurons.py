"""Concept neurons: weights of cross-attention that make a text-to-image model draw a subject once they are shut (Liu et
al., "Cones: Concept Neurons in Diffusion Models for Customized Generation", 2303.05125).

Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, "Tensor"]  # by the name of a parameter


class NeuronSettings(Settings):
    """How concept neurons are found. The paper: 1000 draws, ρ = 2 · 10⁻⁵ and λ = 1, attn1 as well as attn2."""

    draws: int = Field(200, ge=1, description="gradients that the statistic adds up")
    batch: int = Field(32, ge=1, description="x_t a gradient, of the subject and as many of other images")
    rate: float = Field(2e-5, ge=0, description="ρ: how fast scales follow their gradients")
    prior: float = Field(1.0, ge=0, description="λ: weight of the loss on other images")
    share: float = Field(0.01, gt=0, lt=0.5, description="share of the keys' and values' weights that is shut")


def follow(weights: Mapping[str, Tensor], gradients: Sequence[Tensor], statistic: Weights, rate: float) -> None:
    """Add θ ⊙ ∂L/∂θ to S, and scale θ by 1 − ρ θ ⊙ ∂L/∂θ, both in place: a step of the paper's algorithm.

    θ ⊙ ∂L/∂θ is the gradient of log |θ|: where it is positive, a smaller θ of the same sign lowers the loss.
    """
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        slope = weight * gradient
        statistic[name] += slope
        weight -= rate * weight * slope


def largest(statistic: Mapping[str, Tensor], share: float) -> Weights:
    """Where S is largest, and above 0: flat positions (n,) int32 by weight, ``share`` of all at most.

    The paper shuts S > τ; its τ is of one model and loss, a quantile is of any.
    """
    import torch

    every = torch.cat([each.flatten() for each in statistic.values()])
    least = every.topk(max(1, round(share * len(every)))).values[-1]
    return {name: ((each >= least) & (each > 0)).flatten().nonzero()[:, 0].int() for name, each in statistic.items()}


def union(neurons: Sequence[Weights]) -> Weights:
    """Of several subjects, as the paper has it: what is shut for one is shut for all."""
    import torch

    return {name: torch.cat([each[name] for each in neurons]).unique() for name in neurons[0]}


def shut(weights: Mapping[str, Tensor], neurons: Mapping[str, Tensor]) -> None:
    """θ → 0 there, in place."""
    for name, positions in neurons.items():
        weights[name].view(-1)[positions.long()] = 0
