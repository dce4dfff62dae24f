"""MAVEN (Imran & Terzopoulos, 1906.06430): a variational GAN whose discriminators learn classes from few labels.

An encoder finds the latent of an image, and the synthesis makes images of it and of latents that are drawn; several
discriminators tell real images by their classes from both kinds. Each begins elsewhere and sees batches of its own, as
equal ones would give nothing to average. Images are drawn without being asked for a class, and labelled by the mean of
what the discriminators say. A label of −1 says that an image has none.

A latent z is its own style w. Discriminators see through noise (1606.03498), or they learn the few labels by heart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.adversarial import (
    CENTRES,
    Adversarial,
    Game,
    Styles,
    activations,
    settle_centres,
)
from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from policies.rl.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RECONSTRUCTION, DIVERGENCE = 0.1, 0.01  # weights of what is a mean over features, and of the KL
PIXEL_NOISE, HIDDEN_NOISE = 0.3, 0.5  # standard deviations of what is added to images and to activations


class MavenSettings(Settings):
    """A MAVEN trained from scratch: its networks and their training."""

    classes: int | None = Field(None, ge=2, description="number of labels; null: the data's")
    labelled: int | None = Field(
        None, ge=2, description="labels that a fit uses, evenly of all classes and at random; null: all that there are"
    )
    discriminators: int = Field(3, ge=1, le=32, description="networks that judge and classify")
    feedback: Literal["mean", "random"] = Field("mean", description="to the generator: of all, or of one at random")
    width: int = Field(16, ge=1, description="channels at half the resolution; twice as many at a quarter")
    latent: int = Field(32, ge=1, description="dimensions of z")
    steps: int = Field(600, ge=1, description="updates of each player in one fit")
    batch_size: int = Field(32, ge=1, description="images of an update, and as many labelled ones")
    learning_rate: float = Field(2e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")


class Maven(Adversarial):
    """Fitted networks; samples have the labels that it gives them itself. A bias toward 0 leaves only 16 images."""

    names = ("maven",)
    schema = MavenSettings
    conditional = True
    metrics = (*Adversarial.metrics, "label_accuracy")

    @classmethod
    def fit(
        cls, settings: MavenSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s networks, on batches drawn in proportion to ``data.weights``.

        Raises ValueError if no image has a label, or one has a label of no class.
        """
        import torch

        from pipelines.measures.evaluator import to_network_input

        (seed,), (images,) = seeds, data.values
        weights = np.ones(len(images)) if data.weights is None else data.weights
        labels = np.full(len(images), -1) if data.labels is None else data.labels[0]
        rows = chosen_labels(np.where(weights > 0, labels, -1), settings.labelled, seed)
        if not len(rows):
            raise ValueError("family maven learns from labels, and no image has one")
        classes = start.known["classes"] if start else settings.classes or int(labels.max()) + 1
        if labels.max() >= classes:
            raise ValueError(f"label {labels.max()} is none of the {classes} classes: set classes higher")
        known = {"shape": list(images.shape[1:]), "classes": classes}
        networks = cls.build(settings, known, seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        networks.to(device)
        stream, inputs, targets = (
            torch.Generator().manual_seed(seed),
            to_network_input(images),
            torch.from_numpy(labels),
        )
        mass = torch.from_numpy(weights)

        def batch(among: "Tensor") -> "tuple[Tensor, Tensor]":
            chosen = among[torch.multinomial(mass[among], settings.batch_size, replacement=True, generator=stream)]
            return inputs[chosen].to(device), targets[chosen].to(device)

        _play(
            networks, settings, lambda: batch(torch.arange(len(images))), lambda: batch(torch.from_numpy(rows)), stream
        )
        settle_centres(networks, stream)
        return cls(settings, networks, **known)

    @classmethod
    def build(cls, settings: MavenSettings, known: Mapping[str, Any], seed: int) -> Any:
        """``encoder``: images (n, channels, height, width) in [-1, 1] → mean and log variance of z, (n, 2 · latent).
        ``style``: z as it is. ``synthesis``: z → images. ``discriminators``: each images → logits (n, classes)."""
        import torch
        from torch import nn

        height, width, channels = known["shape"]
        latent, fine, coarse, leaky = settings.latent, settings.width, 2 * settings.width, nn.LeakyReLU(0.2)
        grid, shape = (coarse, height // 4, width // 4), (channels, height, width)
        networks: Any = nn.Module()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            begin = nn.Linear(latent, math.prod(grid)), nn.Unflatten(1, grid), leaky
            up = nn.ConvTranspose2d(coarse, fine, 4, 2, 1), leaky, nn.ConvTranspose2d(fine, channels, 4, 2, 1)
            networks.style, networks.synthesis = nn.Identity(), nn.Sequential(*begin, *up, nn.Tanh())
            networks.encoder = judge(shape, fine, 2 * latent)
            several = [judge(shape, fine, known["classes"]) for _ in range(settings.discriminators)]
            networks.discriminators = nn.ModuleList(several)
        networks.register_buffer("centres", torch.zeros(CENTRES, latent))
        return networks

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Features at a quarter and at half the resolution."""
        return activations(self.networks.synthesis, styles.w)

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images, and the labels that its discriminators give them; ``bias`` is the truncation factor."""
        drawn = super().sample(count, seeds, bias)
        return Samples(drawn.values, self.classify(drawn.values[0]).argmax(axis=1)[None])

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 (n, height, width, channels) → float64 (n, classes), rows that sum to 1: the mean of what the
        discriminators say, each of the classes that are real."""
        found: np.ndarray = self.opinions(images).mean(axis=0)
        return found

    def opinions(self, images: np.ndarray) -> np.ndarray:
        """What each discriminator says, float64 (discriminators, n, classes)."""
        import torch

        from pipelines.measures.evaluator import to_network_input

        with torch.inference_mode():
            parts = [
                torch.stack(
                    [each(part.to(self.device)).double().softmax(dim=1) for each in self.networks.discriminators]
                )
                for part in to_network_input(images).split(self.at_once)
            ]
            found: np.ndarray = torch.cat(parts, dim=1).cpu().numpy()
        return found

    @classmethod
    def settled(cls, settings: MavenSettings, classes: int) -> MavenSettings:
        """Of as many classes as there are, as a small training set may lack the last one."""
        return settings.model_copy(update={"classes": settings.classes or classes or None})

    @classmethod
    def check_classes(cls, settings: MavenSettings, classes: int) -> None:
        """Each has an output, and a label that is used."""
        super().check_classes(settings, classes)
        if settings.classes and settings.classes < classes:
            raise ValueError(f"maven.classes is {settings.classes}, the images have {classes}: set it to null")
        if settings.labelled and settings.labelled < classes:
            raise ValueError(
                f"maven.labelled is {settings.labelled}: give one label or more to each of {classes} classes"
            )


def judge(shape: Sequence[int], width: int, outputs: int) -> "nn.Sequential":
    """An untrained network: images of a ``shape`` (channels, height, width), sides a multiple of 4 → (n, outputs)."""
    from torch import nn

    fine, coarse, leaky, inner = width, 2 * width, nn.LeakyReLU(0.2), 2 * width * (shape[1] // 4) * (shape[2] // 4)
    down = nn.Conv2d(shape[0], fine, 4, 2, 1), leaky, nn.Conv2d(fine, coarse, 4, 2, 1), leaky, nn.Flatten()
    return nn.Sequential(*down, nn.Linear(inner, 2 * coarse), leaky, nn.Linear(2 * coarse, outputs))


def chosen_labels(labels: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Sorted indices of ``count`` of those ``labels`` (n,) that are not −1, at random by ``seed`` and as many of each
    class as there are, to within one; None: of all."""
    known = np.random.default_rng(derive_seed(seed, "labelled")).permutation(np.flatnonzero(labels >= 0))
    known = known[np.argsort(labels[known], kind="stable")]
    within = np.arange(len(known)) - np.searchsorted(labels[known], labels[known])  # its number in its class
    return np.sort(known[np.argsort(within, kind="stable")[:count]])


def _play(networks: Any, settings: MavenSettings, some: Any, labelled: Any, stream: "torch.Generator") -> None:
    """Train ``networks``; ``some`` and ``labelled`` draw a batch of images with their labels."""
    import torch

    from policies.maven import discriminator_loss, divergence, log_real, matching_loss

    players, synthesis, encoder = networks.discriminators, networks.synthesis, networks.encoder
    game, autoencoder = Game(networks, settings.learning_rate, settings.steps), [*synthesis.parameters()]
    autoencoder += encoder.parameters()

    def normal(like: "Tensor") -> "Tensor":
        return torch.randn(like.shape, generator=stream).to(like.device)

    def features(player: "nn.Sequential", images: "Tensor") -> "Tensor":
        values = images + PIXEL_NOISE * normal(images)
        for module in [*player][:-1]:
            values = module(values)
            if isinstance(module, torch.nn.LeakyReLU):
                values = values + HIDDEN_NOISE * normal(values)
        return values

    for _ in range(settings.steps):
        real = [some()[0] for _ in players]
        mean, log_variance = encoder(real[0]).chunk(2, dim=1)
        encoded = mean + (log_variance / 2).exp() * normal(mean)
        fake = synthesis(torch.cat([normal(mean), encoded]))  # from the prior, and of what was encoded
        losses = []
        for player, own in zip(players, real, strict=True):
            shown, labels = labelled()
            logits = player[-1](features(player, torch.cat([shown, own, fake.detach()])))
            losses.append(discriminator_loss(labels, *logits.chunk(4)))
        game.step(players.parameters(), torch.stack(losses).sum())
        heard = range(len(players))
        if settings.feedback == "random":
            heard = range(number := int(torch.randint(len(players), (), generator=stream)), number + 1)
        losses = []
        for number in heard:
            player = players[number]
            seen = features(player, torch.cat([fake, real[number], real[0]])).chunk(4)
            matching = matching_loss(seen[2].detach(), seen[0])
            reconstruction = (seen[1] - seen[3].detach()).square().mean()
            losses.append(matching + RECONSTRUCTION * reconstruction - log_real(player[-1](seen[0])).mean())
        game.step(autoencoder, torch.stack(losses).mean() + DIVERGENCE * divergence(mean, log_variance))
        game.end_round()
