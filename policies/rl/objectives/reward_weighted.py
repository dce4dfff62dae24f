"""Reward-weighted regression, on the forward process: images are noised anew, no density of the sampler is needed.

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
