"""Erasing a concept that words name from a Stable Diffusion pipeline (:mod:`policies.erasing`), and what is left of it.

Everything is a function of the pipeline, the settings and the seed; on one machine a repeat gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pipelines.captioner import Captioner
from pipelines.data.prompts import naming, renamed
from pipelines.denoisers import load_family
from pipelines.figures.plots import image_grid
from pipelines.measures.evaluator import load_evaluator
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import CaptionerSettings, ModelSettings
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.storage.model_files import check_pipeline
from pipelines.studies import metrics, product, products
from pipelines.training import descend
from policies.common.seeding import derive_seed
from policies.erasing import ErasingSettings, Variant, esd_target, trained_modules, uce_weight
from policies.rl.settings import SamplingSettings


class Prompts(NamedTuple):
    """The prompts that name a concept, or the concept by itself where none does, and the ``others``.

    ``instead``: words that stand in its place in neutral prompts. Without any ∅ is neutral, as in the papers.
    """

    concept: str
    named: tuple[str, ...]
    others: tuple[str, ...]
    instead: tuple[str, ...]

    @classmethod
    def of(cls, concept: str, prompts: Sequence[str], instead: Sequence[str] = ()) -> "Prompts":
        """Those of ``prompts``."""
        named = tuple(each for each in prompts if naming(concept, each))
        return cls(concept, named or (concept,), tuple(each for each in prompts if each not in named), tuple(instead))

    def neutral(self, prompt: str) -> list[str | None]:
        """What one that names the concept is to be answered as."""
        return [renamed(prompt, self.concept, word) for word in self.instead] or [None]


class Eraser:
    """A pipeline whose network is edited, beside the frozen network as it came."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        check_pipeline(path, "StableDiffusionPipeline")
        self.device, self.family = torch.device(device), load_family(path, torch.float32)
        self.network: nn.Module = self.family.network.to(self.device)
        self.frozen = deepcopy(self.network)
        for encoder in self.family.text_encoders:
            encoder.to(self.device)
        self._states: dict[str | None, Tensor] = {}

    @torch.no_grad()
    def states(self, prompts: Sequence[str | None]) -> Tensor:
        """Text states (prompts, tokens, width); of None those of ∅, encoded as guidance's empty prompt is."""
        for prompt in {*prompts} - self._states.keys():
            self._states[prompt] = self.family.encode(prompt, self.device)["encoder_hidden_states"]
        return torch.stack([self._states[prompt] for prompt in prompts])

    def erase(self, prompts: Prompts, variant: Variant, settings: ErasingSettings, seed: int) -> list[float]:
        """Train until the prompts that name the concept are answered as neutral ones; UCE solves for it. Returns the
        loss of each update.

        In each round the frozen or the edited network draws images by guided DDIM, and updates follow on their x_t.
        """
        if variant == "uce":
            self._solve(prompts, settings.stiffness)
            return []
        schedule = self.family.schedule(SamplingSettings(steps=settings.steps))
        weights = [each for _, module in trained_modules(self.network, variant) for each in module.parameters()]
        optimizer = torch.optim.Adam((each.requires_grad_(True) for each in weights), lr=settings.learning_rate)
        falling = LambdaLR(optimizer, lambda update: 1 - update / (settings.rounds * settings.updates))
        random = torch.Generator().manual_seed(derive_seed(seed, "erasing"))
        losses = []
        for _ in range(settings.rounds):
            states, latents, targets = self._draw(prompts, settings, schedule, random)
            draw = partial(_some, latents, schedule.timesteps, states, targets, settings.batch, random)
            course = descend(self.network, draw, self._loss, settings.updates, optimizer, falling)
            losses += [loss.item() for _, loss in course]
        self.network.requires_grad_(False)
        return losses

    def _loss(self, network: nn.Module, latents: Tensor, times: Tensor, states: Tensor, target: Tensor) -> Tensor:
        return (self._ask(network, latents, times, states) - target).square().mean()

    @torch.no_grad()
    def _draw(
        self, prompts: Prompts, settings: ErasingSettings, schedule: Any, random: torch.Generator
    ) -> list[Tensor]:
        """Text states (images, tokens, width); x_t and what is to be answered there, each (steps, images, …)."""

        def pick(among: Sequence[str], count: int) -> list[str]:
            return [among[each] for each in torch.randint(len(among), (count,), generator=random).tolist()]

        kept = round(settings.retain * settings.images) if prompts.others else 0
        named = pick(prompts.named, settings.images - kept)  # the first images are those of the concept
        asked = [*named, *(pick(prompts.others, kept) if kept else [])]
        states = self.states(asked)
        latents = torch.randn((len(asked), *self.family.latent_shape), generator=random).to(self.device)
        seen, targets = [], []
        for step, time in enumerate(schedule.timesteps):
            answer, output = self._guided(self.frozen, latents, time, states, settings.guidance_scale)
            words = torch.randint(max(1, len(prompts.instead)), (len(named),), generator=random).tolist()
            neutral = [prompts.neutral(each)[word] for each, word in zip(named, words, strict=True)]
            free = self._ask(self.frozen, latents[: len(named)], time, self.states(neutral))
            seen.append(latents)
            targets.append(torch.cat([esd_target(free, answer[: len(named)], settings.eta), answer[len(named) :]]))
            if settings.sampler == "edited":
                _, output = self._guided(self.network, latents, time, states, settings.guidance_scale)
            latents = self.family.step(schedule, step, latents, output, torch.zeros_like(latents), 0.0)
        return [states, torch.stack(seen), torch.stack(targets)]

    @torch.no_grad()
    def _solve(self, prompts: Prompts, stiffness: float) -> None:
        """Map the concept's states, from its last token on, to those of neutral prompts at the same places, and keep
        all states of other prompts. (A causal encoder hands a word on to every token behind it.)"""
        concepts, guides = [], []
        for prompt in prompts.named:
            word = naming(prompts.concept, prompt)
            until = prompt[: word.end()] if word else prompt
            last = len(self.family.pipeline.tokenizer(until).input_ids) - 2  # the end token comes after it
            concepts.append(self.states([prompt])[0, last:])
            guides.append(self.states(prompts.neutral(prompt)).mean(dim=0)[last:])
        kept = self.states(prompts.others).flatten(0, 1) if prompts.others else concepts[0][:0]
        for _, module in trained_modules(self.network, "uce"):
            weight = module.get_parameter("weight")
            weight.copy_(uce_weight(weight, torch.cat(concepts), torch.cat(guides), kept, stiffness))

    def _guided(
        self, network: nn.Module, latents: Tensor, time: Tensor, states: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The output of ``network``, and what guidance away from ∅ makes of it."""
        answer = self._ask(network, latents, time, states)
        if scale == 1:
            return answer, answer
        empty = self._ask(network, latents, time, self.states([None] * len(latents)))
        return answer, empty + scale * (answer - empty)

    def _ask(self, network: nn.Module, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """The output of ``network`` at ``times``, one for all or one each."""
        return network(latents, times.to(self.device).expand(len(latents)), states, return_dict=False)[0]


def _some(
    latents: Tensor, times: Tensor, states: Tensor, targets: Tensor, count: int, random: torch.Generator
) -> tuple[Tensor, ...]:
    """Some of what :meth:`Eraser._draw` drew: x_t, the times, the text states and what is to be answered."""
    steps, images = latents.shape[:2]
    image, step = (torch.randint(most, (count,), generator=random) for most in (images, steps))
    return latents[step, image], times[step], states[image], targets[step, image]


def erase(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the pipeline without the concept in ``product/KEY/``, and the losses."""
    eraser, key = Eraser(parameters["path"], device), parameters["key"]
    settings = ErasingSettings(**parameters["settings"])
    prompts = Prompts.of(parameters["concept"], parameters["prompts"], parameters["instead"])
    losses = eraser.erase(prompts, parameters["variant"], settings, parameters["seed"])
    return metrics({f"{key}/loss": losses} if losses else {}) | product(eraser.family.pipeline.to("cpu"), key)


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what is left of a concept in the erased pipeline, or, without one, in the pipeline as it came.

    Of images for all prompts. The evaluator says how many show the concept where it is named (``target``), how many
    show what other prompts ask for in its slot (``others``) and in each other slot, and so where it is named
    (``SLOT_where_named``). The captioner says how many captions hold the word there (``mentioned``), and elsewhere.
    """
    concept, key, path, size = (parameters[each] for each in ("concept", "key", "path", "batch"))
    asked = list(parameters["prompts"]) * parameters["images_per_prompt"]
    seeds = [derive_seed(parameters["seed"], "judged", number) for number in range(len(asked))]
    sampling = SamplingSettings(steps=parameters["steps"], guidance_scale=parameters["guidance_scale"])

    def load(directory: Any) -> DiffusionPolicy:
        return DiffusionPolicy(ModelSettings(path=str(directory)), sampling, device)

    policy = unpacked(products(inputs[0])[key], load) if inputs else load(path)
    batches = [slice(first, first + size) for first in range(0, len(asked), size)]
    images = np.concatenate([policy.rollout(asked[each], seeds[each])[0] for each in batches])
    named = np.array([naming(concept, prompt) is not None for prompt in asked])
    found: dict[str, Any] = {}
    if parameters["evaluator"]:
        judge = load_evaluator(resolve_model(parameters["evaluator"]), device)
        own = next(slot for slot, words in judge.classes.items() if concept in words)
        right = judge.judge(images, asked)
        found |= {"target": right[own][named], "others": right[own][~named]}
        for slot in judge.classes.keys() - {own}:
            found |= {slot: right[slot][~named], f"{slot}_where_named": right[slot][named]}
    if parameters["captioner"]:
        captioner = Captioner(CaptionerSettings(path=parameters["captioner"]), device)
        captions = [text for each in batches for text in captioner.caption(images[each])]
        says = np.array([naming(concept, text) is not None for text in captions])
        found |= {"mentioned": says[named], "mentioned_elsewhere": says[~named]}
    Image.fromarray(image_grid(images[named][:48], columns=12)).save(grid := BytesIO(), "PNG")
    series = metrics({f"{key}/{name}": float(np.mean(each)) for name, each in sorted(found.items())})
    return series | {f"images/{key}.png": grid.getvalue()}
