"""Consistency distillation of a latent diffusion model: Song et al., "Consistency Models" (2303.01469), in the form of
"Latent Consistency Models" (Luo et al., 2310.04378), with one scale of guidance folded into the weights.

The consistency function f takes every x_t of a trajectory of the probability-flow ODE to its x_0, in one network call.
Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from policies.diffusion.ddim import DenoisingSchedule, PredictionType

ORIGIN_STEPS = 50  # of the grid: ``original_inference_steps`` of diffusers' LCMScheduler
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0  # LCMScheduler's own


class ConsistencySettings(Settings):
    """How a pipeline is distilled."""

    learning_rate: float = Field(1e-4, gt=0, description="AdamW's at its peak, a third of the way")
    updates: int = Field(800, ge=1, description="optimiser updates")
    batch: int = Field(64, ge=1, description="x_t an update")
    skip: int = Field(1, ge=1, le=ORIGIN_STEPS, description="steps of the grid of 50 from x_t to x_t'; the paper: 1")


class Grid(NamedTuple):
    """The steps s = 0 … 49 from LCM's grid, noisiest first: from t = 20 (50 − s) − 1 (of 1000) to
    t' = max(t − 20 skip, 0).

    Both are the tables of deterministic DDIM steps (η = 0): ``here`` starts at t, ``next`` at t'.
    """

    here: DenoisingSchedule
    next: DenoisingSchedule


def grid(alphas: Tensor, prediction_type: PredictionType, skip: int = 1) -> Grid:
    """Of a model with ᾱ_t ``alphas`` (T,). Raises ValueError for fewer timesteps than the grid has."""
    import torch

    from policies.diffusion.ddim import DenoisingSchedule

    apart = len(alphas) // ORIGIN_STEPS
    if not apart:
        raise ValueError(f"{len(alphas)} timesteps are fewer than the {ORIGIN_STEPS} of a consistency model's grid")
    times = torch.arange(ORIGIN_STEPS, 0, -1) * apart - 1
    before = (times - skip * apart).clamp(min=0)
    alphas = alphas.double()
    still = torch.zeros_like(alphas[times])
    here = DenoisingSchedule(times, alphas[times], alphas[before], still, prediction_type)
    return Grid(here, DenoisingSchedule(before, alphas[before], alphas[before], still, prediction_type))


def consistency(schedule: DenoisingSchedule, latents: Tensor, output: Tensor, steps: Tensor) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x̂_0, float64, as LCMScheduler computes it of the network's ``output`` at x_t.

    At t = 0 it is x_t itself: the boundary condition. ``steps`` (batch,) are indices into ``schedule``.
    """
    from policies.diffusion.schedule import over

    time = over(schedule.timesteps, steps, latents).double() * _TIMESTEP_SCALING
    square = time**2 + _SIGMA_DATA**2
    denoised = schedule.denoised(latents, output, steps)
    return _SIGMA_DATA**2 / square * latents.double() + time / square.sqrt() * denoised


def pseudo_huber(found: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """√(‖Δ‖² + c²) − c with c = .00054 √d, the mean over a batch (Song and Dhariwal, 2310.14189, equation 7), of which
    each may have a weight: ``weights`` (batch,)."""
    apart = (found - target.detach()).flatten(1)
    constant = 0.00054 * apart.shape[1] ** 0.5
    each = (apart.square().sum(dim=1) + constant**2).sqrt() - constant
    loss: Tensor = (each if weights is None else weights * each).mean()
    return loss
