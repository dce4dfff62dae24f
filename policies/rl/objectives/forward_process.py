"""Objectives on the forward process: images are noised anew, and no density of the sampler is needed.

The network is trained without guidance, as it was before; samplers may guide.
"""

from typing import TYPE_CHECKING

from policies.rl.objectives import Algorithm

if TYPE_CHECKING:
    from torch import Tensor

    from policies.rl.rollouts import Objective, Rollouts
    from policies.rl.settings import TrainingSettings


class RewardWeighted(Algorithm):
    """Reward-weighted regression, the baseline of Black et al. (2305.13301, section 4.2): the denoising loss of images
    weighted by w ∝ exp(β A), with mean 1 over the step's images."""

    names = ("reward_weighted",)
    on_forward_process = True

    @classmethod
    def objective(cls, rollouts: "Rollouts", settings: "TrainingSettings") -> "Objective":
        """See :class:`Algorithm`."""
        weight = (settings.objective_beta * rollouts.advantage).exp()
        weight = weight / weight.mean()

        def objective(images: "Tensor", steps: "Tensor") -> "tuple[Tensor, None]":
            clean, noise, mixed = rollouts.noised(images, steps)
            target = rollouts.schedule.target(clean, noise, steps)
            error = (rollouts.network(mixed, steps, images) - target) ** 2
            return weight[images] * error.double().flatten(start_dim=1).mean(dim=1), None

        return objective


class NegativeAware(Algorithm):
    """DiffusionNFT (Zheng et al., 2509.16117): r ‖x̂⁺ − x_0‖² + (1 − r) ‖x̂⁻ − x_0‖², where the outputs
    (1 − β) v_old + β v_θ and (1 + β) v_old − β v_θ lead to x̂⁺ and x̂⁻, and r = ½ + ½ clip(A, −1, 1).

    Each square is divided by its own mean absolute error, without gradient: their adaptive weights.
    """

    names = ("negative_aware",)
    on_forward_process = average_draws = True

    @classmethod
    def objective(cls, rollouts: "Rollouts", settings: "TrainingSettings") -> "Objective":
        """See :class:`Algorithm`."""
        schedule, beta = rollouts.schedule, settings.objective_beta
        optimality = 0.5 + 0.5 * rollouts.advantage.clamp(-1, 1)

        def objective(images: "Tensor", steps: "Tensor") -> "tuple[Tensor, None]":
            clean, _, mixed = rollouts.noised(images, steps)
            old = rollouts.behaviour(mixed, steps, images)
            new = rollouts.network(mixed, steps, images)

            def loss(output: "Tensor") -> "Tensor":
                error = (schedule.denoised(mixed, output, steps) - clean).flatten(start_dim=1)
                return (error**2).mean(dim=1) / error.detach().abs().mean(dim=1).clamp(min=1e-5)

            good, bad = loss((1 - beta) * old + beta * new), loss((1 + beta) * old - beta * new)
            share = optimality[images].to(good)
            return share * good + (1 - share) * bad, None

        return objective
