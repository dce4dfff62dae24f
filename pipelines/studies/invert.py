"""What a reward can be fooled with: images that please it, beside real ones and an independent judge.

Everything is a function of models, settings and seed; on one machine a repeat gives the same bytes. Images are uint8
(n, height, width, 3), one a prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.captioner import Captioner
from pipelines.data.digits import real_images
from pipelines.denoisers import load_family
from pipelines.figures.plots import image_grid
from pipelines.measures.evaluator import load_evaluator
from pipelines.rewards import Differentiable, Reward, load_reward, parse_options, score
from pipelines.scoring import captioned
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics, products
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings, bounded, evolve, seen_anew, total_variation

_REAL, _BATCH = 16, 128  # real images of each prompt; images drawn and scored at once


class Space(NamedTuple):
    """What is searched: arrays of a ``shape`` (channels, height, width), and how they become images, by default as they
    are: pixels. Latents have a ``decode`` to [−1, 1]."""

    shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor] | None = None

    def images(self, searched: Tensor) -> Tensor:
        """In [0, 1], (batch, 3, height, width)."""
        return (searched if self.decode is None else self.decode(searched) / 2 + 0.5).clamp(0, 1)

    def start(self, seed: int) -> Tensor:
        """What a search begins with: uniform pixels, normal latents."""
        draw = torch.rand if self.decode is None else torch.randn
        return draw(self.shape, generator=torch.Generator().manual_seed(seed))


def latents_of(path: str, device: str) -> Space:
    """The latents of the pipeline at ``path``, through its decoder."""
    family = load_family(path, torch.float32)
    family.pipeline.to(device)
    return Space(family.latent_shape, family.decode)


class Audit(NamedTuple):
    """What was found of a reward. By name, (n,): ``score``; ``real``, the mean score of real images of the prompt;
    ``over``, their difference; ``rank``, the share of these that score no better; ``gap``, the rank less 1 where the
    judge sees what was asked for; ``fooled``, where it does not and the rank is 1. ``seen``: what the judge sees, by
    slot and in full. ``example``: a real image of each prompt."""

    images: np.ndarray
    example: np.ndarray
    found: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]


class Auditor:
    """The reward ``name`` with its ``options``, the captioner if there is one, and a judge apart from both."""

    def __init__(self, name: str, options: Reward, captioner: Any, judge: Any, device: str, sign: float = 1.0) -> None:
        """``sign`` is −1 for a reward that a run is to lower."""
        self.captioner, self.judge, self.device, self.sign = captioner, judge, device, sign
        self.function = load_reward(name, options, device)
        self.pleased: Differentiable | None = options.resolved(name).differentiable(self.function, captioner)

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """The real reward (n,)."""
        parts = [slice(first, first + _BATCH) for first in range(0, len(images), _BATCH)]
        read = captioned(self.captioner, images) if self.captioner else None
        found = [score(self.function, images[each], prompts[each], read and read[each]) for each in parts]
        return self.sign * np.concatenate(found)

    def find(
        self, prompts: Sequence[str], space: Space, settings: InvertingSettings, seed: int, queries_only: bool = False
    ) -> np.ndarray:
        """Images that please it, from noise: by gradients where the reward has any, or else by queries alone."""
        start = torch.stack([space.start(derive_seed(seed, "start", number)) for number in range(len(prompts))])
        if self.pleased is None or queries_only:
            return self._evolved(start, prompts, space, settings, np.random.default_rng(derive_seed(seed, "queries")))
        random = torch.Generator().manual_seed(derive_seed(seed, "views"))
        searched = start.to(self.device).requires_grad_(True)
        optimizer = torch.optim.Adam([searched], lr=settings.learning_rate)
        for _ in range(settings.steps):
            images = space.images(searched)
            views = seen_anew(images, settings, random) if settings.views else images
            said = self.pleased(views, list(prompts) * max(1, settings.views)).view(-1, len(prompts)).mean(dim=0)
            loss = settings.variation * total_variation(images) - self.sign * said
            searched.grad = bounded(torch.autograd.grad(loss.sum(), searched)[0], settings.clip)
            optimizer.step()
            if space.decode is None:
                searched.data.clamp_(0, 1)
        return _drawn(space, searched)

    def _evolved(
        self, start: Tensor, prompts: Sequence[str], space: Space, settings: InvertingSettings, rng: np.random.Generator
    ) -> np.ndarray:
        def shown(searched: np.ndarray) -> np.ndarray:
            return _drawn(space, torch.from_numpy(searched.reshape(-1, *space.shape)).float().to(self.device))

        def score_all(searched: np.ndarray) -> np.ndarray:
            many = [prompt for prompt in prompts for _ in range(searched.shape[1])]
            return self.scores(shown(searched), many).reshape(searched.shape[:2])

        width = 0.2 if space.decode is None else 1.0  # pixels are in [0, 1]
        return shown(evolve(score_all, start.flatten(1).double().numpy(), settings.queries, rng, width))

    def audit(self, images: np.ndarray, prompts: Sequence[str], seed: int) -> Audit:
        """What the reward and the judge say of ``images``, of which each is asked about its prompt."""
        many = [prompt for prompt in prompts for _ in range(_REAL)]
        real = real_images(many, np.random.default_rng(derive_seed(seed, "real images")))
        known, scores = self.scores(real, many).reshape(-1, _REAL), self.scores(images, prompts)
        rank, seen = (known <= scores[:, None] + 1e-6).mean(axis=1), self.judge.judge(images, prompts)
        found = {"score": scores, "real": known.mean(axis=1), "over": scores - known.mean(axis=1), "rank": rank}
        found |= {"gap": rank - seen["full"], "fooled": (rank == 1) & ~seen["full"]}
        return Audit(images, real[::_REAL], found, seen)


@torch.no_grad()
def _drawn(space: Space, searched: Tensor) -> np.ndarray:
    """As images."""
    parts = [space.images(part).permute(0, 2, 3, 1) for part in searched.split(_BATCH)]
    return (torch.cat(parts) * 255).round().byte().numpy(force=True)


def audit_reward(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what pleases a reward, as metrics ``KEY/…``, the means of :class:`Audit`'s, and a picture of some of it.

    ``asked_as`` "others": each image is asked about as if it had been found for another prompt, a control. With an
    input, the model that this holds is the reward's option ``model``."""
    name, key, seed = (parameters[each] for each in ("reward", "key", "seed"))
    captioner = parameters["captioner"] and Captioner(CaptionerSettings(path=parameters["captioner"]), device)
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device)

    def load(directory: Any) -> Auditor:
        given = parameters["options"] | ({"model": str(directory)} if inputs else {})
        return Auditor(name, parse_options(name, given), captioner, judge, device)

    auditor = unpacked(products(inputs[0])["clip"], load) if inputs else load(None)
    prompts, size = list(parameters["prompts"]), judge.image_size
    space = latents_of(parameters["path"], device) if parameters["path"] else Space((3, size, size))
    images = auditor.find(prompts, space, InvertingSettings(**parameters["settings"]), seed)
    shift = len(prompts) // 2 if parameters["asked_as"] == "others" else 0
    _, _, found, seen = auditor.audit(images, [*prompts[shift:], *prompts[:shift]], seed)
    Image.fromarray(image_grid(images[:48], columns=12)).save(grid := BytesIO(), "PNG")
    shown = {f"{key}/{metric}": each for metric, each in found.items()}
    shown |= {f"evaluator/{key}/{slot}": each for slot, each in seen.items()}
    return metrics({n: float(each.mean()) for n, each in shown.items()}) | {f"images/{key}.png": grid.getvalue()}
