"""CoDi's maths (Tang et al., "Any-to-Any Generation via Composable Diffusion", 2305.11846): conditions of several
modalities mixed, and what brings modalities together that were never seen together. It knows no modality."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from policies.rl.settings import Settings


class TrainingSettings(Settings):
    """How something of the study is trained."""

    steps: int = Field(ge=1, description="updates")
    batch: int = Field(64, ge=2, description="examples of an update; of joint attention a multiple of 16")
    rate: float = Field(2e-3, gt=0, description="learning rate of AdamW at its peak")


def mixed(conditions: list[tuple[Tensor, float]]) -> Tensor:
    """Σ mᵢ Cᵢ / Σ mᵢ of conditions of one shape and their weights mᵢ ≥ 0 (section 3.2). Raises ValueError."""
    total = sum(weight for _, weight in conditions)
    if total <= 0 or any(weight < 0 for _, weight in conditions):
        raise ValueError(f"weights of conditions are at least 0, and not all 0: {[each for _, each in conditions]}")
    return torch.stack([weight / total * each for each, weight in conditions]).sum(dim=0)


def unit(vectors: Tensor) -> Tensor:
    """Of length 1 over all dimensions but the first."""
    flat = functional.normalize(vectors.flatten(1), dim=1)
    return flat.view(vectors.shape)


def contrast(ones: Tensor, others: Tensor, kinds: Tensor, temperature: float, group: int | None = None) -> Tensor:
    """The symmetric InfoNCE loss (2103.00020, figure 3; CoDi's equation 4) of pairs ``ones``, ``others`` (n, …), by
    cosines. Pairs of the same ``kinds`` (n,) are no negatives of one another: they share the probability.

    Pairs are told apart within groups of so many, one after the other. What is noised has to be of one time in a group:
    else it is by their times, which the networks are told, that pairs are known, and by nothing else."""
    many = group or len(ones)
    one, other = (unit(each).flatten(1).unflatten(0, (-1, many)) for each in (ones, others))
    logits = one @ other.transpose(1, 2) / temperature
    alike = (kinds.view(-1, many, 1) == kinds.view(-1, 1, many)).float()
    target = alike / alike.sum(dim=2, keepdim=True)
    there, back = (-(target * each.log_softmax(dim=2)).sum(dim=2).mean() for each in (logits, logits.transpose(1, 2)))
    return (there + back) / 2


def where_decided(shares: Tensor) -> Tensor:
    """Times in [0, 1], rising, of ``shares`` in [0, 1] of them: three quarters lie from .15 to .65, where on a linear
    schedule it is decided what is drawn. Before, nothing is known that another stream could be told, and after that
    nothing is open."""
    low, middle, high = shares * 1.5, 0.15 + (shares - 0.1) * (0.5 / 0.75), 0.65 + (shares - 0.85) * (0.35 / 0.15)
    return torch.where(shares < 0.1, low, torch.where(shares < 0.85, middle, high))


def agreement_by_chance(ones: Tensor, others: Tensor, kinds: int) -> float:
    """How often two lists of classes (n,) would agree if they were paired at random: Σ p(k) q(k)."""
    counts = [torch.bincount(each, minlength=kinds).double() / len(each) for each in (ones, others)]
    return float((counts[0] * counts[1]).sum())
