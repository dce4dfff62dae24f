"""Factorised diffusion distillation: a student learns from two teachers, of whom neither can do its task.

Singer et al., "Video Editing via Factorized Diffusion Distillation" (2403.09334), section 3. One teacher edits images,
the other draws videos; both look at what the student made in a few steps, each by score distillation (SDS; Poole et
al., 2209.14988) and each through a critic. No edited video is needed. Importable without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from policies.diffusion.ddim import DenoisingSchedule


class AligningSettings(Settings):
    """How the student is trained. The paper: 1,500 steps at a rate of 1e-5, the last third with critics."""

    steps: int = Field(100, ge=2, description="optimiser updates")
    batch_size: int = Field(2, ge=1, description="videos of an update")
    learning_rate: float = Field(1e-3, gt=0, description="of the student, annealed to 0")
    rank: int = Field(8, ge=1, description="of its LoRA")
    calls: int = Field(3, ge=1, le=10, description="k, network calls of the student; gradients flow through the last")
    sds_weight: float = Field(2.5, ge=0, description="of score distillation beside the critics'; the paper's; 0: none")
    critic_from: float = Field(
        0.67, ge=0, le=1, description="share of the steps before critics count; the paper's; 1: none"
    )
    critic_rate: float = Field(1e-3, gt=0, description="learning rate of the critics")


def visits(total: int, calls: int, rows: int, random: Generator | None = None) -> Tensor:
    """The times (calls, rows) that the student visits, noisiest first, of ``total``: of as many equal bins of time the
    noisiest of each, or, with ``random``, any (K-bin sampling, section 3.3)."""
    import torch

    edges = (torch.arange(calls + 1) * total / calls).round().long().flip(0)[:, None]
    if random is None:
        return (edges[:-1] - 1).expand(-1, rows)
    share = torch.rand(calls, rows, generator=random)
    return edges[1:] + (share * (edges[:-1] - edges[1:])).long()


def score_distillation(
    schedule: DenoisingSchedule, clean: Tensor, noisy: Tensor, noise: Tensor, output: Tensor, times: Tensor
) -> Tensor:
    """A loss whose gradient by ``clean`` x_0 is c(t)(ε̂ − ε) / numel, c(t) = 1 − ᾱ: half the mean square of
    x_0 − sg(x_0 − c(t)(ε̂ − ε)). ``output`` is the teacher's of ``noisy`` x_t, at ``times`` (n,) of the schedule; no
    gradient goes through it."""
    from policies.diffusion.schedule import over

    alpha = over(schedule.alpha, times, clean)
    denoised = schedule.denoised(noisy, output.detach(), times)
    found = (noisy.double() - alpha.sqrt() * denoised) / (1 - alpha).sqrt()
    gradient = ((1 - alpha) * (found - noise)).to(clean).detach()
    return (clean - (clean - gradient).detach()).square().mean() / 2


def critic_loss(real: Tensor, made: Tensor) -> Tensor:
    """The hinge: mean max(0, 1 − D(real)) + mean max(0, 1 + D(made))."""
    return (1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()


def maker_loss(made: Tensor) -> Tensor:
    """−D(made). The paper prints max(0, 1 + D), which has no gradient where it is needed most, below −1."""
    return -made.mean()
