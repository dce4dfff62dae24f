"""GigaGAN (Kang et al., 2303.05511) in the self-consuming loop: a text-to-image GAN, which draws in one pass.

A frozen text encoder reads the caption. Kernels are mixed from a bank by each sample's style, coarse features attend to
the caption's tokens, and the critic judges an image with its caption at several scales. That the caption counts is
learned from pairs that do not match. A sampling bias λ truncates: a style w goes to c + λ (w − c), c the mean w of the
same caption. Weights are not averaged over steps: that smooths, a hidden bias in a loop.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.adversarial import Adversarial, Game, Styles, latents
from pipelines.generators.captioned import Captioned, CaptionedSettings, shares
from policies.loops.rules import Rule
from policies.loops.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

TYPICAL_DRAWS = 64  # z, always the same, over which the typical w of a caption is a mean


class GigaGanSettings(CaptionedSettings):
    """A GAN that reads, trained from scratch: its networks and their training."""

    width: int = Field(8, ge=1, description="channels at full resolution; twice and four times as many below it")
    critic_width: int = Field(16, ge=1, description="of the critic: twice as many at half the resolution, then 4 times")
    latent: int = Field(48, ge=1, description="dimensions of z, of w and of what is read of each token")
    filters: int = Field(2, ge=1, description="kernels in the bank of each convolution, mixed anew for each sample")
    attention: tuple[int, ...] = Field((4,), description="heights, in pixels, of features that attend; none: []")
    steps: int = Field(800, ge=1, description="updates of the critic and of the generator in one fit")
    further_steps: int | None = Field(None, ge=1, description="in a fit that goes on from earlier weights; null: steps")
    batch_size: int = Field(32, ge=2, description="images of an update")
    learning_rate: float = Field(4e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")
    gradient_penalty: float = Field(1.0, ge=0, description="γ of R1 and R2, for pixels in [-1, 1]")
    penalty_every: int = Field(4, ge=1, description="updates of the critic from one that pays the penalty to the next")
    matching: float = Field(1.0, ge=0, description="weight of pairs that do not match in both losses; 0: none")


class GigaGan(Captioned, Adversarial):
    """Fitted networks, and what they are asked for."""

    names = ("gigagan",)
    schema = GigaGanSettings

    @property
    def captions(self) -> Mapping[str, float]:  # type: ignore[override]
        """What it is asked for, and how often (shares)."""
        found: Mapping[str, float] = self.known["captions"]
        return found

    @classmethod
    def fit(
        cls, settings: GigaGanSettings, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu"
    ) -> Self:
        """Train from scratch, or on from ``start``'s networks, on batches drawn in proportion to ``data.weights``."""
        from pipelines.measures.evaluator import to_network_input

        assert data.captions is not None  # as of all images that this family may be trained on
        (seed,), (images,), read = seeds, data.values, data.captions[0].tolist()
        weights = np.ones(len(images)) if data.weights is None else data.weights
        known = {"shape": list(images.shape[1:]), "captions": shares(read, weights)}
        networks = cls.build(settings, known, seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        steps = settings.steps if start is None else settings.further_steps or settings.steps
        _play(networks.to(device), to_network_input(images), read, weights, settings, steps, seed)
        return cls(settings, networks, **known)

    @classmethod
    def build(cls, settings: GigaGanSettings, known: Mapping[str, Any], seed: int) -> Any:
        """``text``: a caption's states → what is read of each token, and of all. ``style``: z and that of all → w.
        ``synthesis``: w and that of each → images. ``critic`` judges images by what ``critic_text`` reads."""
        import torch
        from torch import nn

        from pipelines.gigagan_networks import Critic, Synthesis, Text, read_texts

        height, width, channels = known["shape"]
        latent, leaky, networks = settings.latent, nn.LeakyReLU(0.2), nn.Module()
        states = read_texts(settings.path, [""]).shape[-1]
        shape = height, width, channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks.text, networks.critic_text = Text(states, latent), Text(states, latent)
            networks.style = nn.Sequential(nn.Linear(2 * latent, latent), leaky, nn.Linear(latent, latent), leaky)
            networks.synthesis = Synthesis(shape, settings.width, latent, settings.filters, settings.attention)
            networks.critic = Critic(shape, settings.critic_width, latent)
        return networks

    def styles(self, count: int, seed: int, bias: float = 1.0, prompts: Sequence[str] | None = None) -> Styles:
        """Of ``prompts``, else of its captions in their shares. Each is drawn toward the mean of its caption."""
        import torch

        from pipelines.gigagan_networks import read_texts

        asked = self.prompts(count, seed) if prompts is None else list(prompts)
        known = sorted(set(asked))
        own = torch.tensor([known.index(prompt) for prompt in asked])
        networks, z = self.networks, latents(count, self.settings.latent, seed).to(self.device)
        with torch.no_grad():
            local, whole = networks.text(read_texts(self.settings.path, known, self.device))
            w = networks.style(torch.cat([z, whole[own]], dim=1))
            if bias < 1:
                tried = latents(TYPICAL_DRAWS, self.settings.latent, 0).to(self.device)
                pairs = torch.cat([tried.repeat(len(known), 1), whole.repeat_interleave(len(tried), 0)], dim=1)
                typical = networks.style(pairs).unflatten(0, (len(known), -1)).mean(dim=1)
                w = torch.lerp(typical[own], w, bias)
        return Styles(w, {"local": local[own]})

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Features of every resolution."""
        images, features = self.networks.synthesis(styles.w, styles.conditions["local"])
        return images[-1], features

    def drawn(self, prompts: Sequence[str], seed: int, bias: float) -> np.ndarray:
        """In one pass."""
        return self.draw(self.styles(len(prompts), seed, bias, prompts))

    @classmethod
    def check(cls, settings: GigaGanSettings, loop: Rule) -> None:
        """The text encoder is there."""
        cls.files(settings)


def _play(
    networks: Any,
    inputs: "Tensor",
    captions: Sequence[str],
    weights: np.ndarray,
    settings: GigaGanSettings,
    steps: int,
    seed: int,
) -> None:
    """The game of critic and generator on images (n, channels, height, width) in [-1, 1] and their ``captions``."""
    import torch

    from pipelines.gigagan_networks import halved, read_texts
    from policies.gigagan import ahead, mismatched, slope

    device, random = next(networks.parameters()).device, torch.Generator().manual_seed(seed)
    known = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    owner, chances = torch.tensor([known[caption] for caption in captions]), torch.from_numpy(weights)
    states, critic = read_texts(settings.path, [*known], device), networks.critic
    judging = [*critic.parameters(), *networks.critic_text.parameters()]
    drawing = [*networks.text.parameters(), *networks.style.parameters(), *networks.synthesis.parameters()]
    game = Game(networks, settings.learning_rate, steps)
    for step in range(steps):
        chosen = torch.multinomial(chances, settings.batch_size, replacement=True, generator=random)
        z = torch.randn(len(chosen), settings.latent, generator=random).to(device)
        other = mismatched(owner[chosen], random)
        own = states[owner[chosen]]
        local, whole = networks.text(own)
        fakes = networks.synthesis(networks.style(torch.cat([z, whole], dim=1)), local)[0][:-3:-1]
        real = inputs[chosen].to(device)
        reals, stopped = [real, halved(real)], [each.detach() for each in fakes]
        paid = settings.gradient_penalty > 0 and step % settings.penalty_every == 0
        for image in (*reals, *stopped):
            image.requires_grad_(paid)
        text = networks.critic_text(own)[1]
        seen, drawn = critic.features(reals), critic.features(stopped)
        right, wrong = critic.scores(seen, text), critic.scores(drawn, text)
        loss = ahead(right, wrong)
        if settings.matching:
            pairs = (critic.scores(each, text[other]) for each in (seen, drawn))
            loss = loss + settings.matching * sum(ahead(right, each) for each in pairs)
        if paid:
            weight = settings.gradient_penalty / 2 * settings.penalty_every
            loss = loss + weight * (slope(right, reals) + slope(wrong, stopped))
        game.step(judging, loss)
        text, right = networks.critic_text(own)[1], [each.detach() for each in right]  # as they were a step ago
        drawn = critic.features(fakes)
        wrong = critic.scores(drawn, text)
        loss = ahead(wrong, right)
        if settings.matching:
            loss = loss + settings.matching * ahead(wrong, critic.scores(drawn, text[other]))
        game.step(drawing, loss)
        game.end_round()
