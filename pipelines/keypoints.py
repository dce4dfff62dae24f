"""Where learned tokens look in the cross-attention of a Stable Diffusion pipeline, and the keypoints that they find
(:mod:`policies.keypoints`).

What is learned is a file of tokens: with the pipeline that it was learned on, it finds keypoints in any images.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.denoisers import load_family
from pipelines.measures.evaluator import to_network_input
from pipelines.storage.locations import portable, resolve_model
from pipelines.storage.model_files import ModelFilesError, check_pipeline, reading
from policies.common.seeding import derive_seed
from policies.keypoints import KeypointSettings, choose, losses, peaks, turns, unwarped, warped

FILE = "tokens.safetensors"
_AT_ONCE = 128  # turned copies of images


class Looking(AttnProcessor2_0):
    """Cross-attention as it was, which also notes where tokens look: a softmax over tokens, at finer places than it has
    of its own. ``seen`` is that of the last call, the mean over heads, (n, tokens, height, width)."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution, self.shape, self.seen = resolution, 1.0, torch.empty(0)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """``hidden_states`` (n, places, channels), whose places make an image ``shape`` times as wide as high."""
        assert encoder_hidden_states is not None
        count, places, channels = hidden_states.shape
        across = round((places * self.shape) ** 0.5)
        states = hidden_states.transpose(1, 2).reshape(count, channels, places // across, across)
        finer = interpolate(states, scale_factor=self.resolution, mode="bicubic", align_corners=False)
        query = attn.head_to_batch_dim(attn.to_q(finer.flatten(2).transpose(1, 2)))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        looks = (attn.scale * query @ key.transpose(1, 2)).softmax(dim=2)
        over_heads = looks.unflatten(0, (count, attn.heads)).mean(dim=1)
        self.seen = over_heads.transpose(1, 2).reshape(count, -1, *finer.shape[2:])
        found: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, **rest)
        return found


class Found(NamedTuple):
    """Tokens (tokens, width) that were learned, and which of them find keypoints, (keypoints,) int64; ``random`` is the
    seed of the network's weights, if they are not the pipeline's."""

    tokens: Tensor
    chosen: Tensor
    settings: KeypointSettings
    path: str
    random: int | None = None

    def file(self) -> bytes:
        """As safetensors, with the rest as metadata."""
        about = {"path": portable(self.path), "settings": self.settings.model_dump(mode="json"), "random": self.random}
        tensors = {"tokens": self.tokens.cpu().contiguous(), "chosen": self.chosen.cpu()}
        return save(tensors, metadata={"keypoints": json.dumps(about)})

    @classmethod
    def read(cls, file: str | Path) -> "Found":
        """Raises ModelFilesError where a file holds no such tokens."""
        with reading(file), safe_open(file, "pt") as held:
            about = (held.metadata() or {}).get("keypoints")
            if about is None:
                raise ValueError("holds no tokens that find keypoints; name a tokens.safetensors of a study's products")
            known = json.loads(about)
            settings = KeypointSettings(**known.pop("settings"))
            return cls(held.get_tensor("tokens"), held.get_tensor("chosen"), settings, **known)


class Seer:
    """A pipeline in which tokens look for something. ``random``: the seed of a network of random weights; a control."""

    def __init__(self, path: str, settings: KeypointSettings, device: str = "cpu", random: int | None = None) -> None:
        path = resolve_model(path)
        check_pipeline(path, "StableDiffusionPipeline")
        self.device, self.settings, self.path, self.random = torch.device(device), settings, path, random
        pipeline = load_family(path, torch.float32).pipeline.to(device)
        self.vae, self.noises, self.network = pipeline.vae, pipeline.scheduler, pipeline.unet
        if random is not None:
            with torch.random.fork_rng():
                torch.manual_seed(random)
                self.network = type(self.network).from_config(self.network.config).to(device).eval()
        self.network.requires_grad_(False)
        processors = self.network.attn_processors
        names = [each for each in processors if each.startswith("up_blocks") and ".attn2." in each]
        if len(names) < settings.layers:
            raise ModelFilesError(
                f"{path}: {len(names)} layers of cross-attention on the way up, not {settings.layers}"
            )
        self.layers = {name: Looking(settings.resolution) for name in names[-settings.layers :]}
        self.network.set_attn_processor({name: self.layers.get(name, AttnProcessor2_0()) for name in processors})

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Of ``images`` (n, 3, height, width) in [−1, 1], without noise."""
        clean: Tensor = self.vae.encode(images).latent_dist.mean * self.vae.config.scaling_factor
        return clean

    def maps(self, latents: Tensor, noise: Tensor, tokens: Tensor) -> Tensor:
        """Where ``tokens`` (tokens, width) look in images whose ``latents`` (n, …) have this noise added, (n, tokens,
        height, width): finer than the layers' own places."""
        times = torch.full((len(latents),), self.settings.timestep, device=latents.device)
        for layer in self.layers.values():
            layer.shape = latents.shape[3] / latents.shape[2]
        noisy = self.noises.add_noise(latents, noise.expand_as(latents).to(latents), times)
        self.network(noisy, times, tokens.expand(len(noisy), -1, -1), return_dict=False)
        return torch.stack([each.seen for each in self.layers.values()]).mean(dim=0)

    def fit(self, images: np.ndarray, seed: int) -> Found:
        """Learn tokens from ``images`` (n, height, width, 3) uint8, and choose those that find keypoints."""
        settings, rng = self.settings, np.random.default_rng(derive_seed(seed, "turns"))
        random = torch.Generator().manual_seed(derive_seed(seed, "tokens"))
        width = self.network.config.cross_attention_dim
        tokens = torch.randn((settings.tokens, width), generator=random).to(self.device).requires_grad_()
        optimizer = torch.optim.Adam([tokens], lr=settings.learning_rate)
        for _ in range(settings.steps):
            shown = self._shown(images[rng.integers(len(images), size=settings.batch)])
            how = turns(len(shown), settings, (shown.shape[2], shown.shape[3]), rng).to(self.device)
            latents = self.latents(torch.cat([shown, warped(shown, how)]))
            maps = self.maps(latents, torch.randn(latents.shape, generator=random), tokens)
            local, moved = losses(maps[: len(shown)], maps[len(shown) :], how, settings)
            (tokens.grad,) = torch.autograd.grad(local + settings.equivariance * moved, tokens)
            optimizer.step()
        learned = tokens.detach()
        some = images[rng.permutation(len(images))[: settings.images]]
        often = choose(self._seen(some, learned, seed), settings).flatten().bincount(minlength=settings.tokens)
        chosen = often.argsort(descending=True, stable=True)[: settings.keypoints]
        return Found(learned, chosen, settings, self.path, self.random)

    def find(self, images: np.ndarray, found: Found, seed: int) -> np.ndarray:
        """The keypoints (n, keypoints, 2) of ``images`` (n, height, width, 3) uint8: (x, y) in pixels."""
        maps = self._seen(images, found.tokens.to(self.device), seed)[:, found.chosen.to(self.device)]
        cells = maps.new_tensor([maps.shape[3], maps.shape[2]])
        pixels = (peaks(maps) + 0.5) / cells * maps.new_tensor([images.shape[2], images.shape[1]]) - 0.5
        return pixels.cpu().double().numpy()

    def _shown(self, images: np.ndarray) -> Tensor:
        return to_network_input(images).to(self.device)

    @torch.no_grad()
    def _seen(self, images: np.ndarray, tokens: Tensor, seed: int) -> Tensor:
        """Maps of images: means over turned and moved copies of each, turned back, of what is in them. All images are
        turned alike and have the same noise, so that an image's maps are the same whatever is beside it."""
        size, rng = (images.shape[1], images.shape[2]), np.random.default_rng(derive_seed(seed, "views"))
        views, whole = turns(self.settings.views, self.settings, size, rng).to(self.device), []
        for part in self._shown(images).split(_AT_ONCE):
            random = torch.Generator().manual_seed(derive_seed(seed, "noise of views"))
            total, counts = torch.zeros(1), torch.zeros(1)
            for view in views:
                how = view.expand(len(part), -1, -1)
                latents = self.latents(warped(part, how))
                noise = torch.randn((1, *latents.shape[1:]), generator=random)
                back, inside = unwarped(self.maps(latents, noise, tokens), how)
                total, counts = total.to(back) + back * inside, counts.to(back) + inside
            whole.append(total / counts.clamp(min=1))
        return torch.cat(whole)


class Keypoints:
    """What finds keypoints by a file of tokens: called with images (n, height, width, 3) uint8, it gives the places
    (n, keypoints, 2), (x, y) in pixels."""

    def __init__(self, file: str | Path, device: str = "cpu") -> None:
        self.found = Found.read(resolve_model(str(file)))
        self.seer = Seer(self.found.path, self.found.settings, device, self.found.random)

    def __call__(self, images: np.ndarray, seed: int = 0) -> np.ndarray:
        return self.seer.find(images, self.found, seed)
