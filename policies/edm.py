"""Diffusion and consistency models of pixels, parametrised by σ: x = x_0 + σ z.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2206.00364); Song et al.,
"Consistency Models" (CM, 2303.01469); Song and Dhariwal, "Improved Techniques for Training Consistency Models" (iCT,
2310.14189). Scalings and times are those of diffusers' ``CMStochasticIterativeScheduler``, which draws with what is
trained here. σ is a tensor (batch, 1, 1, 1) or of any shape that multiplies x.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, RHO = 0.002, 80.0, 0.5, 7.0
Denoise = Callable[[Tensor, Tensor], Tensor]  # of x and σ: x_0, or what is thought of it


def karras(points: int) -> Tensor:
    """σ_1 = .002 < … < σ_N = 80 for N ``points``, even in σ^(1/7) (EDM, equation 5); float64 (N,)."""
    ends = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return torch.linspace(*ends, points, dtype=torch.float64) ** RHO


def denoised(call: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, sigma: Tensor, smallest: float = 0.0) -> Tensor:
    """c_skip x + c_out F(c_in x, 250 ln σ), with F the network's ``call`` of an input and times (batch,).

    ``smallest`` 0 makes it EDM's denoiser D (its table 1), and σ_min a consistency function f, which is x itself at
    σ_min (CM, appendix C). The times are diffusers', a thousand times EDM's.
    """
    above, spread = sigma - smallest, (sigma**2 + SIGMA_DATA**2).sqrt()
    skip, out = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2), above * SIGMA_DATA / spread
    time = (250 * sigma.double().log()).flatten().to(noisy.dtype)
    return skip * noisy + out * call(noisy / spread, time)


def denoising_weight(sigma: Tensor) -> Tensor:
    """λ(σ) of ‖D − x_0‖²: it makes the network's own error count the same at every σ (EDM, table 1)."""
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


def lognormal_sigmas(count: int, random: torch.Generator) -> tuple[Tensor]:
    """σ (count,) to train a denoiser at, ln σ ~ N(−1.2, 1.2²) (EDM, table 1)."""
    return ((torch.randn(count, generator=random) * 1.2 - 1.2).exp(),)


def step(denoise: Denoise, noisy: Tensor, sigma: Tensor, after: Tensor, heun: bool = True) -> Tensor:
    """From x at σ to x at ``after`` on the probability-flow ODE dx/dσ = (x − D)/σ: a step of Heun in two calls, or one
    of Euler in one (EDM, algorithm 1)."""
    slope = (noisy - denoise(noisy, sigma)) / sigma
    moved = noisy + (after - sigma) * slope
    if not heun:
        return moved
    return noisy + (after - sigma) * (slope + (moved - denoise(moved, after)) / after) / 2


def solve(denoise: Denoise, noise: Tensor, steps: int, heun: bool) -> Tensor:
    """x at σ_min of the trajectory that begins at 80 ``noise``, in so many steps of the Karras grid."""
    sigmas = karras(steps + 1).flip(0).to(noise)
    noisy = noise * SIGMA_MAX
    for sigma, after in pairwise(sigmas):
        noisy = step(denoise, noisy, sigma, after, heun)
    return noisy


def intervals(update: int, updates: int, first: int, last: int) -> int:
    """Steps of the grid at an update from 0: ``first``, doubled at even distances until it is ``last`` (iCT, section
    3.4, with both ends so often that each lasts equally long)."""
    doublings = math.ceil(math.log2(last / first))
    return min(first * 2 ** (update * (doublings + 1) // updates), last)


def lognormal_shares(sigmas: Tensor, mean: float = -1.1, spread: float = 2.0) -> Tensor:
    """The probability of each interval of the grid ``sigmas`` (N,), that ln σ ~ N(−1.1, 2²) falls into it; (N − 1,)
    that sum to 1 (iCT, equation 10)."""
    below = torch.erf((sigmas.log() - mean) / (spread * 2**0.5))
    return below.diff() / (below[-1] - below[0])
