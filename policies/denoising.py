"""One denoising step as a Gaussian policy: its mean, its standard deviation and its log-probability.

DDIM with noise scale η (Song et al., "Denoising Diffusion Implicit Models", 2010.02502, equations 12 and 16). The
network's output enters in the precision it was computed in; everything after it is float64, because at small σ the
difference x_{t−1} − μ cancels more digits than float32 has. The cost is a few element-wise operations a step.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class DenoisingSchedule:
    """The T steps of a sampler, noisiest first.

    ``timesteps`` (steps,) int64: the network's time input. ``alpha`` and ``alpha_previous`` (steps,) float64: ᾱ
    before and after the step. ``eta``: DDIM's η. ``prediction_type``: what the network predicts.
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_previous: Tensor
    eta: float
    prediction_type: PredictionType

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of each step (steps,), DDIM equation 16."""
        variance = (1 - self.alpha_previous) / (1 - self.alpha) * (1 - self.alpha / self.alpha_previous)
        return self.eta * variance.clamp(min=0).sqrt()

    @property
    def stochastic_steps(self) -> Tensor:
        """Indices of the steps that have a density. A last step that lands on ᾱ = 1 has σ = 0 and none."""
        return torch.nonzero(self.sigma > 0).flatten()

    def to(self, device: torch.device) -> "DenoisingSchedule":
        """The same schedule with its tables on ``device``."""
        return DenoisingSchedule(
            self.timesteps.to(device),
            self.alpha.to(device),
            self.alpha_previous.to(device),
            self.eta,
            self.prediction_type,
        )

    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """μ(x_t) of the step, float64.

        ``latents`` x_t and ``network_output`` (batch, channels, height, width); ``steps`` (batch,) indices into the
        schedule, which may differ within the batch.
        """
        x_t, output = latents.double(), network_output.double()
        alpha, alpha_previous, sigma = (
            table[steps].view(-1, 1, 1, 1) for table in (self.alpha, self.alpha_previous, self.sigma)
        )
        beta = 1 - alpha
        if self.prediction_type == "epsilon":
            epsilon = output
            x_0 = (x_t - beta.sqrt() * epsilon) / alpha.sqrt()
        elif self.prediction_type == "v_prediction":
            epsilon = alpha.sqrt() * output + beta.sqrt() * x_t
            x_0 = alpha.sqrt() * x_t - beta.sqrt() * output
        else:
            x_0 = output
            epsilon = (x_t - alpha.sqrt() * x_0) / beta.sqrt()
        direction = (1 - alpha_previous - sigma**2).clamp(min=0).sqrt()
        return alpha_previous.sqrt() * x_0 + direction * epsilon

    def log_prob(
        self,
        latents: Tensor,
        next_latents: Tensor,
        network_output: Tensor,
        steps: Tensor,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """log N(x_{t−1}; μ(x_t), σ_t² I) in nats, float64 (batch,), averaged or summed over channels and pixels.

        Differentiable in ``network_output``. ``steps`` must be stochastic.
        """
        sigma = self.sigma[steps].view(-1, 1, 1, 1)
        z = (next_latents.double() - self.mean(latents, network_output, steps)) / sigma
        density = -0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        flat = density.flatten(start_dim=1)
        return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)
