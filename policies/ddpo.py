"""The DDPO objectives (Black et al., "Training Diffusion Models with Reinforcement Learning", 2305.13301).

Denoising is a decision process: state (prompt, x_t, t), action x_{t−1}, policy N(μ_θ(x_t, t, prompt), σ_t² I), one
reward at the end. A *transition* is one (image, denoising step) pair.
"""

import torch
from torch import Tensor

from policies.rollouts import Objective, Rollouts
from policies.settings import TrainingSettings


def importance_sampling_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """DDPO_IS, equation 6 with PPO's clipping: the loss of each transition (batch,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def score_function_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """DDPO_SF, equation 5: the loss of each transition (batch,); its gradient is REINFORCE's."""
    return -advantage * log_prob


def policy_gradient(rollouts: Rollouts, settings: TrainingSettings) -> Objective:
    """Either objective on stored transitions, plus ``kl_weight`` · KL(π_θ ‖ π_reference) of each step (as in
    DPOK, Fan et al., 2305.16381)."""
    schedule, reduction = rollouts.schedule, rollouts.reduction

    def objective(images: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        before, after = rollouts.latents[images, steps], rollouts.latents[images, steps + 1]
        anchor = rollouts.reference(before, steps, images) if settings.kl_weight else None
        output = rollouts.network(before, steps, images)
        new = schedule.log_prob(before, after, output, steps, reduction)
        old, advantage = rollouts.log_probs[images, steps].to(new), rollouts.advantage[images].to(new)
        if settings.objective == "importance_sampling":
            loss = importance_sampling_loss(new, old, advantage, settings.clip_range)
        else:
            loss = score_function_loss(new, advantage)
        if anchor is not None:
            loss = loss + settings.kl_weight * schedule.divergence(before, output, anchor, steps, reduction)
        return loss, (new - old).detach()

    return objective
