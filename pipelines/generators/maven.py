"""MAVEN (Imran & Terzopoulos, 1906.06430): a variational GAN whose discriminators learn classes from few labels.

An encoder finds the latent of an image, and the synthesis makes images of it and of latents that are drawn; several
discriminators tell real images by their classes from both kinds. Each begins elsewhere and sees batches of its own, as
equal ones would give nothing to average. Images are drawn without being asked for a class, and are labelled by the
mean of what the discriminators say. Of a label −1 a fit makes nothing: the image has none.
"""

import math, torch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.adversarial import (
    CENTRES,
    SAMPLING_BATCH,
    Adversarial,
    Game,
    Styles,
    activations,
    settle_centres,
)
from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from policies.maven import discriminator_loss, divergence, log_real, matching_loss
from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

KL, MATCHING, FOOLED, RECONSTRUCTION = 0.01, 1.0, 1.0, 1.0
NOISE, HIDDEN = 0.3, 0.5
SHARED=True;ENC=.5;NF=True;BOTH=False

class MavenSettings(Settings):
    """A MAVEN trained from scratch: its networks and their training."""

    classes: int | None = Field(None, ge=2, description="number of labels; null: the data's")
    labelled: int | None = Field(
        None, ge=2, description="labels that a fit uses, as many of each class, at random; the others it does not see"
    )
    discriminators: int = Field(3, ge=1, le=32, description="K networks that judge and classify")
    feedback: Literal["mean", "random"] = Field("mean", description="to the generator, of all or of one at random")
    width: int = Field(32, ge=1, description="channels at half the resolution; twice as many at a quarter")
    latent: int = Field(32, ge=1, description="dimensions of z and of w")
    steps: int = Field(800, ge=1, description="updates of each player in one fit")
    batch_size: int = Field(32, ge=1, description="images of an update, and as many labelled ones")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")


class Maven(Adversarial):
    """Fitted networks."""

    names = ("maven",)
    schema = MavenSettings
    conditional = True
    metrics = (*Adversarial.metrics, "label_accuracy")

    @classmethod
    def fit(
        cls, settings: MavenSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s networks, on batches drawn in proportion to ``data.weights``.

        Raises ValueError if there is no label to learn from, or one of no class.
        """
        import torch

        from pipelines.measures.evaluator import to_network_input

        (seed,), (images,) = seeds, data.values
        weights = torch.ones(len(images)) if data.weights is None else torch.from_numpy(data.weights)
        labels = np.full(len(images), -1) if data.labels is None else data.labels[0]
        shown = chosen_labels(np.where(weights.numpy() > 0, labels, -1), settings.labelled, seed)
        if not len(shown):
            raise ValueError("family maven learns from labels, and no image has one")
        classes = start.known["classes"] if start else settings.classes or int(labels.max()) + 1
        if labels.max() >= classes:
            raise ValueError(f"label {labels.max()} is none of the {classes} classes: set classes higher")
        known = {"shape": list(images.shape[1:]), "classes": classes}
        networks = cls.build(settings, known, seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        networks.to(device)
        stream = torch.Generator().manual_seed(seed)
        inputs = to_network_input(images)

        def batch(among: "Tensor") -> "tuple[Tensor, Tensor]":
            rows = among[torch.multinomial(weights[among], settings.batch_size, replacement=True, generator=stream)]
            return inputs[rows].to(device), torch.from_numpy(labels)[rows].to(device)

        def noise(count: int) -> "Tensor":
            return torch.randn(count, settings.latent, generator=stream).to(device)

        game, players = Game(networks, settings.learning_rate, settings.steps), networks.discriminators
        some, every = torch.from_numpy(shown), torch.arange(len(images))
        generator, encoder = [*networks.style.parameters(), *networks.synthesis.parameters()], [*networks.encoder.parameters()]
        autoencoder = [*networks.style.parameters(), *networks.synthesis.parameters(), *networks.encoder.parameters()]
        for _ in range(settings.steps):
            real = [batch(every)[0] for _ in players]  # of its own for each
            mean, log_variance = networks.encoder(real[0]).chunk(2, dim=1)
            z = torch.cat([noise(len(mean)), mean + (log_variance / 2).exp() * noise(len(mean))])
            fake = networks.synthesis(networks.style(z))
            losses = []
            for player, own in zip(players, real, strict=True):
                images_, labels_ = batch(some)
                features = _noisy(player[:-1], torch.cat([images_, own, fake.detach()]), stream)
                logits = player[-1](features).chunk(4)
                losses.append(discriminator_loss(logits[0], labels_, *logits[1:], ENC))
            game.step(players.parameters(), torch.stack(losses).sum())
            heard = range(len(players))
            if settings.feedback == "random":
                heard = [int(torch.randint(len(players), (), generator=stream))]
            told = [_feedback(players[index], fake, real[index], real[0], stream) for index in heard]
            to_generator, to_encoder = (torch.stack(each).mean() for each in zip(*told, strict=True))
            if SHARED:
                game.step(autoencoder, to_generator + RECONSTRUCTION*to_encoder + KL * divergence(mean, log_variance))
            else:
                game.step(generator, to_generator, True)
                game.step(encoder, RECONSTRUCTION*to_encoder + KL * divergence(mean, log_variance))
            game.end_round()
        settle_centres(networks, stream)
        return cls(settings, networks, **known)

    @classmethod
    def build(cls, settings: MavenSettings, known: Mapping[str, Any], seed: int) -> Any:
        """``encoder``: images (n, channels, height, width) in [-1, 1] → mean and log variance of z, (n, 2 · latent).
        ``style``: z → w. ``synthesis``: w → images. ``discriminators``: each images → logits (n, classes)."""
        import torch
        from torch import nn

        height, width, channels = known["shape"]
        latent, fine, coarse, leaky = settings.latent, settings.width, 2 * settings.width, nn.LeakyReLU(0.2)
        grid = coarse, height // 4, width // 4

        def judge(outputs: int) -> nn.Sequential:
            down = nn.Conv2d(channels, fine, 4, 2, 1), leaky, nn.Conv2d(fine, coarse, 4, 2, 1), leaky, nn.Flatten()
            return nn.Sequential(*down, nn.Linear(math.prod(grid), 2 * coarse), leaky, nn.Linear(2 * coarse, outputs))

        networks: Any = nn.Module()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            begin = nn.Linear(latent, math.prod(grid)), nn.Unflatten(1, grid), leaky
            up = nn.ConvTranspose2d(coarse, fine, 4, 2, 1), leaky, nn.ConvTranspose2d(fine, channels, 4, 2, 1)
            networks.style = nn.Sequential(nn.Linear(latent, latent), leaky, nn.Linear(latent, latent))
            networks.synthesis = nn.Sequential(leaky, *begin, *up, nn.Tanh())
            networks.encoder = judge(2 * latent)
            networks.discriminators = nn.ModuleList(judge(known["classes"]) for _ in range(settings.discriminators))
        networks.register_buffer("centres", torch.zeros(CENTRES, latent))
        return networks

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Features at a quarter and at half the resolution."""
        return activations(self.networks.synthesis, styles.w)

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images and the labels that its discriminators give them; ``bias`` is the truncation factor."""
        drawn = super().sample(count, seeds, bias)
        labels = self.classify(drawn.values[0]).argmax(axis=1)
        return Samples(drawn.values, labels[None])

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 (n, height, width, channels) → float64 (n, classes), rows that sum to 1: the mean of the
        discriminators' softmaxes over the classes that are real."""
        import torch

        from pipelines.measures.evaluator import to_network_input

        with torch.inference_mode():
            parts = [
                torch.stack([each(part.to(self.device)).softmax(dim=1) for each in self.networks.discriminators])
                for part in to_network_input(images).split(SAMPLING_BATCH)
            ]
        found: np.ndarray = torch.cat([part.mean(dim=0) for part in parts]).double().cpu().numpy()
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
            raise ValueError(f"maven.labelled is {settings.labelled}, and there are {classes} classes: one each at least")


def _feedback(judge: "nn.Sequential", fake: "Tensor", own: "Tensor", encoded: "Tensor", stream) -> "Tensor":
    """What one discriminator tells generator and encoder."""
    features = _noisy(judge[:-1], torch.cat([fake, own, encoded]), stream) if NF else judge[:-1](torch.cat([fake, own, encoded]))
    generated, decoded, real, apart = features.chunk(4)
    real, apart = real.detach(), apart.detach()
    fooled = -log_real(judge[-1](generated if not BOTH else features[:2*len(real)])).mean()
    return MATCHING * matching_loss(real, generated) + FOOLED * fooled, (decoded - apart).square().mean()

def _noisy(judge, values, stream):
    values = values + NOISE * torch.randn(values.shape, generator=stream)
    for module in judge:
        values = module(values)
        if HIDDEN and isinstance(module, torch.nn.LeakyReLU):
            values = values + HIDDEN * torch.randn(values.shape, generator=stream)
    return values


def chosen_labels(labels: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Sorted indices of ``count`` of those ``labels`` (n,) that are none of −1, as many of each class as there are, to
    within one; None: of all. At random by ``seed``."""
    known = np.flatnonzero(labels >= 0)
    if count is None:
        return known
    known = np.random.default_rng(derive_seed(seed, "labelled")).permutation(known)
    order = np.argsort(labels[known], kind="stable")
    classes = labels[known][order]
    rank = np.arange(len(known)) - np.searchsorted(classes, classes)  # within its class
    return np.sort(known[order][np.argsort(rank, kind="stable")[:count]])
