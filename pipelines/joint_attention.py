"""What CoDi (2305.11846) adds to diffusion models that are not trained again: encoders of what they draw into the space
of text, and attention from each model to what the other is drawing.

The added layers hang on stock UNets by hooks: the UNets are those that were loaded, and hold no weight of these.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from policies.any_to_any import unit

_TIMES, _GROUPS = 32, 8  # sines and cosines of a time; groups of normalised channels


class Encoder(nn.Module):
    """What is shown (n, channels, height, width) as text states (n, tokens, width): as far from the ``middle`` of the
    text encoder's as these are."""

    middle: Tensor
    length: Tensor

    def __init__(self, shape: tuple[int, int, int], states: Tensor, hidden: int = 48) -> None:
        """Of what has a ``shape`` (channels, height, width), into the space of ``states`` (captions, tokens, width)."""
        super().__init__()
        channels, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.GroupNorm(_GROUPS, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, stride=2),
            nn.GroupNorm(_GROUPS, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        seen = hidden * -(-height // 2) * -(-width // 2)
        self.head = nn.Sequential(nn.Linear(seen, 128), nn.SiLU(), nn.Linear(128, states[0].numel()))
        self.register_buffer("middle", states.mean(dim=0))
        self.register_buffer("length", (states - states.mean(dim=0)).flatten(1).norm(dim=1).mean())

    def forward(self, shown: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(shown)).view(-1, *self.middle.shape)
        return self.middle + self.length * unit(found)


class Environment(nn.Module):
    """V of the paper: what a stream knows of itself while it is drawn. Of z_t (n, channels, height, width) or, of a
    text, (n, numbers), at times t (n,), a token (n, 1, ``width``) of length 1. Unlike the paper's it takes no mean over
    places: what place a tone has is its pitch."""

    def __init__(self, shape: Sequence[int], width: int, hidden: int = 64) -> None:
        """``shape``: of one z_t."""
        super().__init__()
        self.flat = flat = len(shape) == 1

        def mix(many: int, stride: int = 1) -> nn.Module:
            return nn.Linear(many, hidden) if flat else nn.Conv2d(many, hidden, 3, stride, padding=1)

        self.times, self.enter = nn.Linear(_TIMES, 2 * hidden), mix(shape[0])
        self.mixers = nn.ModuleList([mix(hidden, 2), mix(hidden), mix(hidden)])
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) if flat else nn.GroupNorm(_GROUPS, hidden) for _ in range(3))
        places = math.prod(-(-size // 2) for size in shape[1:])
        self.leave = nn.Sequential(nn.Linear(hidden * places, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, width))

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        given = self.times(get_timestep_embedding(times, _TIMES)).unflatten(1, (2, -1))
        scale, shift = (given if self.flat else given[..., None, None]).unbind(dim=1)

        def mixed(number: int, hidden: Tensor) -> Tensor:
            found: Tensor = self.mixers[number](functional.silu(self.norms[number](hidden)))
            return found

        hidden = mixed(0, self.enter(noisy)) * (1 + scale) + shift
        hidden = hidden + mixed(2, mixed(1, hidden))
        return unit(self.leave(hidden.flatten(1))[:, None])


class JointAttention(nn.Module):
    """For each attention level of a UNet another one that follows it, whose keys and values are another stream's token
    in place of a text. It begins as a copy of the level that adds nothing: what it is to say is known there already."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.levels = nn.ModuleList(deepcopy(each).requires_grad_(True) for each in _levels(unet))
        for level in self.levels:
            for parameter in level.get_submodule("proj_out").parameters():
                nn.init.zeros_(parameter)

    @contextmanager
    def on(self, unet: nn.Module, token: Tensor) -> Iterator[None]:
        """Within it ``unet`` attends to ``token`` (n, 1, width)."""

        def after(level: nn.Module) -> Callable[..., Any]:
            return lambda _, given, output: (level(output[0], token, return_dict=False)[0], *output[1:])

        pairs = zip(_levels(unet), self.levels, strict=True)
        hooks = [known.register_forward_hook(after(new)) for known, new in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _levels(unet: nn.Module) -> list[nn.Module]:
    return [each for each in unet.modules() if isinstance(each, Transformer2DModel)]


class Joint(nn.Module):
    """Environments of two streams, and of a text that is noised as they are, and the streams' attention to them."""

    def __init__(self, networks: Mapping[str, nn.Module], shapes: Mapping[str, Sequence[int]], width: int) -> None:
        """Of two stock UNets by name; ``shapes`` of what each draws, and of a text; ``width``: of a text state, and so
        of a token."""
        super().__init__()
        self.environments = nn.ModuleDict({name: Environment(shape, width) for name, shape in shapes.items()})
        self.attention = nn.ModuleDict({name: JointAttention(each) for name, each in networks.items()})
        self._networks = dict(networks)  # plain: what is frozen is none of its weights

    def seen(self, stream: str, noisy: Tensor, times: Tensor) -> Tensor:
        """V of one, (n, 1, width)."""
        found: Tensor = self.environments[stream](noisy, times)
        return found

    def forward(self, stream: str, noisy: Tensor, times: Tensor, states: Tensor, token: Tensor) -> Tensor:
        """What a stream's UNet answers under text ``states``, attending to ``token``."""
        network, attention = self._networks[stream], self.attention[stream]
        assert isinstance(attention, JointAttention)
        with attention.on(network, token * token.shape[-1] ** 0.5):  # of a text state's length
            found: Tensor = network(noisy, times, states, return_dict=False)[0]
        return found
