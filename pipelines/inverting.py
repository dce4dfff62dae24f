"""What a reward can be fooled with: images that please it, beside real ones and an independent judge.

Everything is a function of models, settings and seed; on one machine a repeat gives the same bytes. Images are uint8
(n, height, width, 3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.captioner import Captioner
from pipelines.data.digits import real_images
from pipelines.figures.plots import image_grid
from pipelines.measures.evaluator import load_evaluator
from pipelines.rewards import Differentiable, Reward, load_reward, parse_options, score
from pipelines.scoring import captioned
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics, products
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings, bounded, evolve, moved, total_variation

_REAL, _BATCH = 16, 128  # real images of each prompt; images scored at once
_SAME = 1e-6  # scores that differ by less are equal

Decode = Callable[[Tensor], Tensor]  # (batch, channels, height, width), what is searched, to images in [0, 1]


@dataclass(frozen=True)
class Space:
    """What is searched: ``shape`` (channels, height, width) of it, and how it becomes images; pixels by default."""

    shape: tuple[int, int, int]
    decode: Decode | None = None

    def images(self, searched: Tensor) -> Tensor:
        """In [0, 1], (batch, 3, height, width)."""
        return self.decode(searched).clamp(0, 1) if self.decode else searched.clamp(0, 1)

    def starts(self, seed: int, prompts: Sequence[str]) -> Tensor:
        """Noise as a search begins with, (prompts, …), each from its own generator: uniform pixels, normal latents."""
        draw = torch.randn if self.decode else torch.rand
        random = [torch.Generator().manual_seed(derive_seed(seed, "start", number)) for number in range(len(prompts))]
        return torch.stack([draw(self.shape, generator=each) for each in random])


def latents_of(path: str, device: str) -> Space:
    """The latents of the pipeline at ``path``, and its decoder."""
    from pipelines.denoisers import load_family

    family = load_family(path, torch.float32)
    family.pipeline.to(device)
    return Space(family.latent_shape, lambda latents: (family.decode(latents) + 1) / 2)


def invert(
    pleased: Differentiable,
    prompts: Sequence[str],
    space: Space,
    settings: InvertingSettings,
    seed: int,
    device: str = "cpu",
) -> np.ndarray:
    """An image a prompt that pleases ``pleased``, by gradients from noise (:mod:`policies.inverting`)."""
    random = torch.Generator().manual_seed(derive_seed(seed, "views"))
    searched = space.starts(seed, prompts).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([searched], lr=settings.learning_rate)
    for _ in range(settings.steps):
        images = space.images(searched)
        seen, asked = images, list(prompts)
        if settings.views:
            seen = moved(images, settings, lambda count: torch.rand(count, generator=random))
            asked = asked * settings.views
        gain = pleased(seen, asked).view(-1, len(prompts)).mean(dim=0)
        loss = settings.variation * total_variation(images) - gain
        searched.grad = bounded(torch.autograd.grad(loss.sum(), searched)[0], settings.clip)
        optimizer.step()
        if space.decode is None:
            with torch.no_grad():
                searched.clamp_(0, 1)
    with torch.no_grad():
        return _bytes(space.images(searched))


def search(
    scores: Callable[[np.ndarray, Sequence[str]], np.ndarray],
    prompts: Sequence[str],
    space: Space,
    settings: InvertingSettings,
    seed: int,
    device: str = "cpu",
) -> np.ndarray:
    """An image a prompt that scores well, found with ``settings.queries`` scores of it at most and nothing else."""

    def drawn(searched: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            flat = torch.from_numpy(searched.reshape(-1, *space.shape)).float().to(device)
            return np.concatenate([_bytes(space.images(part)) for part in flat.split(_BATCH)])

    def score_all(searched: np.ndarray) -> np.ndarray:
        asked = [prompt for prompt in prompts for _ in range(searched.shape[1])]
        return scores(drawn(searched), asked).reshape(searched.shape[:2])

    start = space.starts(seed, prompts).flatten(1).double().numpy()
    rng = np.random.default_rng(derive_seed(seed, "search"))
    return drawn(evolve(score_all, start, settings.queries, rng, 1.0 if space.decode else 0.2))


def _bytes(images: Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8 (n, height, width, 3)."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().numpy(force=True)


@dataclass(frozen=True)
class Audit:
    """What was found of a reward, an image a prompt: ``images``; their ``scores`` (n,); ``real`` (n, m), the scores of
    real images of the prompt, of which ``example`` (n, height, width, 3) has the first; and ``seen``: by slot and in
    full, whether the judge sees what was asked for (n,) bool."""

    prompts: list[str]
    images: np.ndarray
    scores: np.ndarray
    real: np.ndarray
    example: np.ndarray
    seen: Mapping[str, np.ndarray]

    @property
    def rank(self) -> np.ndarray:
        """The share of real images that score no better (n,)."""
        return (self.real <= self.scores[:, None] + _SAME).mean(axis=1)

    @property
    def passes(self) -> np.ndarray:
        """Which images no real one of their prompt scores better than (n,)."""
        return self.rank == 1

    @property
    def gap(self) -> np.ndarray:
        """What the reward says beyond what the judge sees (n,): the rank, less 1 where it was right."""
        return self.rank - self.seen["full"]

    @property
    def fooled(self) -> np.ndarray:
        """Which images pass though the judge does not see what was asked for (n,)."""
        return self.passes & ~self.seen["full"]


class Auditor:
    """A reward function by ``name`` with its ``options``, a captioner if it needs one, and a judge apart from both."""

    def __init__(self, name: str, options: Reward, captioner: Any, judge: Any, device: str, sign: float = 1.0) -> None:
        """``sign`` is −1 for a reward that a run is to lower."""
        reward = options.resolved(name)
        self.captioner, self.judge, self.device, self.sign = captioner, judge, device, sign
        self.function = load_reward(name, options, device)
        raised = reward.differentiable(self.function, captioner)
        self.pleased: Differentiable | None = raised and (lambda images, prompts: sign * raised(images, prompts))

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """The real reward (n,)."""
        parts = [slice(first, first + _BATCH) for first in range(0, len(images), _BATCH)]
        read = captioned(self.captioner, images) if self.captioner else None
        found = [score(self.function, images[each], prompts[each], read and read[each]) for each in parts]
        return self.sign * np.concatenate(found)

    def search(self, prompts: Sequence[str], space: Space, settings: InvertingSettings, seed: int) -> np.ndarray:
        """Images by gradients, where the reward has any, or else by queries."""
        if self.pleased:
            return invert(self.pleased, prompts, space, settings, seed, self.device)
        return search(self.scores, prompts, space, settings, seed, self.device)

    def audit(self, images: np.ndarray, prompts: Sequence[str], seed: int) -> Audit:
        """What the reward and the judge say of ``images``, of which each is asked about its prompt."""
        many = [prompt for prompt in prompts for _ in range(_REAL)]
        real = real_images(many, np.random.default_rng(derive_seed(seed, "real images")))
        known = self.scores(real, many).reshape(len(prompts), _REAL)
        seen = self.judge.judge(images, prompts)
        return Audit(list(prompts), images, self.scores(images, prompts), known, real[::_REAL], seen)


def audit_reward(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what a reward is pleased with, as metrics ``KEY/…``, and a picture of the first images.

    ``asked_as`` "others": each image is asked about as if it had been found for another prompt, a control. With an
    input, the model that this holds is the reward's option ``model``."""
    key, seed = parameters["key"], parameters["seed"]
    captioner = parameters["captioner"] and Captioner(CaptionerSettings(path=parameters["captioner"]), device)
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device)

    def load(directory: Any) -> Auditor:
        given = parameters["options"] | ({"model": str(directory)} if directory else {})
        return Auditor(parameters["reward"], parse_options(parameters["reward"], given), captioner, judge, device)

    auditor = unpacked(products(inputs[0])["clip"], load) if inputs else load(None)
    prompts, settings = list(parameters["prompts"]), InvertingSettings(**parameters["settings"])
    side = judge.image_size
    space = latents_of(parameters["path"], device) if parameters["path"] else Space((3, side, side))
    images = auditor.search(prompts, space, settings, seed)
    shift = len(prompts) // 2 if parameters["asked_as"] == "others" else 0
    found = auditor.audit(images, [*prompts[shift:], *prompts[:shift]], seed)
    shares = {
        "passes": found.passes,
        "rank": found.rank,
        "gap": found.gap,
        "fooled": found.fooled,
        "score": found.scores,
    }
    shares |= {"real": found.real, **{f"seen_{slot}": right for slot, right in found.seen.items()}}
    Image.fromarray(image_grid(images[:48], columns=12)).save(grid := BytesIO(), "PNG")
    numbers = metrics({f"{key}/{name}": float(np.mean(each)) for name, each in shares.items()})
    return numbers | {f"images/{key}.png": grid.getvalue()}
