"""What the GANs of the loop have in common: networks trained against one another, which draw from styles.

A latent z becomes a style w, and w an image. A sampling bias λ is the factor of a truncation: w is drawn toward a
typical style c, to c + λ (w − c). What a style is of an image, each family says, and may say where typical ones are.

Unless it does, these are cluster centres of w, of which the nearest counts (multi-modal truncation, Mokady et al.,
2202.12211; they measure nearness by LPIPS, this in w): the mean of all w, StyleGAN's, may show nothing real where
images fall into classes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from pipelines.generators import Generator, Seeds
from policies.loops.samples import Samples
from policies.rl.health import check_drawn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CENTRES, CENTRE_DRAWS = 16, 4096


class Styles(NamedTuple):
    """What images are drawn from: ``w`` (n, latent), and the conditions that go with them, (n, …) each, by name."""

    w: "Tensor"
    conditions: "Mapping[str, Tensor]"

    def rows(self, start: int, stop: int) -> "Styles":
        """Those of a stretch."""
        return self.taken(slice(start, stop))

    def taken(self, which: "slice | np.ndarray") -> "Styles":
        """Some of them."""
        return Styles(self.w[which], {name: each[which] for name, each in self.conditions.items()})


class Game:
    """Players, which are parts of ``networks``, step in turn by Adam; the rate falls to 0 along a cosine."""

    def __init__(self, networks: "nn.Module", rate: float, rounds: int) -> None:
        from torch.optim import Adam
        from torch.optim.lr_scheduler import CosineAnnealingLR

        # Without momentum, as the opponent turns the gradient from step to step.
        self._optimizer = Adam(networks.parameters(), rate, betas=(0.0, 0.99), fused=True)
        self._schedule = CosineAnnealingLR(self._optimizer, rounds)

    def step(self, player: "Iterable[nn.Parameter]", loss: "Tensor") -> None:
        """Down one player's loss; the others, which get no gradient, stay as they are."""
        self._optimizer.zero_grad()
        loss.backward(inputs=[*player])
        self._optimizer.step()

    def end_round(self) -> None:
        """Lower the rate."""
        self._schedule.step()


class Adversarial(Generator):
    """Fitted networks. One universe of uint8 images (1, n, height, width, channels).

    A subclass has a ``schema`` with ``latent`` and ``steps``, and says how networks are built and a style is rendered.
    Its networks have ``style``, a module z → w, both (n, latent), and a buffer ``centres`` (16, latent); or it says
    itself how styles are found and settled.
    """

    least_side = 8
    extrapolates = True
    updates = "steps"
    at_once: ClassVar[int] = 512  # images that are drawn

    def __init__(self, settings: Any, networks: Any, **known: Any) -> None:
        """``known``: what :meth:`save` has to keep beside the networks, for JSON."""
        self.settings, self.networks, self.known = settings, networks.requires_grad_(False), known

    @classmethod
    def build(cls, settings: Any, known: Mapping[str, Any], seed: int) -> Any:
        """Untrained networks, a module; ``known`` holds the images' ``shape`` (height, width, channels)."""
        raise NotImplementedError

    def styles(self, count: int, seed: int, bias: float = 1.0) -> Styles:
        """``count`` of them, each drawn toward the nearest centre by a ``bias`` below 1; toward 0 only 16 are left."""
        import torch

        with torch.no_grad():
            w = self.networks.style(latents(count, self.settings.latent, seed).to(self.device))
            nearest = self.networks.centres[torch.cdist(w, self.networks.centres).argmin(dim=1)]
            return Styles(torch.lerp(nearest, w, bias), {})

    def render(self, styles: Styles) -> "tuple[Tensor, list[Tensor]]":
        """Images (n, channels, height, width) in [-1, 1], and the features (n, any, any, any) that they were made of,
        coarse ones first. Gradients flow to the styles."""
        raise NotImplementedError

    def settle(self) -> None:
        """Find anew what follows from the weights: the centres."""
        import torch

        settle_centres(self.networks, torch.Generator().manual_seed(0))

    @property
    def device(self) -> "torch.device":
        """Where the networks are."""
        found: torch.device = next(self.networks.parameters()).device
        return found

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` images; ``bias`` is the truncation factor: 1 is none."""
        (seed,) = seeds
        return Samples(self.draw(self.styles(count, seed, bias))[None])

    def draw(self, styles: Styles) -> np.ndarray:
        """Their images, (n, height, width, channels) uint8."""
        import torch

        count, size = len(styles.w), self.at_once
        with torch.inference_mode():
            parts = [self.render(styles.rows(start, start + size))[0] for start in range(0, count, size)]
        images = torch.cat(parts)
        check_drawn(bool(images.isfinite().all()))
        found: np.ndarray = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return found

    def fitted(self) -> "dict[str, Tensor]":
        """Those of all networks."""
        return {name: value.detach().cpu().clone() for name, value in self.networks.named_parameters()}

    def holding(self, weights: "Mapping[str, Tensor]") -> Self:
        """What follows from the weights is found anew."""
        networks = deepcopy(self.networks)
        networks.load_state_dict(dict(weights), strict=False)
        other = type(self)(self.settings, networks, **self.known)
        other.settle()
        return other

    def save(self, directory: Path) -> None:
        """All networks, so that training can go on, and ``config.json`` with the settings and what else is known."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.networks.state_dict(), directory / "model.safetensors")
        config = {"settings": self.settings.model_dump(), **self.known}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""
        from safetensors.torch import load_file

        known = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        settings = cls.schema(**known.pop("settings"))
        networks = cls.build(settings, known, seed=0)
        networks.load_state_dict(load_file(directory / "model.safetensors"))
        return cls(settings, networks.to(device), **known)

    @classmethod
    def side_multiple(cls, settings: Any) -> int:
        """Resolutions are halved twice."""
        return 4


def latents(count: int, size: int, seed: int) -> "Tensor":
    """Latents z (count, size) of a seed."""
    import torch

    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def activations(network: "Sequence[nn.Module]", values: "Tensor") -> "tuple[Tensor, list[Tensor]]":
    """What a chain of modules makes of ``values``, and the maps (n, channels, height, width) that it was activated by
    on the way, the output left out."""
    from torch import nn

    maps = []
    for module in network:
        values = module(values)
        if values.ndim == 4 and isinstance(module, nn.LeakyReLU):
            maps.append(values)
    return values, maps


def settle_centres(networks: Any, random: "torch.Generator") -> None:
    """Find the centres of w: k-means of as many as 4,096 latents give."""
    import torch
    from sklearn.cluster import KMeans

    known = networks.centres
    styles = networks.style(torch.randn(CENTRE_DRAWS, known.shape[1], generator=random).to(known.device)).detach()
    check_drawn(bool(styles.isfinite().all()))
    clusters = KMeans(CENTRES, n_init=1, random_state=random.initial_seed() % 2**32).fit(styles.cpu().numpy())
    networks.centres = torch.from_numpy(clusters.cluster_centers_).to(known.device)
