"""The DDPO objectives (Black et al., "Training Diffusion Models with Reinforcement Learning", 2305.13301).

Denoising is a decision process: state (prompt, x_t, t), action x_{t−1}, policy N(μ_θ(x_t, t, prompt), σ_t² I), one
reward at the end. A *transition* is one (image, denoising step) pair.
"""

from typing import TYPE_CHECKING

from policies.rl.objectives import Algorithm

if TYPE_CHECKING:
    from torch import Tensor

    from policies.rl.rollouts import Objective, Rollouts
    from policies.rl.settings import TrainingSettings


def importance_sampling_loss(
    log_prob: "Tensor", old_log_prob: "Tensor", advantage: "Tensor", clip_range: float
) -> "Tensor":
    """DDPO_IS, equation 6 with PPO's clipping: the loss of each transition (batch,)."""
    import torch

    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def decoupled_loss(
    log_prob: "Tensor", proximal: "Tensor", behaviour: "Tensor", advantage: "Tensor", clip_range: float
) -> "Tensor":
    """The same where other weights drew the images than the step began with (Hilton et al., 2110.00641, equation 5):

    (p_proximal / p_behaviour) · max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) with ρ = p_θ / p_proximal, of each transition. The
    clip holds θ near where it began, the weight corrects for who drew. It is the loss above where both are one.
    """
    import torch

    weight = torch.exp(proximal - behaviour)
    return importance_sampling_loss(log_prob, proximal, weight * advantage, clip_range)


def score_function_loss(log_prob: "Tensor", advantage: "Tensor") -> "Tensor":
    """DDPO_SF, equation 5: the loss of each transition (batch,); its gradient is REINFORCE's."""
    return -advantage * log_prob


class PolicyGradient(Algorithm):
    """An objective on stored transitions, plus ``kl_weight`` · KL(π_θ ‖ π_reference) of each step (as in DPOK, Fan et
    al., 2305.16381)."""

    @staticmethod
    def loss(
        log_prob: "Tensor", proximal: "Tensor", behaviour: "Tensor", advantage: "Tensor", clip_range: float
    ) -> "Tensor":
        """Of each transition (batch,), given its log p under the weights that learn, those that the step began with and
        those that drew."""
        raise NotImplementedError

    @classmethod
    def objective(cls, rollouts: "Rollouts", settings: "TrainingSettings") -> "Objective":
        """See :class:`Algorithm`."""
        schedule, reduction = rollouts.schedule, rollouts.reduction

        def objective(images: "Tensor", steps: "Tensor") -> "tuple[Tensor, Tensor]":
            before, after = rollouts.latents[images, steps], rollouts.latents[images, steps + 1]
            anchor = rollouts.reference(before, steps, images) if settings.kl_weight else None
            start = rollouts.proximal(before, steps, images) if rollouts.proximal else None
            output = rollouts.network(before, steps, images)
            new = schedule.log_prob(before, after, output, steps, reduction)
            drawn, advantage = rollouts.log_probs[images, steps].to(new), rollouts.advantage[images].to(new)
            old = drawn if rollouts.proximal is None else new.detach()
            if start is not None:
                old = schedule.log_prob(before, after, start, steps, reduction)
            drawn = old if rollouts.recomputed else drawn
            loss = cls.loss(new, old, drawn, advantage, settings.clip_range)
            if anchor is not None:
                loss = loss + settings.kl_weight * schedule.divergence(before, output, anchor, steps, reduction)
            return loss, (new - old).detach()

        return objective


class ImportanceSampling(PolicyGradient):
    """DDPO_IS, decoupled where other weights drew."""

    names = ("importance_sampling",)
    clips_ratio = True
    loss = staticmethod(decoupled_loss)


class ScoreFunction(PolicyGradient):
    """DDPO_SF, which is on-policy."""

    names = ("score_function",)
    on_policy = True

    @staticmethod
    def loss(
        log_prob: "Tensor", proximal: "Tensor", behaviour: "Tensor", advantage: "Tensor", clip_range: float
    ) -> "Tensor":
        """REINFORCE's."""
        return score_function_loss(log_prob, advantage)
