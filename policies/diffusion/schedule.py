"""A sampler's steps as Gaussian policies, whatever the family: means and deviations are the subclasses' own.

The network's output enters in the precision it was computed in; everything after it is float64, because at small σ the
difference x_{t−1} − μ cancels more digits than float32 has. The cost is a few element-wise operations a step.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


def over(table: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    """The entries of ``table`` (T,) at ``steps`` (batch,), shaped to be multiplied with ``like`` (batch, …)."""
    return table[steps].view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Schedule(ABC):
    """The T steps of a sampler, noisiest first: step s takes x_t to x_{t−1} ~ N(μ(x_t), σ_s² I).

    ``timesteps`` (T,): the network's time input. In all methods ``latents`` x_t and ``network_output`` are
    (batch, channels, height, width) and ``steps`` (batch,) are indices into the schedule, which may differ.
    """

    timesteps: Tensor

    @property
    @abstractmethod
    def sigma(self) -> Tensor:
        """Standard deviation of each step (T,) float64; 0 where a step is deterministic."""

    @abstractmethod
    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """μ(x_t) of the step, float64."""

    @abstractmethod
    def denoised(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """The x_0 that the network's output stands for, float64."""

    @abstractmethod
    def predicting(self, latents: Tensor, denoised: Tensor, steps: Tensor) -> Tensor:
        """The network's output that stands for x_0 ``denoised``: the inverse of :meth:`denoised`."""

    @property
    @abstractmethod
    def level(self) -> Tensor:
        """λ (T,) float64 at the start of each step: the logarithm of the ratio of x_0's coefficient to the noise's."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the network was trained to answer to :meth:`diffuse` of the same."""

    @abstractmethod
    def diffuse(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of the forward process: ``clean`` x_0 and ``noise`` mixed as they are at the start of the step."""

    def second_order(self, latents: Tensor, output: Tensor, step: int, before: Tensor) -> Tensor:
        """The output whose x̂_0 is extrapolated from that of the step before, ``before``: what :meth:`mean` makes of it
        is DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2), where the step has no noise. The last step is of first
        order, as it is there."""
        if step + 1 == len(self.timesteps):
            return output
        index, (last, here, ahead) = torch.full((len(latents),), step), self.level[step - 1 : step + 2].tolist()
        index, share = index.to(latents.device), (ahead - here) / (here - last) / 2
        found = self.denoised(latents, output, index)
        return self.predicting(latents, found + share * (found - before), index)

    @property
    def stochastic_steps(self) -> Tensor:
        """Indices of the steps that have a density."""
        return torch.nonzero(self.sigma > 0).flatten()

    def to(self, device: torch.device) -> Self:
        """The same schedule with its tables on ``device``."""
        tables = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tables.items() if isinstance(v, Tensor)})

    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        network_output: Tensor,
        steps: Tensor,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """log N(x_{t−1}; μ(x_t), σ_t² I) in nats, float64 (batch,), averaged or summed over channels and pixels.

        Differentiable in ``network_output``. ``steps`` must be stochastic.
        """
        sigma = over(self.sigma, steps, latents)
        z = (next_latents.double() - self.mean(latents, network_output, steps)) / sigma
        return _reduced(-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi), reduction)

    def divergence(
        self,
        latents: Tensor,
        network_output: Tensor,
        other_output: Tensor,
        steps: Tensor,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """KL of the steps that two outputs of the network make, in nats (batch,): ‖μ − μ′‖² / 2σ², as σ is the same."""
        apart = self.mean(latents, network_output, steps) - self.mean(latents, other_output, steps)
        return _reduced(0.5 * (apart / over(self.sigma, steps, latents)) ** 2, reduction)


def _reduced(values: Tensor, reduction: Reduction) -> Tensor:
    flat = values.flatten(start_dim=1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)
