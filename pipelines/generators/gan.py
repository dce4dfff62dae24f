"""An unconditional GAN of small images with the objective of R3GAN (Huang et al., 2501.05441).

The critic compares real images with generated ones, and its slope is penalised at both (R1 and R2): together they make
the game converge and modes hard to drop. Weights are not averaged over steps: that smooths, a hidden bias in a loop.
A style network maps the latent z to w. A sampling bias λ is the factor of StyleGAN's truncation of w, as in MAD
(2307.01850), but toward the nearest of several cluster centres, as the mean of all w may show nothing real where
images fall into classes (multi-modal truncation, Mokady et al., 2202.12211; they measure nearness by LPIPS, this in w).
"""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from pipelines.generators import Generator, Seeds
from policies.loops.samples import Samples
from policies.rl.health import check_drawn
from policies.rl.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

SAMPLING_BATCH = 512
CENTRES, CENTRE_DRAWS = 16, 4096


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


class GanGenerator(Generator):
    """Fitted networks. One universe of uint8 images (1, n, height, width, channels), labels neither used nor given."""

    names = ("gan",)
    schema = GanSettings
    least_side = 8
    extrapolates = True
    updates = "steps"

    def __init__(self, settings: GanSettings, networks: Any) -> None:
        self.settings, self.networks = settings, networks.requires_grad_(False)

    @classmethod
    def fit(
        cls, settings: GanSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s networks, on batches drawn in proportion to ``data.weights``."""
        import torch
        from torch.optim import Adam
        from torch.optim.lr_scheduler import CosineAnnealingLR

        from pipelines.measures.evaluator import to_network_input

        (seed,), (images,) = seeds, data.values
        networks = _networks(settings, images.shape[1:], seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        networks.to(device)
        critic = list(networks.critic.parameters())
        generator = [*networks.style.parameters(), *networks.synthesis.parameters()]
        # Without momentum, as the opponent turns the gradient from step to step.
        optimizer = Adam(networks.parameters(), settings.learning_rate, betas=(0.0, 0.99), fused=True)
        schedule = CosineAnnealingLR(optimizer, settings.steps)
        inputs, stream = to_network_input(images), torch.Generator().manual_seed(seed)
        weights = torch.ones(len(images)) if data.weights is None else torch.from_numpy(data.weights)
        for _ in range(settings.steps):
            chosen = torch.multinomial(weights, settings.batch_size, replacement=True, generator=stream)
            real = inputs[chosen].to(device)
            latents = torch.randn(len(real), settings.latent, generator=stream).to(device)
            fake = networks.synthesis(networks.style(latents))
            _update(optimizer, critic, critic_loss(networks.critic, real, fake.detach(), settings.gradient_penalty))
            _update(optimizer, generator, pairing_loss(networks.critic(fake), networks.critic(real)))
            schedule.step()
        _settle_centres(networks, stream)
        return cls(settings, networks)

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images; ``bias`` is the truncation factor: 1 is none, toward 0 only 16 images are left."""
        import torch

        (seed,) = seeds
        latents = torch.randn(count, self.settings.latent, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            drawn = torch.cat([_truncated(self.networks, batch, bias) for batch in latents.split(SAMPLING_BATCH)])
        check_drawn(bool(drawn.isfinite().all()))
        return Samples(((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()[None])

    def fitted(self) -> "dict[str, Tensor]":
        """Those of all three networks."""
        return {name: value.detach().cpu().clone() for name, value in self.networks.named_parameters()}

    def holding(self, weights: "Mapping[str, Tensor]") -> Self:
        """The centres of w are found anew."""
        import torch

        networks = deepcopy(self.networks)
        networks.load_state_dict(dict(weights), strict=False)
        _settle_centres(networks, torch.Generator().manual_seed(0))
        return type(self)(self.settings, networks)

    def save(self, directory: Path) -> None:
        """All networks, so that training can go on, and ``config.json`` with the settings and the images' shape."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.networks.state_dict(), directory / "model.safetensors")
        config = {"settings": self.settings.model_dump(), "shape": self.networks.shape}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""
        from safetensors.torch import load_file

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        settings = GanSettings(**config["settings"])
        networks = _networks(settings, config["shape"], seed=0)
        networks.load_state_dict(load_file(directory / "model.safetensors"))
        return cls(settings, networks.to(device))

    @classmethod
    def side_multiple(cls, settings: GanSettings) -> int:
        """Resolutions are halved twice."""
        return 4


def _networks(settings: GanSettings, shape: Sequence[int], seed: int) -> Any:
    """Untrained networks for images of ``shape`` (height, width, channels).

    ``style``: z → w, both (n, latent). ``synthesis``: w → images (n, channels, height, width) in [-1, 1].
    ``critic``: images → how real they look (n, 1), on no scale. ``centres`` (16, latent): k-means of w.
    """
    import torch
    from torch import nn

    height, width, channels = shape
    latent, fine, coarse, leaky = settings.latent, settings.width, 2 * settings.width, nn.LeakyReLU(0.2)
    grid = coarse, height // 4, width // 4
    networks: Any = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        up = nn.ConvTranspose2d(coarse, fine, 4, 2, 1), leaky, nn.ConvTranspose2d(fine, channels, 4, 2, 1), nn.Tanh()
        down = nn.Conv2d(channels, fine, 4, 2, 1), leaky, nn.Conv2d(fine, coarse, 4, 2, 1), leaky, nn.Flatten()
        networks.style = nn.Sequential(nn.Linear(latent, latent), leaky, nn.Linear(latent, latent))
        networks.synthesis = nn.Sequential(leaky, nn.Linear(latent, math.prod(grid)), nn.Unflatten(1, grid), leaky, *up)
        networks.critic = nn.Sequential(*down, nn.Linear(math.prod(grid), 2 * coarse), leaky, nn.Linear(2 * coarse, 1))
    networks.register_buffer("centres", torch.zeros(CENTRES, latent))
    networks.shape = tuple(shape)
    return networks


def _settle_centres(networks: Any, random: "torch.Generator") -> None:
    """Find the centres of w."""
    import torch
    from sklearn.cluster import KMeans

    known = networks.centres
    latents = torch.randn(CENTRE_DRAWS, known.shape[1], generator=random).to(known.device)
    styles = networks.style(latents).detach()
    check_drawn(bool(styles.isfinite().all()))
    clusters = KMeans(CENTRES, n_init=1, random_state=random.initial_seed() % 2**32).fit(styles.cpu().numpy())
    networks.centres = torch.from_numpy(clusters.cluster_centers_).to(known.device)


def _truncated(networks: Any, latents: "Tensor", factor: float) -> "Tensor":
    """The images of c + ``factor`` · (w − c), c being the centre nearest to w."""
    import torch

    styles = networks.style(latents.to(networks.centres.device))
    nearest = networks.centres[torch.cdist(styles, networks.centres).argmin(dim=1)]
    return networks.synthesis(torch.lerp(nearest, styles, factor))


def _update(optimizer: "Optimizer", player: "list[nn.Parameter]", loss: "Tensor") -> None:
    """One step of one player; the optimizer leaves the other, which gets no gradient, as it is."""
    optimizer.zero_grad()
    loss.backward(inputs=player)
    optimizer.step()
