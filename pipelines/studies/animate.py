"""Animating one image of a digit (:mod:`pipelines.animator`): what is learnt, and what the videos are judged by.

Everything is a function of the pipeline, the settings and the seed; on one machine a repeat gives the same bytes.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel
from PIL import Image
from torch import Tensor, nn

from pipelines.animation import (
    Frames,
    decode_videos,
    encode_videos,
    fit,
    motion_network,
    whole_videos,
)
from pipelines.animator import Animator, boxes
from pipelines.data.digits import load_split
from pipelines.data.motion import Videos, moving, paths
from pipelines.denoisers import load_family
from pipelines.figures.dragging import animation, strip
from pipelines.measures.evaluator import load_evaluator
from pipelines.measures.motion import flicker, identity, position, unshifted
from pipelines.measures.places import coverage
from pipelines.settings import FittingSettings, MotionSettings
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import PRODUCT, metrics, products
from policies.common.seeding import derive_seed

_SHOWN, _FRAME_MS, _ZOOM, _COLOURS = 4, 125, 4, 48  # few, as a GIF is to be small


def learn_appearance(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: encoder, ControlNet and denoiser, on single frames, as products that diffusers' own classes read."""
    pipeline, settings = _pipeline(parameters, device), FittingSettings(**parameters["fitting"])
    animator = Animator(pipeline, derive_seed(parameters["seed"], "animator"), parameters["frozen"]).to(device)
    count, frames, batch = parameters["videos"], parameters["length"], settings.batch_size

    def single(random: torch.Generator) -> tuple[Tensor, Tensor]:
        return _any(random, count, batch, 1), _any(random, frames, batch, 1)

    _fit(animator, pipeline, parameters, settings, single, "appearance")
    return {f"{PRODUCT}{name}": content for name, content in packed(animator.save).items()}


def learn_order(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: motion modules, on windows of frames, with all that the first of ``inputs`` has learnt frozen.
    The product is a ``UNetMotionModel``. ``shuffled``: each frame is another video's, so time tells nothing."""
    pipeline, settings = _pipeline(parameters, device), FittingSettings(**parameters["fitting"])
    animator = _animator(pipeline, inputs[:1], device).requires_grad_(False)
    seed = derive_seed(parameters["seed"], "modules")
    network = motion_network(animator.denoiser, MotionSettings(**parameters["modules"]), seed).to(device)
    animator.denoise_with(network)
    count, frames, batch = parameters["videos"], parameters["length"], settings.batch_size

    def mixed(random: torch.Generator) -> tuple[Tensor, Tensor]:
        return _any(random, count, batch, frames), _any(random, frames, batch, frames)

    chosen = mixed if parameters["shuffled"] else whole_videos(count, frames, batch)
    _fit(animator, pipeline, parameters, settings, chosen, "motion")
    return {f"{PRODUCT}motion/{name}": content for name, content in packed(network.save_pretrained).items()}


def animate(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: videos of references that nothing has learnt from, by the networks in ``inputs``, and what they are.

    ``identity``: share of frames whose square at the commanded place shows the reference's digit and ink;
    ``position``: pixels from there; ``flicker``: mean |change| once the motion is undone, of pixels in [0, 1], and
    ``seams``: that where one window ends and the next begins, if they have nothing in common; ``handwriting``: share of
    the others of its digit that a frame is farther from than from the reference."""
    pipeline, seed = _pipeline(parameters, device), derive_seed(parameters["seed"], "drawn")
    animator, judge = (
        _animator(pipeline, inputs, device),
        load_evaluator(resolve_model(parameters["evaluator"]), device),
    )
    ways = paths(parameters["drawn"], parameters["frames"], seed, parameters["fastest"])
    wanted = moving(ways, "test", seed)
    given, length = references(wanted), parameters["length"]
    latents = encode_videos(pipeline, given[:, None])[0][:, 0].to(device) if parameters["referenced"] else None
    shape = encode_videos(pipeline, wanted.videos[:1, :1])[0].shape[2:]
    how = {name: parameters[name] for name in ("steps", "guidance_scale", "length", "overlap")}
    poses = boxes(wanted.columns).to(device)
    videos = decode_videos(pipeline, animator.draw(pipeline.scheduler, latents, poses, shape, seed, **how))
    place = videos, wanted.columns
    change, near = flicker(*place), handwriting(wanted, given, *place)
    borders = change[:, length - 1 :: length]
    found = {
        "identity": identity(*place, wanted.captions, judge).mean(),
        "position": position(*place).mean(),
        "flicker": change.mean(),
        "seams": borders.mean() if borders.size else np.nan,
        "handwriting": near.mean(),
    }
    return metrics({name: float(value) for name, value in found.items()}) | _pictures(given, wanted, videos)


def references(wanted: Videos) -> np.ndarray:
    """What a video's digit looks like, (n, 16, 16, 3) uint8: its square, wherever it is."""
    return unshifted(wanted.videos[:, :1], wanted.columns[:, :1])[:, 0]


def handwriting(wanted: Videos, given: np.ndarray, videos: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """The share (n, frames) of the other test digits of its class whose ink is farther from a frame's than the
    reference's is, whatever the colours: ½ where the class is all that is right. All are put where their ink's centre
    of gravity is commanded."""
    squares = unshifted(videos, commanded)
    drawn, labels = (
        coverage(squares.reshape(-1, *squares.shape[2:])).reshape(squares.shape[:4]),
        load_split("test").labels,
    )
    every = moving(np.full((len(labels), 1), videos.shape[3] / 2), "test", 0, np.arange(len(labels)))
    others, own = coverage(references(every)), coverage(given)
    found = []
    for frames, reference, row in zip(drawn, own, wanted.rows, strict=True):
        alike = others[(labels == labels[row]) & (np.arange(len(labels)) != row)]
        far = np.linalg.norm(frames[:, None] - alike, axis=(2, 3))
        found.append((far > np.linalg.norm(frames - reference, axis=(1, 2))[:, None]).mean(axis=1))
    return np.array(found)


def _pipeline(parameters: Mapping[str, Any], device: str) -> StableDiffusionPipeline:
    return load_family(parameters["path"], torch.float32).pipeline.to(device)


def _animator(pipeline: Any, inputs: list[Files], device: str) -> Animator:
    """Of what the first of ``inputs`` has learnt and, if there is another, with its motion modules."""
    kinds = {"encoder": UNet2DConditionModel, "controlnet": ControlNetModel, "denoiser": UNet2DConditionModel}
    kinds |= {"motion": UNetMotionModel}
    parts = {name: files for each in inputs for name, files in products(each).items()}
    found = {name: unpacked(files, kinds[name].from_pretrained) for name, files in parts.items()}
    animator = Animator(pipeline)
    animator.encoder.load_state_dict(found["encoder"].state_dict())
    animator.control.load_state_dict(found["controlnet"].state_dict())
    animator.denoise_with(found.get("motion", found["denoiser"]))
    return animator.to(device).eval()


def _any(random: torch.Generator, most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=random)


def _fit(
    animator: Animator, pipeline: Any, parameters: Mapping[str, Any], settings: FittingSettings, frames: Frames, of: str
) -> None:
    seed = derive_seed(parameters["seed"], "videos")
    videos = moving(paths(parameters["videos"], parameters["length"], seed, parameters["fastest"]), "train", seed)
    shown, poses = encode_videos(pipeline, references(videos)[:, None])[0][:, 0], boxes(videos.columns)

    def predicted(
        network: nn.Module, noisy: Tensor, times: Tensor, which: Tensor, when: Tensor, hidden: Tensor
    ) -> Tensor:
        """A reference is hidden from all of a batch, or from none."""
        which, when = which.cpu(), when.cpu()
        whose = which[:, :1] if (which == which[:, :1]).all() else which
        reference = None if hidden[0] else shown[whose.flatten()].to(noisy.device)
        return network(noisy, times, poses[which, when].to(noisy.device), reference)

    latents = encode_videos(pipeline, videos.videos)
    fit(animator, pipeline.scheduler, latents, frames, predicted, settings, derive_seed(seed, of))


def _pictures(given: np.ndarray, wanted: Videos, videos: np.ndarray) -> Files:
    """Some references, and beside each what was commanded and what was drawn: all frames, and as they move."""

    def large(image: np.ndarray) -> Image.Image:
        return Image.fromarray(image.repeat(_ZOOM, 0).repeat(_ZOOM, 1))

    side = given.shape[2]
    known = np.full((len(given), *videos.shape[2:]), 255, np.uint8)
    known[:, :, side // 2 : side // 2 + side] = given
    rows = [[large(each) for each in (known[row], *videos[row])] for row in range(min(_SHOWN, len(given)))]
    strip(rows).save(picture := BytesIO(), "PNG")
    moved = [
        strip([[large(each[row]) for each in (known, wanted.videos[:, at], videos[:, at])] for row in range(len(rows))])
        for at in range(videos.shape[1])
    ]
    small = [each.quantize(_COLOURS, dither=Image.Dither.NONE) for each in moved]
    return {"figures/videos.png": picture.getvalue(), "figures/videos.gif": animation(small, _FRAME_MS, _FRAME_MS)}
