"""One step of a sampler that goes by DDIM's equation 12 as a Gaussian policy (Song et al., "Denoising Diffusion
Implicit Models", 2010.02502). DDIM, LCM's sampler and TCD's differ in the deviation, and in the times they visit."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from policies.diffusion.schedule import Schedule, over

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class DenoisingSchedule(Schedule):
    """``alpha`` and ``alpha_previous`` (T,) float64: ᾱ before and after the step; ``deviation`` (T,): σ. ``clip``: the
    mean is that of an x̂_0 within ± this. ``stock``: whether it is DDIM, whose steps diffusers' scheduler makes.

    ``timesteps`` are int64. A last step that lands on ᾱ = 1 has σ = 0 and no density.
    """

    alpha: Tensor
    alpha_previous: Tensor
    deviation: Tensor
    prediction_type: PredictionType
    clip: float = math.inf
    stock: bool = True

    @property
    def sigma(self) -> Tensor:
        """As it is given."""
        return self.deviation

    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """DDIM equation 12."""
        x_0, epsilon = self._parts(latents, network_output, steps)
        alpha_previous, sigma = (over(table, steps, latents) for table in (self.alpha_previous, self.sigma))
        direction = (1 - alpha_previous - sigma**2).clamp(min=0).sqrt()
        return alpha_previous.sqrt() * x_0.clamp(-self.clip, self.clip) + direction * epsilon

    def denoised(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """x̂_0."""
        return self._parts(latents, network_output, steps)[0]

    def predicting(self, latents: Tensor, denoised: Tensor, steps: Tensor) -> Tensor:
        """ε, v or x_0 itself."""
        alpha = over(self.alpha, steps, latents)
        epsilon = (latents.double() - alpha.sqrt() * denoised) / (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return alpha.sqrt() * epsilon - (1 - alpha).sqrt() * denoised
        return epsilon if self.prediction_type == "epsilon" else denoised

    @property
    def level(self) -> Tensor:
        """½ log(ᾱ / (1 − ᾱ))."""
        return (self.alpha / (1 - self.alpha)).log() / 2

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


def ddim_deviation(alpha: Tensor, alpha_previous: Tensor, eta: float) -> Tensor:
    """σ of DDIM, equation 16, with noise scale η."""
    variance = (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
    return eta * variance.clamp(min=0).sqrt()


def consistency_deviation(alpha_previous: Tensor) -> Tensor:
    """σ of a consistency model's sampler (2303.01469, algorithm 1; LCM, 2310.04378, algorithm 3): x̂_0 is noised anew,
    √(1 − ᾱ′), and nothing is left of ε̂. A step to ᾱ′ = 1 gives x̂_0 itself."""
    return (1 - alpha_previous).sqrt()


def tcd_deviation(alpha_previous: Tensor, alpha_between: Tensor) -> Tensor:
    """σ of strategic stochastic sampling (TCD, 2402.19159, algorithm 4): down to s = (1 − γ) t′ by DDIM without noise,
    whose ᾱ is ``alpha_between``, and up to t′ again by the forward process: √(1 − ᾱ′/ᾱ_s)."""
    return (1 - alpha_previous / alpha_between).clamp(min=0).sqrt()
