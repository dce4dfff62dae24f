"""The networks of GigaGAN (Kang et al., 2303.05511), as small as small images allow, and the text that they read."""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu, leaky_relu_, scaled_dot_product_attention

from pipelines.storage.locations import resolve_model
from policies.gigagan import distance_attention, modulated_convolution

_SLOPE, _SURE = 0.2, 0.99
_HEADS = 6  # of attention to a caption
_VARIETY = 6.0  # what z is multiplied by, or captions would soon outweigh it in w, and each have one image


class Text(nn.Module):
    """Learned layers over a frozen encoder's states: ``local`` (n, tokens, size), and ``whole`` (n, size) of the last
    token, which attends to all of them, as small encoders leave in its state little of what tells captions apart."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.layer, self.asking = nn.Linear(width, size), nn.Linear(size, size)
        self.read, self.values = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """``states`` (n, 1 + tokens, width), the last token's first."""
        every = self.layer(states)
        parts = (self.asking(every[:, :1]), self.read(every), self.values(every))
        heads = [part.unflatten(2, (_HEADS, -1)).transpose(1, 2) for part in parts]
        return every[:, 1:], every[:, 0] + scaled_dot_product_attention(*heads).flatten(1)


class Convolution(nn.Module):
    """A bank of filters, of which each sample mixes and scales its own kernel by its style."""

    def __init__(self, inputs: int, outputs: int, side: int, style: int, filters: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(outputs, filters, inputs, side, side) / sqrt(inputs * side**2))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = nn.Linear(style, inputs)
        self.choice = nn.Linear(style, filters) if filters > 1 else nn.Identity()
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        mixture = self.choice(style).softmax(dim=1) if self.bank.shape[1] > 1 else style  # of one there is no choice
        found = modulated_convolution(x, self.bank, mixture, self.scale(style))
        return found.add_(self.bias[:, None, None])


class Colours(nn.Module):
    """A modulated 1×1 convolution to few channels, which a product of matrices does faster."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs)
        self.bias, self.scale = nn.Parameter(torch.zeros(outputs, 1)), nn.Linear(style, inputs)
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.weight * self.scale(style)[:, None]
        return torch.baddbmm(self.bias, weight, x.flatten(2)).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Self-attention by distance, whose keys are its queries, and then to the caption's tokens; each is added."""

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        size = max(1, channels // 2)
        self.own, self.own_values = nn.Linear(channels, size), nn.Linear(channels, channels)
        self.asking, self.read = nn.Linear(channels, size), nn.Linear(text, size)
        self.text_values = nn.Linear(text, channels)

    def forward(self, x: Tensor, local: Tensor) -> Tensor:
        places = x.flatten(2).mT
        own = self.own(places)
        places = places + distance_attention(own, own, self.own_values(places))
        places = places + distance_attention(self.asking(places), self.read(local), self.text_values(local))
        return places.mT.unflatten(2, x.shape[2:])


class Synthesis(nn.Module):
    """From styles to images. What is to be enlarged is thinned out first, as convolutions of many fine features are
    what costs time; each resolution adds to the picture."""

    def __init__(self, shape: Sequence[int], width: int, style: int, filters: int, attention: int) -> None:
        super().__init__()
        height, breadth, colours = shape
        levels = halvings(height, breadth)
        widths = [min(4, 2**level) * width for level in range(levels, -1, -1)]
        coarse = widths[0], height >> levels, breadth >> levels
        self.start = nn.Sequential(nn.Linear(style, prod(coarse)), nn.Unflatten(1, coarse))
        banks = [filters] * levels + [1]  # at full resolution a bank would cost as much as all others together
        self.layers = nn.ModuleList(Convolution(a, a, 3, style, bank) for a, bank in zip(widths, banks, strict=True))
        pairs = itertools.pairwise(widths)
        self.thin = nn.ModuleList(Convolution(a, b, 3, style, filters) for a, b in pairs)
        self.colours = nn.ModuleList(Colours(each, colours, style) for each in widths)
        sides = [height >> level for level in range(levels, -1, -1)]
        self.attention = nn.ModuleDict(
            {str(level): Attention(widths[level], style) for level, side in enumerate(sides) if side == attention}
        )

    def forward(self, style: Tensor, local: Tensor, coarse: None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Images in [-1, 1] of each resolution, and the features behind them; both coarse ones first."""
        x = self.start(style)
        picture = x.new_zeros(len(style), 1, *x.shape[2:])
        images, features = [], []
        for level, (layer, colours) in enumerate(zip(self.layers, self.colours, strict=True)):
            if level:
                x = _active(self.thin[level - 1](x, style))
                x, picture = (interpolate(each, scale_factor=2.0) for each in (x, picture))
            x = _active(layer(x, style))
            if str(level) in self.attention:
                x = self.attention[str(level)](x, local)
            picture = picture + colours(x, style)
            images.append(picture.tanh())
            features.append(x)
        return images, features


class Enlargement(nn.Module):
    """From an image of half the size: what is missing is added to it, by a style and the caption."""

    def __init__(self, colours: int, width: int, style: int, filters: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(colours, 2 * width, 3, padding=1)
        widths = (2 * width, 2 * width), (2 * width, width), (width, width)
        self.layers = nn.ModuleList(Convolution(a, b, 3, style, filters) for a, b in widths)
        self.colours = Colours(width, colours, style)

    def forward(self, style: Tensor, local: Tensor, coarse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images in [-1, 1] at half and at full size, and the features behind the latter."""
        x = _active(self.enter(coarse))
        for layer in self.layers[:-1]:
            x = _active(layer(x, style))
        x = _active(self.layers[-1](interpolate(x, scale_factor=2), style))
        known = interpolate(coarse.clamp(-_SURE, _SURE).atanh(), scale_factor=2, mode="bilinear")
        fine = (known + self.colours(x, style)).tanh()
        return [halved(fine), fine], [x]


class Head(nn.Module):
    """ψ(φ(x), t): features read in the light of a caption, by a modulated 1×1 convolution, and without one."""

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        self.scale, self.read = nn.Linear(text, channels), nn.Linear(channels, channels)
        nn.init.ones_(self.scale.bias)
        self.with_text, self.without = nn.Linear(channels, 1), nn.Linear(channels, 1)

    def forward(self, features: Tensor, texts: Tensor) -> Tensor:
        """Scores of ``features`` (n, channels, height, width) with each of ``texts`` (several, n, size): (several, n,
        positions)."""
        places = features.flatten(2).mT
        read = self.read(places * self.scale(texts)[:, :, None])
        found: Tensor = self.with_text(leaky_relu(read, _SLOPE)) + self.without(places)
        return found[..., 0]


class Critic(nn.Module):
    """φ and its heads: an image enters at its own and at half its resolution, and each is judged at a quarter and
    whole."""

    def __init__(self, shape: Sequence[int], width: int, text: int) -> None:
        super().__init__()
        height, breadth, colours = shape
        leaky = nn.LeakyReLU(_SLOPE)
        levels = halvings(height, breadth)
        widths = [min(4, 2 ** (level + 1)) * width for level in range(levels)]
        self.enter = nn.ModuleList([nn.Conv2d(colours, widths[0], 4, 2, 1), nn.Conv2d(colours, widths[0], 3, 1, 1)])
        self.down = nn.Sequential(leaky)
        for a, b in itertools.pairwise(widths):
            self.down.extend([nn.Conv2d(a, b, 4, 2, 1), leaky])
        last, places = widths[-1], (height >> levels) * (breadth >> levels)
        self.whole = nn.Sequential(nn.Flatten(), nn.Linear(last * places, 2 * last), leaky, nn.Unflatten(1, (-1, 1, 1)))
        self.heads = nn.ModuleList([Head(last, text), Head(2 * last, text)])

    def forward(self, images: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        """How well ``images`` of both resolutions (n, …), the fine ones first, go with each of ``texts`` (n, size): for
        every head (texts, resolutions, n, positions). All is done at once, as small calls cost time."""
        coarse = self.down(torch.cat([enter(image) for enter, image in zip(self.enter, images, strict=True)]))
        asked = torch.stack([text.repeat(len(images), 1) for text in texts])
        features = coarse, self.whole(coarse)
        scores = [head(each, asked) for head, each in zip(self.heads, features, strict=True)]
        return [each.unflatten(1, (len(images), -1)) for each in scores]


class Stage(nn.Module):
    """One GAN: what reads a caption for each player, z → w, and the players."""

    def __init__(self, states: int, latent: int, synthesis: nn.Module, critic: Critic) -> None:
        super().__init__()
        self.text, self.critic_text = Text(states, latent), Text(states, latent)
        leaky = nn.LeakyReLU(_SLOPE)
        self.style = nn.Sequential(nn.Linear(2 * latent, latent), leaky, nn.Linear(latent, latent), leaky)
        self.synthesis, self.critic = synthesis, critic

    def styles(self, states: Tensor, z: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """w (n, latent) of ``z`` (n, latent) and of the captions that ``owner`` (n,) numbers, and what is read of each
        token of the captions, whose ``states`` these are."""
        local, whole = self.text(states)
        return self.style(torch.cat([_VARIETY * z, whole[owner]], dim=1)), local

    def players(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The weights of the critic, and of the generator."""
        judging = self.critic, self.critic_text
        drawing = self.text, self.style, self.synthesis
        critic, generator = ([each for part in parts for each in part.parameters()] for parts in (judging, drawing))
        return critic, generator


def _active(x: Tensor) -> Tensor:
    return leaky_relu_(x, _SLOPE)


def halvings(height: int, width: int) -> int:
    """How often sides can be halved until 4 pixels or an odd number are left; twice at least."""
    found = 2
    while not (height | width) % 2 ** (found + 1) and min(height, width) >> found + 1 >= 4:
        found += 1
    return found


def halved(images: Tensor) -> Tensor:
    """At half the resolution, by means of four pixels."""
    return avg_pool2d(images, 2)


def read_texts(path: str, texts: Sequence[str], device: Any = "cpu") -> Tensor:
    """What the text encoder of a Stable Diffusion directory makes of ``texts``: (n, 1 + tokens, width), the state of
    the last token before those of all."""
    tokenizer, encoder = _encoder(path)
    read = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = encoder(read.input_ids)
    return torch.cat([found.pooler_output[:, None], found.last_hidden_state], dim=1).to(device)


@lru_cache(maxsize=2)
def _encoder(path: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModel

    from pipelines.storage.model_files import load_tokenizer, load_whole, quieten

    quieten()
    directory = Path(resolve_model(path))
    return load_tokenizer(directory / "tokenizer"), load_whole(CLIPTextModel, directory / "text_encoder")
