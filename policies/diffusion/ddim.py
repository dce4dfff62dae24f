"""One step of a DDIM sampler as a Gaussian policy, with noise scale η (Song et al., "Denoising Diffusion Implicit
Models", 2010.02502, equations 12 and 16)."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from policies.diffusion.schedule import Schedule, over

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class DenoisingSchedule(Schedule):
    """``alpha`` and ``alpha_previous`` (T,) float64: ᾱ before and after the step. ``eta``: DDIM's η. ``clip``: the mean
    is that of an x̂_0 within ± this.

    ``timesteps`` are int64. A last step that lands on ᾱ = 1 has σ = 0 and no density.
    """

    alpha: Tensor
    alpha_previous: Tensor
    eta: float
    prediction_type: PredictionType
    clip: float = math.inf

    @property
    def sigma(self) -> Tensor:
        """DDIM equation 16."""
        variance = (1 - self.alpha_previous) / (1 - self.alpha) * (1 - self.alpha / self.alpha_previous)
        return self.eta * variance.clamp(min=0).sqrt()

    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """DDIM equation 12."""
        x_0, epsilon = self._parts(latents, network_output, steps)
        alpha_previous, sigma = (over(table, steps, latents) for table in (self.alpha_previous, self.sigma))
        direction = (1 - alpha_previous - sigma**2).clamp(min=0).sqrt()
        return alpha_previous.sqrt() * x_0.clamp(-self.clip, self.clip) + direction * epsilon

    def denoised(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """x̂_0."""
        return self._parts(latents, network_output, steps)[0]

    def diffuse(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """√ᾱ x_0 + √(1 − ᾱ) ε."""
        alpha = over(self.alpha, steps, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """ε, v = √ᾱ ε − √(1 − ᾱ) x_0 (Salimans and Ho, 2202.00512), or x_0."""
        alpha = over(self.alpha, steps, clean)
        if self.prediction_type == "v_prediction":
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return noise if self.prediction_type == "epsilon" else clean

    def _parts(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """x̂_0 and ε̂, of which x_t consists."""
        x_t, output, alpha = latents.double(), network_output.double(), over(self.alpha, steps, latents)
        beta = 1 - alpha
        if self.prediction_type == "epsilon":
            return (x_t - beta.sqrt() * output) / alpha.sqrt(), output
        if self.prediction_type == "v_prediction":
            return alpha.sqrt() * x_t - beta.sqrt() * output, alpha.sqrt() * output + beta.sqrt() * x_t
        return output, (x_t - alpha.sqrt() * output) / beta.sqrt()
