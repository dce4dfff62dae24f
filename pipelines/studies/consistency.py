"""Consistency models of pixels (:mod:`policies.edm`): one is distilled from an EDM denoiser, one is trained without.

All are small UNets, conditional on labels where images have them, and each is saved as a stock
``ConsistencyModelPipeline`` with ``CMStochasticIterativeScheduler``: the teacher too, as what a consistency model is
without its training. Everything is a function of data, settings and seed; on one machine a repeat gives the same bytes.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.digits import DIGITS, IMAGE_SIZE, enlarged, tint
from pipelines.data.real_data import RealData
from pipelines.generators.diffusion import build
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.measures.features import load_extractor
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import product, products
from pipelines.studies.distil import in_batches, judged, load_data, to_bytes
from pipelines.training import Loss, train
from policies.common.seeding import derive_seed
from policies.consistency import pseudo_huber
from policies.edm import (
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    Denoise,
    denoised,
    denoising_weight,
    intervals,
    karras,
    lognormal_shares,
    lognormal_sigmas,
    solve,
    step,
)

Sigmas = Callable[[int, torch.Generator], tuple[Tensor, ...]]  # of each of so many images, one or two noise levels


def of_network(network: Any, labels: Tensor, smallest: float = 0.0) -> Denoise:
    """The network as a denoiser, or as a consistency function if ``smallest`` is σ_min, for images of ``labels``."""
    shown = labels if network.config.num_class_embeds else None

    def call(inputs: Tensor, times: Tensor) -> Tensor:
        output: Tensor = network(inputs, times, shown, return_dict=False)[0]
        return output

    return partial(denoised, call, smallest=smallest)


def learn_teacher(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: an EDM denoiser D of the images that are not measured by (2206.00364, equation 8 and table 1)."""

    def loss(network: Any, clean: Tensor, noise: Tensor, labels: Tensor, sigma: Tensor) -> Tensor:
        apart = of_network(network, labels)(clean + sigma * noise, sigma) - clean
        return (denoising_weight(sigma) * apart.square()).mean()

    return _trained(parameters, "teacher", _untrained(parameters, device), loss, lognormal_sigmas)


def distil(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the teacher, the product of the first of ``inputs``, as a consistency model (2303.01469, algorithm 2): f at
    σ_{n+1} is to be what the EMA of f is at σ_n, one step of Heun on by the teacher. Not divisible: the EMA is each
    worker's own, and would not be what it was where others go on."""
    teacher = _loaded(inputs[0], device).unet.eval().requires_grad_(False)
    network, target = deepcopy(teacher), deepcopy(teacher)
    grid = karras(parameters["points"]).float()

    def sigmas(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        step = torch.randint(len(grid) - 1, (count,), generator=random)
        return grid[step], grid[step + 1]

    def loss(network: Any, clean: Tensor, noise: Tensor, labels: Tensor, low: Tensor, high: Tensor) -> Tensor:
        noisy = clean + high * noise
        with torch.no_grad():
            for kept, new in zip(target.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - parameters["decay"])
            wanted = of_network(target, labels, SIGMA_MIN)(step(of_network(teacher, labels), noisy, high, low), low)
        return pseudo_huber(of_network(network, labels, SIGMA_MIN)(noisy, high), wanted)

    return _trained(parameters, "distilled", network, loss, sigmas, divisible=False)


def train_alone(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: a consistency model trained from scratch, without a teacher (2303.01469, algorithm 3, as improved in
    2310.14189): x at both ends of an interval is x_0 with the same noise, the target is the network itself, and the
    grid grows finer."""
    done, (first, last) = 0, parameters["intervals"]

    def sigmas(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal done
        grid = karras(intervals(done, parameters["updates"], first, last) + 1)
        done += 1
        step = torch.multinomial(lognormal_shares(grid), count, replacement=True, generator=random)
        return grid[step].float(), grid[step + 1].float()

    def loss(network: Any, clean: Tensor, noise: Tensor, labels: Tensor, low: Tensor, high: Tensor) -> Tensor:
        f = of_network(network, labels, SIGMA_MIN)
        with torch.no_grad():
            wanted = f(clean + low * noise, low)
        return pseudo_huber(f(clean + high * noise, high), wanted, 1 / (high - low).flatten())

    return _trained(parameters, "trained", _untrained(parameters, device), loss, sigmas)


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what the pipeline that is the product of the second of ``inputs`` draws in so many network calls, as
    :func:`pipelines.studies.distil.measure` finds it. ``sampler``: ``consistency``, the pipeline's own, or the ODE of
    its network as a denoiser, by ``euler`` or ``heun``. Labels asked for are those of the reference images."""
    (data, _, reference), pipeline = load_data(parameters), _loaded(inputs[1], device)
    labels, shape = _labels(data)[reference].tolist(), data.images.shape
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device) if parameters["evaluator"] else None

    def drawn(steps: int) -> np.ndarray:
        def some(labels: list[int], random: list[torch.Generator]) -> np.ndarray:
            if parameters["sampler"] == "consistency":
                how = {"class_labels": torch.tensor(labels), "num_inference_steps": steps, "generator": random}
                return to_bytes(pipeline(len(labels), **how, output_type="np").images)
            size = shape[3], *shape[1:3]
            noise = torch.stack([torch.randn(size, generator=each) for each in random]).to(device)
            denoise = of_network(pipeline.unet, torch.tensor(labels, device=device))
            images = solve(denoise, noise, steps, heun=parameters["sampler"] == "heun")
            return to_bytes((images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy(force=True))

        return in_batches(some, labels, parameters["seed"])

    def judge_digits(images: np.ndarray) -> dict[str, np.ndarray]:
        asked = [DIGITS[label] for label in labels]
        return {"digit": judge.judge(as_judged(images), asked)["digit"]} if judge else {}

    counts, eye = (parameters["calls"], parameters["steps"]), unpacked(inputs[0], load_extractor)
    return judged(drawn, *counts, eye, data.images[reference], judge_digits)


def as_judged(images: np.ndarray) -> np.ndarray:
    """Images as the evaluator knows them: grey digits as red ones on black, 16 pixels high."""
    if images.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3):
        return images
    count = len(images)
    return tint(enlarged(images[..., 0] / 255), ["red"] * count, ["black"] * count)


def _labels(data: RealData) -> np.ndarray:
    return np.zeros(len(data.images), np.int64) if data.labels is None else data.labels


def _untrained(parameters: Mapping[str, Any], device: str) -> Any:
    data, *_ = load_data(parameters)
    _, *size, channels = data.images.shape
    seed = derive_seed(parameters["seed"], "network")
    network = build(parameters["channels"], parameters["levels"], (channels, *size), len(data.classes) or None, seed)
    network.register_to_config(sample_size=size[0])  # the stock pipeline draws squares
    return network.to(device)


def _loaded(files: Files, device: str) -> Any:
    from diffusers import ConsistencyModelPipeline

    (made,) = products(files).values()
    pipeline = unpacked(made, partial(ConsistencyModelPipeline.from_pretrained, use_safetensors=True))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _trained(
    parameters: Mapping[str, Any], name: str, network: Any, loss: Loss, sigmas: Sigmas, divisible: bool = True
) -> Files:
    """The product ``name``: a stock pipeline of ``network`` after the updates of ``parameters``. The loss is of x_0,
    noise, labels and the σ's (batch, 1, 1, 1)."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    data, pool, _ = load_data(parameters)
    clean, labels = to_network_input(data.images[pool]), torch.from_numpy(_labels(data)[pool])
    random, count = torch.Generator().manual_seed(derive_seed(parameters["seed"], name)), parameters["batch"]

    def batch() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(clean), (count,), generator=random)
        noise = torch.randn((count, *clean.shape[1:]), generator=random)
        levels = [each.view(-1, 1, 1, 1) for each in sigmas(count, random)]
        return tuple(each.to(network.device) for each in (clean[chosen], noise, labels[chosen], *levels))

    network.train().requires_grad_(True)
    train(network, batch, loss, parameters["updates"], parameters["learning_rate"], clip=1.0, divisible=divisible)
    network.eval().requires_grad_(False)
    known = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "sigma_data": SIGMA_DATA}
    scheduler = CMStochasticIterativeScheduler(parameters["points"], **known)
    return product(ConsistencyModelPipeline(network.to("cpu"), scheduler), name)
