"""One step of a rectified flow as a Gaussian policy: an SDE with the flow's own marginals (Liu et al., "Flow-GRPO:
Training Flow Matching Models via Online RL", 2505.05470, section 4.2), or coefficient-preserving sampling (Wang and Yu,
2509.05952)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from policies.diffusion.schedule import Schedule, over


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """x_t = (1 − t) x_0 + t ε, and the network predicts the velocity v = ε − x_0.

    ``times`` (T + 1,) float64: t, falling from 1 to 0. ``eta`` (T,) float64: in each step the noise level a of
    σ_t = a √(t / (1 − t)). The last step follows the flow itself and has no density: its noise would stay in the image.
    """

    times: Tensor
    eta: Tensor

    @property
    def sigma(self) -> Tensor:
        """σ_t √Δt of each step."""
        sigma = self._diffusion() * (self.times[:-1] - self.times[1:]).sqrt()
        return torch.where(self.times[1:] > 0, sigma, 0.0)

    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """x_t − [v + σ_t² / 2t · (x_t + (1 − t) v)] Δt, a step of Euler and Maruyama."""
        x_t, v = latents.double(), network_output.double()
        diffusion = torch.where(self.times[1:] > 0, self._diffusion(), 0.0)
        start, span, noise = (
            over(table, steps, latents) for table in (self.times[:-1], self.times[:-1] - self.times[1:], diffusion)
        )
        return x_t - (v + noise**2 / (2 * start) * (x_t + (1 - start) * v)) * span

    def denoised(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """x̂_0 = x_t − t v."""
        return latents.double() - over(self.times, steps, latents) * network_output.double()

    def predicting(self, latents: Tensor, denoised: Tensor, steps: Tensor) -> Tensor:
        """v = (x_t − x_0) / t."""
        return (latents.double() - denoised) / over(self.times, steps, latents)

    @property
    def level(self) -> Tensor:
        """log((1 − t) / t)."""
        return (1 - self.times[:-1]).log() - self.times[:-1].log()

    def target(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """v = ε − x_0."""
        return noise - clean

    def diffuse(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """(1 − t) x_0 + t ε."""
        time = over(self.times, steps, clean)
        return (1 - time) * clean + time * noise

    def _diffusion(self) -> Tensor:
        """σ_t (T,). At t = 1 it has a pole: there 1 − t is that of the next time, as in the paper's code."""
        start = self.times[:-1]
        away = 1 - torch.where(start == 1, self.times[min(1, len(start) - 1)], start)
        return self.eta * (start / away.clamp(min=1e-6)).sqrt()


class PreservingSchedule(FlowSchedule):
    """Coefficient-preserving sampling: x_{t−Δ} = (1 − t′) x̂_0 + t′ (cos(ηπ/2) ε̂ + sin(ηπ/2) z), with t′ the next time.

    Image and noise have the coefficients that the flow gives them at t′, so no noise is left over in a few steps, and
    none has to be taken out of the last one: there t′ is 0. ``eta`` 1 noises x̂_0 anew.
    """

    @property
    def sigma(self) -> Tensor:
        """t′ sin(ηπ/2)."""
        return self.times[1:] * torch.sin(self.eta * torch.pi / 2)

    def mean(self, latents: Tensor, network_output: Tensor, steps: Tensor) -> Tensor:
        """(1 − t′) x̂_0 + t′ cos(ηπ/2) ε̂, with ε̂ = x_t + (1 − t) v."""
        tables = self.times[:-1], self.times[1:], torch.cos(self.eta * torch.pi / 2)
        start, end, left = (over(table, steps, latents) for table in tables)
        epsilon = latents.double() + (1 - start) * network_output.double()
        return (1 - end) * self.denoised(latents, network_output, steps) + end * left * epsilon
