"""GigaGAN (Kang et al., 2303.05511) in the self-consuming loop: a text-to-image GAN, which draws in one pass.

A frozen text encoder reads the caption. Kernels are mixed from a bank by each sample's style, coarse features attend to
the caption's tokens, and the critic judges an image with its caption at several scales. That the caption counts is
learned from pairs that do not match. A sampling bias λ truncates: a style w goes to c + λ (w − c), c the mean w of the
same caption. Weights are not averaged over steps: that smooths, a hidden bias in a loop.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field

from pipelines.generators import Seeds
from pipelines.generators.adversarial import Adversarial, Styles, latents
from pipelines.generators.captioned import Captioned, CaptionedSettings, shares
from policies.common.seeding import derive_seed
from policies.loops.rules import Rule
from policies.loops.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

TYPICAL_DRAWS = 64  # z, always the same, over which the typical w of a caption is a mean
_FINER = "finer_w", "finer_local"  # conditions of what enlarges

Weight = Annotated[float, Field(ge=0)]


class GigaGanSettings(CaptionedSettings):
    """A GAN that reads, trained from scratch: its networks and their training."""

    width: int = Field(
        8, ge=1, description="channels at full resolution; 2 and 4 times as many below, in the critic twice these"
    )
    filters: int = Field(1, ge=1, description="kernels in a convolution's bank, mixed anew for each sample; 1: no bank")
    upsample: Literal[1, 2] = Field(1, description="2: draw at half the size, and let a second GAN enlarge it")
    steps: int = Field(2200, ge=1, description="updates of the critic and of the generator in one fit, for each GAN")
    further_steps: int | None = Field(
        None, ge=1, description="updates of generations from 2 on, which go on from the last one's weights; null: anew"
    )
    learning_rate: float = Field(4e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")
    matching: Weight | tuple[Weight, Weight] = Field(
        (0.3, 0.0),
        description="weight of pairs that do not match, in the critic's loss and in the generator's; or one for both",
    )

    @property
    def matched(self) -> tuple[float, float]:
        """The weight of pairs that do not match in the critic's loss, and in the generator's."""
        return self.matching if isinstance(self.matching, tuple) else (self.matching, self.matching)

    @property
    def latent(self) -> int:
        """Dimensions of z, of w and of what is read of each token."""
        return 6 * self.width


class GigaGan(Captioned, Adversarial):
    """Fitted networks, and what they are asked for."""

    names = ("gigagan",)
    schema = GigaGanSettings
    at_once = 128  # of more, features no longer stay near the processor

    def __init__(self, settings: GigaGanSettings, networks: Any, **known: Any) -> None:
        """``known``: the images' ``shape``, and the ``captions`` with their shares."""
        super().__init__(settings, networks, **known)
        self._read: dict[str, Tensor] = {}  # the text encoder's states, by prompt

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
        import torch

        from pipelines.gigagan_networks import halved, read_texts
        from pipelines.gigagan_training import play
        from pipelines.measures.evaluator import to_network_input

        assert data.captions is not None  # as of all images that this family may be trained on
        (seed,), (images,), read = seeds, data.values, data.captions[0].tolist()
        weights = np.ones(len(images)) if data.weights is None else data.weights
        known = {"shape": list(images.shape[1:]), "captions": shares(read, weights)}
        networks = cls.build(settings, known, seed)
        if start is not None:
            networks.load_state_dict(start.networks.state_dict())
        steps = settings.steps if start is None else settings.further_steps or settings.steps
        known_captions = {caption: number for number, caption in enumerate(known["captions"])}
        owner = torch.tensor([known_captions[caption] for caption in read])
        states, stages = read_texts(settings.path, [*known_captions], device), networks.to(device)
        inputs = to_network_input(images)
        for number, stage in enumerate(stages):
            shown = halved(inputs) if number < len(stages) - 1 else inputs
            play(stage, shown, owner, states, weights, settings, steps, derive_seed(seed, "game", number), number > 0)
        return cls(settings, networks, **known)

    @classmethod
    def build(cls, settings: GigaGanSettings, known: Mapping[str, Any], seed: int) -> Any:
        """Stages: the one that draws, and if there are two the one that enlarges what it drew."""
        import torch
        from torch import nn

        from pipelines.gigagan_networks import Critic, Enlargement, Stage, Synthesis, read_texts

        height, width, channels = known["shape"]
        latent, filters = settings.latent, settings.filters
        states = read_texts(settings.path, [""]).shape[-1]
        shape = height // settings.upsample, width // settings.upsample, channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            synthesis = Synthesis(shape, settings.width, latent, filters)
            stages = [Stage(states, latent, synthesis, Critic(shape, 2 * settings.width, latent))]
            if settings.upsample > 1:
                enlargement = Enlargement(channels, settings.width, latent, filters)
                critic = Critic((height, width, channels), settings.width, latent)
                stages.append(Stage(states, latent, enlargement, critic))
        return nn.ModuleList(stages)

    def styles(self, count: int, seed: int, bias: float = 1.0, prompts: Sequence[str] | None = None) -> Styles:
        """Of ``prompts``, else of its captions in their shares. Each is drawn toward the mean of its caption."""
        import torch

        asked = self.prompts(count, seed) if prompts is None else list(prompts)
        known = {caption: number for number, caption in enumerate(sorted(set(asked)))}
        own, states = torch.tensor([known[each] for each in asked]), self._states([*known])
        found, size = [], self.settings.latent
        tried = latents(TYPICAL_DRAWS, size, 0).to(self.device)
        with torch.no_grad():
            for number, stage in enumerate(self.networks):
                z = latents(count, size, derive_seed(seed, "z", number)).to(self.device)
                w, local = stage.styles(states, z, own)
                if bias < 1:
                    every = torch.arange(len(known)).repeat_interleave(len(tried))
                    typical = stage.styles(states, tried.repeat(len(known), 1), every)[0]
                    w = torch.lerp(typical.unflatten(0, (len(known), -1)).mean(dim=1)[own], w, bias)
                found.append((w, local[own]))
        (w, local), *finer = found
        return Styles(
            w, {"local": local} | {name: each for pair in finer for name, each in zip(_FINER, pair, strict=True)}
        )

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Features of every resolution."""
        first, *finer = self.networks
        images, features = first.synthesis(styles.w, styles.conditions["local"])
        for stage in finer:
            images, more = stage.synthesis(*(styles.conditions[name] for name in _FINER), images[-1])
            features += more
        return images[-1], features

    def settle(self) -> None:
        """Nothing: the typical style of a caption is found when it is drawn."""

    def drawn(self, prompts: Sequence[str], seed: int, bias: float) -> np.ndarray:
        """In one pass."""
        return self.draw(self.styles(len(prompts), seed, bias, prompts))

    def _states(self, prompts: Sequence[str]) -> "Tensor":
        """What the text encoder makes of them; each is read once."""
        import torch

        from pipelines.gigagan_networks import read_texts

        if unread := [prompt for prompt in prompts if prompt not in self._read]:
            self._read |= dict(zip(unread, read_texts(self.settings.path, unread, self.device), strict=True))
        return torch.stack([self._read[prompt] for prompt in prompts])

    @classmethod
    def goes_on(cls, settings: GigaGanSettings) -> bool:
        """With a number of further steps."""
        return settings.further_steps is not None

    @classmethod
    def check(cls, settings: GigaGanSettings, loop: Rule) -> None:
        """The text encoder is there."""
        cls.files(settings)

    @classmethod
    def side_multiple(cls, settings: GigaGanSettings) -> int:
        """Resolutions are halved twice, and once for each enlargement."""
        return 4 * settings.upsample
