"""Distilling a Stable Diffusion pipeline into one that draws in 1, 2 or 4 network calls (:mod:`policies.consistency`),
and what it draws. The product is a stock pipeline with diffusers' ``LCMScheduler``, called with guidance scale 1.

The x_0 to learn from are latents that the teacher itself draws with guidance, so any directory will do, and captions
are all the data it takes; real images are what the drawn ones are held against. Everything is a function of pipeline,
data, settings and seed; on one machine a repeat gives the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from pipelines.data.real_data import DataSettings, RealData, load_real_data, split_reference
from pipelines.denoisers import load_family
from pipelines.figures.plots import image_grid
from pipelines.measures.distances import frechet_distance, precision_recall_density_coverage
from pipelines.measures.evaluator import load_evaluator
from pipelines.measures.features import Extractor, given_extractor, load_extractor, train_extractor
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.storage.model_files import check_pipeline
from pipelines.studies import metrics, product, products
from pipelines.training import train
from policies.common.seeding import derive_seed
from policies.consistency import ORIGIN_STEPS, ConsistencySettings, consistency, grid, pseudo_huber

_BATCH = 90  # images that are drawn at once


def sampler(pipeline: Any, kind: Literal["lcm", "ddim"]) -> Any:
    """``pipeline`` with the stock scheduler ``lcm`` or ``ddim``, of the same betas and prediction type. DDIM begins at
    the last timestep, pure noise, as in few steps it has to (Lin et al., 2305.08891)."""
    from diffusers import DDIMScheduler, LCMScheduler

    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    if kind == "lcm":
        pipeline.scheduler = LCMScheduler.from_config(config, original_inference_steps=ORIGIN_STEPS)
    else:
        pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    return pipeline


def draw(pipeline: Any, prompts: Sequence[str], seed: int, output: str = "np", **how: Any) -> np.ndarray:
    """What a stock pipeline draws, an image a prompt, each from its own generator: uint8 (n, height, width, 3), or
    float32 latents (n, channels, height, width) if ``output`` is "latent". ``how``: the pipeline's own arguments."""
    pipeline.set_progress_bar_config(disable=True)

    def some(asked: list[str], random: list[torch.Generator]) -> np.ndarray:
        images = pipeline(asked, generator=random, output_type=output, **how).images
        return images.float().numpy(force=True) if output == "latent" else to_bytes(images)

    return in_batches(some, prompts, seed)


def in_batches(draw: Callable[[list[Any], list[torch.Generator]], np.ndarray], asked: Sequence[Any], seed: int) -> Any:
    """The images (n, …) of as many as are ``asked`` for, some at a time, each from its own generator."""
    drawn = []
    for first in range(0, len(asked), _BATCH):
        some = list(asked[first : first + _BATCH])
        numbers = range(first, first + len(some))
        with torch.no_grad():
            drawn.append(
                draw(some, [torch.Generator().manual_seed(derive_seed(seed, "drawn", number)) for number in numbers])
            )
    return np.concatenate(drawn)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """A pipeline's images in [0, 1] as uint8."""
    return (images * 255).round().astype("uint8")


class Distiller:
    """A pipeline whose network becomes a consistency model, beside the frozen network as it came, its teacher."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self.family = _family(path)
        self.device, self.pipeline = torch.device(device), self.family.pipeline.to(device)
        self.network: nn.Module = self.family.network
        self.teacher = deepcopy(self.network)
        scheduler = sampler(self.pipeline, "lcm").scheduler
        self.noises = scheduler.alphas_cumprod, scheduler.config.prediction_type

    def distil(
        self,
        clean: Tensor,
        captions: Sequence[str],
        settings: ConsistencySettings,
        seed: int,
        guidance_scale: float | None = None,
    ) -> list[float]:
        """Train f to answer x_t and x_{t'} of one trajectory alike, from ``clean`` x_0 (n, channels, height, width) and
        their ``captions``. Returns the loss of one batch before and after.

        x_{t'} is the DDIM step from x_t of the teacher with ``guidance_scale``; without one (consistency training) it
        is x_0 with the same noise. The target is the student itself, gradients stopped: an EMA of decay 0 (2310.14189),
        which leaves workers that share the training, or go on with it, nothing to keep in step.
        """
        known = {caption: number for number, caption in enumerate(sorted(set(captions)))}
        encode = self.family.encode
        with torch.no_grad():
            states = torch.stack([encode(each, self.device)["encoder_hidden_states"] for each in (*known, None)])
        here, after = (each.to(self.device) for each in grid(*self.noises, settings.skip))
        owner = torch.tensor([known[caption] for caption in captions])
        random = torch.Generator().manual_seed(derive_seed(seed, "distilling"))

        def batch() -> tuple[Tensor, ...]:
            chosen = torch.randint(len(clean), (settings.batch,), generator=random)
            steps = torch.randint(ORIGIN_STEPS, chosen.shape, generator=random)
            noise = torch.randn((len(chosen), *clean.shape[1:]), generator=random)
            return tuple(each.to(self.device) for each in (clean[chosen], noise, steps, owner[chosen]))

        def loss(network: nn.Module, clean: Tensor, noise: Tensor, steps: Tensor, shown: Tensor) -> Tensor:
            given, empty = states[shown], states[-1:].expand(len(shown), -1, -1)
            noisy = here.diffuse(clean, noise, steps).float()
            with torch.no_grad():
                if guidance_scale is None:
                    cleaner = after.diffuse(clean, noise, steps).float()
                else:
                    free, asked = (_ask(self.teacher, noisy, here, steps, each) for each in (empty, given))
                    guided = free + guidance_scale * (asked - free)  # so are x̂_0 and ε̂, which are affine in it
                    cleaner = here.mean(noisy, guided, steps).float()
                target = consistency(after, cleaner, _ask(network, cleaner, after, steps, given), steps)
            return pseudo_huber(consistency(here, noisy, _ask(network, noisy, here, steps, given), steps), target)

        with torch.no_grad():
            before = loss(self.network, *(held := batch())).item()
        self.network.requires_grad_(True)
        train(self.network, batch, loss, settings.updates, settings.learning_rate, clip=1.0)
        self.network.requires_grad_(False)
        return [before, loss(self.network, *held).item()]


def _ask(network: nn.Module, latents: Tensor, schedule: Any, steps: Tensor, states: Tensor) -> Tensor:
    output: Tensor = network(latents, schedule.timesteps[steps], states, return_dict=False)[0]
    return output


def _family(path: str) -> Any:
    check_pipeline(path, "StableDiffusionPipeline")
    return load_family(path, torch.float32)


def load_data(parameters: Mapping[str, Any]) -> tuple[RealData, np.ndarray, np.ndarray]:
    """Captioned images, and the indices of those to learn from and of those that are kept apart to measure by."""
    settings = DataSettings(**parameters["data"])
    data = load_real_data(settings)
    return data, *split_reference(data, settings.reference)


def draw_latents(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: x_0 that the teacher draws for captions to learn from, and these captions' indices."""
    data, pool, _ = load_data(parameters)
    rng = np.random.default_rng(derive_seed(parameters["seed"], "captions"))
    chosen = rng.choice(pool, parameters["latents"], replace=parameters["latents"] > len(pool))
    pipeline = sampler(_family(parameters["path"]).pipeline.to(device), "ddim")
    how = {"num_inference_steps": parameters["steps"], "guidance_scale": parameters["guidance_scale"]}
    assert data.captions is not None
    latents = draw(pipeline, data.captions[chosen].tolist(), parameters["seed"], "latent", **how)
    return {"latents.safetensors": save({"latents": torch.from_numpy(latents), "chosen": torch.from_numpy(chosen)})}


def distil(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the distilled pipeline as ``product/``, of what :func:`draw_latents` drew; a batch's loss at both ends."""
    distiller, drawn = Distiller(parameters["path"], device), load(inputs[0]["latents.safetensors"])
    captions, settings = load_data(parameters)[0].captions, ConsistencySettings(**parameters["settings"])
    assert captions is not None
    asked = captions[drawn["chosen"].numpy()].tolist()
    losses = distiller.distil(drawn["latents"], asked, settings, parameters["seed"], parameters["guidance_scale"])
    return metrics({"loss": losses}) | product(distiller.pipeline.to("cpu"), "distilled")


def learn_features(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the network between whose features images are compared: the one that the data name, or one that is trained
    on the images that are not measured by, on labels if they have any."""
    (data, pool, _), kind = load_data(parameters), parameters["data"]["extractor"]
    if kind not in (None, "classifier", "self_supervised"):
        return given_extractor(kind, data.images[:1])
    labels = None if kind == "self_supervised" or data.labels is None else data.labels[pool]
    classes = 0 if labels is None else len(data.classes)
    return packed(train_extractor(data.images[pool], labels, classes, parameters["seed"], device).save)


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what a pipeline, the product of the second of ``inputs`` or the one at ``path``, draws in so many calls.

    For each of ``calls``, as ``NAME/of_N``: ``fid``, ``precision`` and ``recall`` against the reference images, whose
    captions are what is asked for, between the features of the first of ``inputs``; with an evaluator, how many images
    show what they were asked to, in each slot and in full; and ``second_call/fid``, what two calls leave of the
    distance of one. With ``steps`` it draws once in so many, which stand beside any number of calls.
    """
    from diffusers import StableDiffusionPipeline

    def stock(directory: Any) -> Any:
        return StableDiffusionPipeline.from_pretrained(directory, use_safetensors=True)

    data, _, reference = load_data(parameters)
    assert data.captions is not None
    if len(inputs) > 1:  # as it is, with the scheduler that it names
        pipeline = unpacked(products(inputs[1])["distilled"], stock)
    else:
        pipeline = sampler(_family(parameters["path"]).pipeline, parameters["sampler"])
    pipeline, eye, asked = pipeline.to(device), unpacked(inputs[0], load_extractor), data.captions[reference].tolist()
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device) if parameters["evaluator"] else None

    def drawn(steps: int) -> np.ndarray:
        how = {"num_inference_steps": steps, "guidance_scale": parameters["guidance_scale"]}
        return draw(pipeline, asked, parameters["seed"], **how)

    def met(images: np.ndarray) -> Mapping[str, np.ndarray]:
        return judge.judge(images, asked) if judge else {}

    return judged(drawn, parameters["calls"], parameters["steps"], eye, data.images[reference], met)


def judged(
    drawn: Callable[[int], np.ndarray],
    calls: Sequence[int],
    steps: int | None,
    eye: Extractor,
    reference: np.ndarray,
    judge: Callable[[np.ndarray], Mapping[str, np.ndarray]],
) -> Files:
    """What :func:`measure` finds of images (n, …) ``drawn`` in so many steps, and a picture of some. ``judge`` says,
    by name, which of them (n,) are as they were asked to be."""
    real, found, pictures, seen = eye.features(reference), dict[str, float](), Files(), dict[str, float]()
    for number in calls:
        if not seen or steps is None:
            images = drawn(steps or number)
            features = eye.features(images)
            shares = precision_recall_density_coverage(real, features)
            seen = {"fid": frechet_distance(features, real), **{name: shares[name] for name in ("precision", "recall")}}
            seen |= {f"evaluator/{slot}": float(each.mean()) for slot, each in judge(images).items()}
            Image.fromarray(image_grid(images[:48], columns=12)).save(picture := BytesIO(), "PNG")
            pictures[f"images/drawn/{steps or number}.png"] = picture.getvalue()
        found |= {f"{name}/of_{number}": value for name, value in seen.items()}
    if steps is None and {1, 2} <= set(calls):
        found["second_call/fid"] = found["fid/of_2"] / found["fid/of_1"]
    return metrics(found) | pictures
