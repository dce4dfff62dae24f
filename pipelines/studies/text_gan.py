"""What a GigaGAN is held against: itself without pairs that do not match, one kernel in place of a bank, a diffusion
model by DDIM, and an enlargement that nothing has learned. Tasks of the study ``text_gan``."""

import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.editing import as_bytes
from pipelines.figures.plots import image_grid
from pipelines.generators.gigagan import GigaGan, GigaGanSettings
from pipelines.gigagan_networks import halved
from pipelines.measures.distances import frechet_distance, precision_recall_density_coverage
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.measures.features import load_extractor
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics, products
from pipelines.studies.distil import draw, load_data, sampler
from policies.loops.samples import Samples

_SHOWN, _EACH = 8, 12  # prompts of a picture, and images of each
_ROUNDS = 5  # of a race


def learn(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: a generator, fitted to the images that nothing is measured by, and the CPU seconds that took."""
    data, pool, _ = load_data(parameters)
    assert data.captions is not None
    settings = GigaGanSettings(**parameters["settings"])
    begun = time.process_time()
    known = Samples(data.images[pool][None], captions=data.captions[pool][None])
    model = GigaGan.fit(settings, known, [parameters["seed"]], device=device)
    spent = time.process_time() - begun
    files = packed(model.save)
    return metrics({"fit/cpu_seconds": spent}) | {f"product/gigagan/{name}": files[name] for name in files}


def judge(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what the product of the second of ``inputs``, or else the pipeline at ``path``, draws for the captions of
    the reference images: how far it is from them between the features of the first of ``inputs``, and how much of it
    shows what it is asked for, at the evaluator's size. Of one that enlarges, ``enlarged/fid`` is what its distance is
    of that of the same images enlarged bilinearly."""
    data, _, reference = load_data(parameters)
    assert data.captions is not None
    eye, asked, seed = unpacked(inputs[0], load_extractor), data.captions[reference].tolist(), parameters["seed"]
    real, found = eye.features(data.images[reference]), dict[str, float]()
    drawn = _drawing(parameters, inputs[1:], device)
    images = drawn(asked, seed)
    features = eye.features(images)
    found |= {"fid": frechet_distance(features, real), **precision_recall_density_coverage(real, features)}
    if parameters["evaluator"]:
        known = load_evaluator(resolve_model(parameters["evaluator"]), device)
        seen = _small(images, known.image_size)
        found |= {f"evaluator/{slot}": float(each.mean()) for slot, each in known.judge(seen, asked).items()}
    if inputs[1:] and (model := _load(inputs[1], device)).settings.upsample > 1:
        plain = eye.features(_bilinear(model, asked, seed))
        found["bilinear/fid"] = frechet_distance(plain, real)
        found["enlarged/fid"] = found["fid"] / found["bilinear/fid"]
    prompts = sorted(set(asked))[:: max(1, len(set(asked)) // _SHOWN)][:_SHOWN]
    shown = drawn([prompt for prompt in prompts for _ in range(_EACH)], seed + 1)
    Image.fromarray(image_grid(shown, columns=_EACH)).save(picture := BytesIO(), "PNG")
    return metrics(found) | {"images/by_prompt.png": picture.getvalue()}


def race(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: CPU seconds an image of the generator and of DDIM, in turns in one thread: the medians, and the median of
    how many times the latter is of the former. Both have read the captions before, as each is read once."""
    data, _, reference = load_data(parameters)
    assert data.captions is not None
    count = parameters["timed"]
    asked = (data.captions[reference].tolist() * count)[:count]
    players = {"gigagan": _drawing(parameters, inputs, device), "ddim": _drawing(parameters, [], device)}
    threads, spent = torch.get_num_threads(), dict[str, list[float]]()
    torch.set_num_threads(1)
    try:
        for number in range(_ROUNDS + 1):
            for name, drawn in players.items():
                begun = time.process_time()
                drawn(asked, number)
                if number:  # the first round warms up
                    spent.setdefault(name, []).append((time.process_time() - begun) / len(asked))
    finally:
        torch.set_num_threads(threads)
    ratio = median(slow / fast for fast, slow in zip(spent["gigagan"], spent["ddim"], strict=True))
    return metrics({f"speed/{name}_seconds": median(each) for name, each in spent.items()} | {"speed/ratio": ratio})


def _drawing(
    parameters: Mapping[str, Any], inputs: Sequence[Files], device: str
) -> Callable[[Sequence[str], int], np.ndarray]:
    """What draws an image for each prompt: the product of ``inputs``, or the stock pipeline by DDIM."""
    if inputs:
        model = _load(inputs[0], device)
        return lambda prompts, seed: model.drawn(prompts, seed, 1.0)
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(resolve_model(parameters["path"]), use_safetensors=True)
    pipeline = sampler(stock, "ddim").to(device)
    how = {"num_inference_steps": parameters["steps"], "guidance_scale": parameters["guidance_scale"]}
    return lambda prompts, seed: draw(pipeline, prompts, seed, **how)


def _load(files: Files, device: str) -> GigaGan:
    return unpacked(products(files)["gigagan"], lambda directory: GigaGan.load(directory, device))


def _bilinear(model: GigaGan, prompts: Sequence[str], seed: int) -> np.ndarray:
    """The same images as a generator that enlarges draws, enlarged bilinearly."""
    styles = model.styles(len(prompts), seed, prompts=prompts)
    with torch.inference_mode():
        small = model.networks[0].synthesis(styles.w, styles.conditions["local"])[0][-1]
        large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    return as_bytes(large)


def _small(images: np.ndarray, size: int) -> np.ndarray:
    """``images`` as they are, or halved until they are of that size."""
    shown = to_network_input(images)
    while shown.shape[-1] > size:
        shown = halved(shown)
    return as_bytes(shown)
