"""An unconditional GAN of small images with the objective of R3GAN (Huang et al., 2501.05441).

The critic compares real images with generated ones, and its slope is penalised at both (R1 and R2): together they make
the game converge and modes hard to drop. Weights are not averaged over steps: that smooths, a hidden bias in a loop.
A style network maps the latent z to w. A sampling bias λ is the factor of StyleGAN's truncation of w, as in MAD
(2307.01850), but toward the nearest of several cluster centres.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.adversarial import CENTRES, Adversarial, Game, Styles, activations, settle_centres
from policies.loops.samples import Samples
from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn


class GanSettings(Settings):
    """A GAN trained from scratch: its networks and their training."""

    width: int = Field(32, ge=1, description="channels at half the resolution; twice as many at a quarter")
    latent: int = Field(32, ge=1, description="dimensions of z and of w")
    steps: int = Field(800, ge=1, description="updates of the critic and of the generator in one fit")
    batch_size: int = Field(32, ge=1, description="images of an update")
    learning_rate: float = Field(8e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")
    gradient_penalty: float = Field(2.0, ge=0, description="γ of R1 and R2, for pixels in [-1, 1]")


def pairing_loss(favoured: "Tensor", other: "Tensor") -> "Tensor":
    """Mean of −log σ(favoured − other) over pairs of critic scores (n, 1): R3GAN's equation 2 with its f."""
    from torch.nn.functional import softplus

    return softplus(other - favoured).mean()


def critic_loss(critic: "nn.Module", real: "Tensor", fake: "Tensor", gradient_penalty: float) -> "Tensor":
    """Pairing loss + γ/2 (R1 + R2): the critic's mean squared slope at ``real`` and at ``fake``, both (n, …)."""
    import torch

    images = torch.cat([real, fake]).requires_grad_()
    scores = critic(images)
    (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return pairing_loss(*scores.chunk(2)) + gradient_penalty / 2 * slope.square().sum() / len(real)


class GanGenerator(Adversarial):
    """Fitted networks; labels are neither used nor given. A bias toward 0 leaves only 16 images."""

    names = ("gan",)
    schema = GanSettings

    @classmethod
    def fit(
        cls, settings: GanSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s networks, on batches drawn in proportion to ``data.weights``."""
        import torch

        from pipelines.measures.evaluator import to_network_input

        (seed,), (images,) = seeds, data.values
        known = {"shape": list(images.shape[1:])}
        networks = cls.build(settings, known, seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        networks.to(device)
        critic = list(networks.critic.parameters())
        generator = [*networks.style.parameters(), *networks.synthesis.parameters()]
        game = Game(networks, settings.learning_rate, settings.steps)
        inputs, stream = to_network_input(images), torch.Generator().manual_seed(seed)
        weights = torch.ones(len(images)) if data.weights is None else torch.from_numpy(data.weights)
        for _ in range(settings.steps):
            chosen = torch.multinomial(weights, settings.batch_size, replacement=True, generator=stream)
            real = inputs[chosen].to(device)
            z = torch.randn(len(real), settings.latent, generator=stream).to(device)
            fake = networks.synthesis(networks.style(z))
            game.step(critic, critic_loss(networks.critic, real, fake.detach(), settings.gradient_penalty))
            game.step(generator, pairing_loss(networks.critic(fake), networks.critic(real)))
            game.end_round()
        settle_centres(networks, stream)
        return cls(settings, networks, **known)

    @classmethod
    def build(cls, settings: GanSettings, known: Mapping[str, Any], seed: int) -> Any:
        """``style``: z → w, both (n, latent). ``synthesis``: w → images (n, channels, height, width) in [-1, 1].
        ``critic``: images → how real they look (n, 1), on no scale. ``centres`` (16, latent): k-means of w."""
        import torch
        from torch import nn

        height, width, channels = known["shape"]
        latent, fine, coarse, leaky = settings.latent, settings.width, 2 * settings.width, nn.LeakyReLU(0.2)
        grid = coarse, height // 4, width // 4
        networks: Any = nn.Module()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            up = nn.ConvTranspose2d(coarse, fine, 4, 2, 1), leaky, nn.ConvTranspose2d(fine, channels, 4, 2, 1)
            down = nn.Conv2d(channels, fine, 4, 2, 1), leaky, nn.Conv2d(fine, coarse, 4, 2, 1), leaky, nn.Flatten()
            networks.style = nn.Sequential(nn.Linear(latent, latent), leaky, nn.Linear(latent, latent))
            begin = nn.Linear(latent, math.prod(grid)), nn.Unflatten(1, grid)
            last = nn.Linear(math.prod(grid), 2 * coarse), leaky, nn.Linear(2 * coarse, 1)
            networks.synthesis = nn.Sequential(leaky, *begin, leaky, *up, nn.Tanh())
            networks.critic = nn.Sequential(*down, *last)
        networks.register_buffer("centres", torch.zeros(CENTRES, latent))
        return networks

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Features at a quarter and at half the resolution."""
        return activations(self.networks.synthesis, styles.w)
