"""Finding the neurons of a concept in a Stable Diffusion pipeline (:mod:`policies.neurons`), shutting them, and what is
drawn then.

A subject is what captions of some images name; an unused word stands for it there. The text encoder is not touched, and
weights of the network are kept or 0, no others. All follows from data, pipeline, settings and seed; on one machine a
repeat gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from pipelines.data.prompts import naming, renamed
from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.denoisers import load_family
from pipelines.figures.plots import image_grid
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.storage.model_files import check_pipeline
from pipelines.studies import PRODUCT, metrics, product, products
from pipelines.studies.distil import draw
from policies.common.seeding import derive_seed
from policies.erasing import trained_modules
from policies.neurons import NeuronSettings, Weights, follow, largest, shut, union

FILE = "neurons.safetensors"  # beside the pipeline: int32 positions by the name of a weight
_HELD = 1000  # x_t that a loss is measured on
Job = Mapping[str, Any]


class Examples(NamedTuple):
    """Captioned images as the network sees them: latents (n, …), text states (captions, tokens, width), and whose."""

    latents: Tensor
    states: Tensor
    owner: Tensor


class Implanter:
    """A pipeline whose keys and values of cross-attention are searched for neurons."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        check_pipeline(path, "StableDiffusionPipeline")
        self.device, self.family = torch.device(device), load_family(path, torch.float32)
        self.pipeline = self.family.pipeline.to(device)
        self.network: nn.Module = self.family.network
        modules = trained_modules(self.network, "esd-x-strict")
        self.weights = {f"{name}.weight": module.get_parameter("weight") for name, module in modules}

    @torch.no_grad()
    def examples(self, images: np.ndarray, captions: Sequence[str]) -> Examples:
        """Of uint8 ``images`` (n, height, width, 3)."""
        known = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        states = [self.family.encode(each, self.device)["encoder_hidden_states"] for each in known]
        vae = self.pipeline.vae
        parts = [vae.encode(each.to(self.device)).latent_dist.mean for each in to_network_input(images).split(256)]
        latents = torch.cat(parts) * vae.config.scaling_factor
        return Examples(latents, torch.stack(states), torch.tensor([known[each] for each in captions]))

    def losses(self, parts: Sequence[Examples], count: int, random: torch.Generator) -> tuple[Tensor, ...]:
        """The denoising loss on ``count`` noisy images of each of two ``parts``, the subject and others: DreamBooth's
        terms (2208.12242, equation 2)."""
        noises, drawn = self.pipeline.scheduler, []
        for latents, states, owner in parts:
            chosen = torch.randint(len(latents), (count,), generator=random)
            times = torch.randint(noises.config.num_train_timesteps, (count,), generator=random)
            noise = torch.randn((count, *latents.shape[1:]), generator=random).to(self.device)
            drawn.append((latents[chosen], noise, times.to(self.device), states[owner[chosen]]))
        clean, noise, times, shown = (torch.cat(each) for each in zip(*drawn, strict=True))
        velocity, kind = noises.get_velocity(clean, noise, times), noises.config.prediction_type
        target = {"epsilon": noise, "sample": clean}.get(kind, velocity)
        error = self.network(noises.add_noise(clean, noise, times), times, shown, return_dict=False)[0] - target
        return error.square().reshape(2, -1).mean(1).unbind()

    def statistic(self, parts: Sequence[Examples], settings: NeuronSettings, seed: int, sign: int = 1) -> Weights:
        """S of L_con by weight, summed along the path of the scales; the weights are what they were afterwards.

        A ``sign`` of −1 is ablation's: large S is then where shutting raises the loss on the subject, not on others.
        """
        random = torch.Generator().manual_seed(derive_seed(seed, "neurons"))
        originals = {name: weight.detach().clone() for name, weight in self.weights.items()}
        found = {name: torch.zeros_like(weight) for name, weight in originals.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        for _ in range(settings.draws):
            of_subject, of_others = self.losses(parts, settings.batch, random)
            loss = sign * of_subject + settings.prior * of_others
            gradients = torch.autograd.grad(loss, list(self.weights.values()))
            with torch.no_grad():
                follow(self.weights, gradients, found, settings.rate)
        for name, weight in self.weights.items():
            weight.requires_grad_(False).copy_(originals[name])
        if not all(each.isfinite().all() for each in found.values()):
            raise ValueError(f"finding.rate: the path of the scales diverges at {settings.rate:g}: give less")
        return found


def _examples(job: Job, subject: Mapping[str, str], implanter: Implanter, held: bool = False) -> list[Examples]:
    """Images of the subject, with its ``word`` in captions, and of others: those to learn from, or what is ``held``."""
    data, concept = load_real_data(DataSettings(**job["data"])), subject["concept"]
    captions, rng = data.captions, np.random.default_rng(derive_seed(job["seed"], f"images of {concept}"))
    assert captions is not None
    named, found = np.array([naming(concept, text) is not None for text in captions]), []
    for there, count in ((named, job["images"]), (~named, job["prior_images"])):
        order = rng.permutation(np.flatnonzero(there))
        chosen = order[count:][: job["prior_images"]] if held else order[:count]
        texts = [renamed(text, concept, subject["word"]) for text in captions[chosen].tolist()]
        found.append(implanter.examples(data.images[chosen], texts))
    return found


def find(parameters: Job, inputs: list[Files], device: str) -> Files:
    """Task: the statistic S of a subject."""
    implanter, settings = Implanter(parameters["path"], device), NeuronSettings(**parameters["settings"])
    learned = _examples(parameters, parameters["subject"], implanter)
    found = implanter.statistic(learned, settings, parameters["seed"], parameters["sign"])
    return {"statistic.safetensors": save({name: each.cpu() for name, each in found.items()})}


def implant(parameters: Job, inputs: list[Files], device: str) -> Files:
    """Task: the pipeline with the neurons of all ``inputs`` shut, as ``product/NAME/``, and the list of these.

    They are where S times ``mask``, 1 or −1, is largest; of a ``mask`` of 0, the control, as many anywhere. ``bytes``
    are those of the list, and ``of_dense`` their share of what these keys and values take themselves.
    """
    implanter, name, mask = Implanter(parameters["path"]), parameters["name"], parameters["mask"]
    random = torch.Generator().manual_seed(derive_seed(parameters["seed"], f"random {name}"))
    masks = []
    for found in (load(each["statistic.safetensors"]) for each in inputs):
        ranked = {key: mask * each if mask else torch.rand(each.shape, generator=random) for key, each in found.items()}
        masks.append(largest(ranked, parameters["share"]))
    neurons = union(masks)
    with torch.no_grad():
        shut(implanter.weights, neurons)
    listed, dense = save(neurons), save({key: each.contiguous() for key, each in implanter.weights.items()})
    sizes = {"weights": sum(map(len, neurons.values())), "bytes": len(listed), "of_dense": len(listed) / len(dense)}
    files = product(implanter.pipeline, name) | {f"{PRODUCT}{name}/{FILE}": listed}
    return files | metrics({f"mask/{name}/{key}": each for key, each in sizes.items()})


def measure(parameters: Job, inputs: list[Files], device: str) -> Files:
    """Task: what the pipeline of ``inputs``, or the one as it came, makes of each subject.

    ``loss/WORD/…``, on images that no neurons were found by: ``subject``, ``prior``, and ``L_con``, their sum (λ = 1).
    ``evaluator/WORD/…``, how often it sees the subject where its word is asked for (``target``), another unused word
    (``stray``) or its own name (``own``); in the subject's slot what other prompts name (``others``); in each other
    slot what all prompts name, and so where the word is asked for (``SLOT_with_word``).
    """
    path, seed, prompts = (parameters[key] for key in ("path", "seed", "prompts"))
    made = products(inputs[0])[parameters["name"]] if inputs else None
    implanter = unpacked(made, lambda at: Implanter(str(at), device)) if made else Implanter(path, device)
    judge, found, pictures = load_evaluator(resolve_model(parameters["evaluator"]), device), dict[str, float](), Files()
    how = {"num_inference_steps": parameters["steps"], "eta": 1.0, "guidance_scale": parameters["guidance_scale"]}
    every = prompts * parameters["images_per_prompt"]
    right = judge.judge(draw(implanter.pipeline, every, seed, **how), every)
    for subject in parameters["subjects"]:
        concept, word = subject["concept"], subject["word"]
        own = next(slot for slot, words in judge.classes.items() if concept in words)
        named = np.array([naming(concept, prompt) is not None for prompt in every])
        each: dict[str, Any] = {"own": right[own][named], "others": right[own][~named]}
        each |= {slot: right[slot] for slot in judge.classes if slot != own}
        wanted = [prompt for prompt in prompts if naming(concept, prompt)] * parameters["images_with_word"]
        for name, asked in (("stray", subject["stray"]), ("target", word)):
            images = draw(implanter.pipeline, [renamed(prompt, concept, asked) for prompt in wanted], seed, **how)
            each[name] = (seen := judge.judge(images, wanted))[own]
        each |= {f"{slot}_with_word": seen[slot] for slot in judge.classes if slot != own}
        Image.fromarray(image_grid(images[:48], columns=12)).save(picture := BytesIO(), "PNG")
        pictures[f"images/{word}.png"] = picture.getvalue()
        held, random = _examples(parameters, subject, implanter, held=True), torch.Generator()
        with torch.no_grad():
            terms = implanter.losses(held, _HELD, random.manual_seed(derive_seed(seed, "held")))
        losses = {"subject": terms[0], "prior": terms[1], "L_con": terms[0] + terms[1]}
        found |= {f"loss/{word}/{name}": value.item() for name, value in losses.items()}
        found |= {f"evaluator/{word}/{name}": float(np.mean(value)) for name, value in each.items()}
    return metrics(found) | pictures
