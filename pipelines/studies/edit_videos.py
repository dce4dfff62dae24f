"""Editing videos of moving digits (:mod:`pipelines.video_editor`): two teachers, their student, and what is measured.

No edited video is made but to be measured against. Everything is a function of pipeline, settings and seed; on one
machine a repeat gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    ControlNetModel,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from pipelines.animation import (
    control_network,
    controlled,
    decode_videos,
    draw_videos,
    encode_videos,
    fit,
    learn_motion,
    motion_network,
    text_states,
)
from pipelines.data.digits import INKS, Split, caption, parse, tint
from pipelines.data.motion import Videos, moving, paths
from pipelines.denoisers import load_family
from pipelines.figures.dragging import animation, strip
from pipelines.measures.evaluator import load_evaluator
from pipelines.measures.motion import flicker, identity, position, travelled
from pipelines.measures.places import coverage
from pipelines.rl.weights import exported, plain
from pipelines.settings import FittingSettings, MotionSettings
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.studies import PRODUCT, metrics, product, products
from pipelines.video_editor import Editor, draw_edits, student_of
from policies.common.seeding import derive_seed
from policies.factorised import AligningSettings

_SHOWN, _FRAME_MS, _ZOOM = 4, 160, 4


class Edits:
    """``videos`` that are to be edited: the digit in another ink, chosen by chance; ``captions`` of what they are to
    be, and ``edited`` (n, frames, height, width, 3) uint8, what they would be."""

    def __init__(self, videos: Videos, seed: int) -> None:
        self.videos, rng = videos, np.random.default_rng(derive_seed(seed, "edits"))
        slots = [{name: str(word) for name, word in parse(text).items()} for text in videos.captions]
        inks = [str(rng.choice([ink for ink in INKS if ink != each["ink"]])) for each in slots]
        self.captions = [caption(each["digit"], ink, each["ground"]) for each, ink in zip(slots, inks, strict=True)]
        count, grounds = videos.videos.shape[1], [each["ground"] for each in slots]
        frames = coverage(videos.videos.reshape(-1, *videos.videos.shape[2:]))
        inked, ground = (np.repeat(each, count).tolist() for each in (inks, grounds))
        self.edited = tint(frames, inked, ground).reshape(videos.videos.shape)
        self.inputs = torch.from_numpy(videos.videos).permute(0, 1, 4, 2, 3) / 255


def _edits(parameters: Mapping[str, Any], split: Split, of: str, count: int, frames: int) -> Edits:
    seed = derive_seed(parameters["seed"], of)
    return Edits(moving(paths(count, frames, seed, parameters["fastest"]), split, seed), seed)


def _pipeline(parameters: Mapping[str, Any], device: str) -> StableDiffusionPipeline:
    pipeline = load_family(parameters["path"], torch.float32).pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def learn_edits(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the edit teacher's adapter, of single frames in one ink and the same ones in another. The product is a
    ControlNet."""
    pipeline, settings = _pipeline(parameters, device), FittingSettings(**parameters["fitting"])
    seed = derive_seed(parameters["seed"], "edit teacher")
    control = control_network(pipeline.unet, seed).to(device)
    data = _edits(parameters, "train", "pairs", parameters["pairs"], 1)
    latents, states = encode_videos(pipeline, data.edited), text_states(pipeline, [*data.captions, ""])

    def frames(random: torch.Generator) -> tuple[Tensor, Tensor]:
        which = torch.randint(parameters["pairs"], (settings.batch_size, 1), generator=random)
        return which, torch.zeros_like(which)

    def predicted(
        network: nn.Module, noisy: Tensor, times: Tensor, which: Tensor, when: Tensor, hidden: Tensor
    ) -> Tensor:
        told = states[which[:, 0].masked_fill(hidden, len(states) - 1)]
        return controlled(pipeline.unet, network, noisy, times, told, data.inputs[which[:, 0].cpu()].to(noisy.device))

    fit(control, pipeline.scheduler, latents, frames, predicted, settings, seed)
    control.register_to_config(_name_or_path="")
    return {f"{PRODUCT}edits/{name}": content for name, content in packed(control.save_pretrained).items()}


def learn_videos(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the video teacher, motion modules that learnt from captioned videos, none of them edited. The product is an
    ``AnimateDiffPipeline``."""
    pipeline, settings = _pipeline(parameters, device), FittingSettings(**parameters["fitting"])
    seed, frames = derive_seed(parameters["seed"], "video teacher"), parameters["frames"]
    modules = MotionSettings(heads=parameters["heads"], longest=frames, middle=parameters["middle"])
    network = motion_network(pipeline.unet, modules, seed).to(device)
    data = moving(paths(parameters["videos"], frames, seed, parameters["fastest"]), "train", seed)
    learn_motion(pipeline, network, data.videos, data.captions, settings, seed)
    return product(_animate_diff(pipeline.to("cpu"), network.to("cpu"), data.videos.shape[2:4]), "videos")


def _animate_diff(pipeline: Any, network: UNetMotionModel, canvas: tuple[int, ...], **more: Any) -> Any:
    """``pipeline`` with ``network`` in place of its UNet, and its canvas; with a ControlNet, one that edits videos."""
    shrink = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    network.register_to_config(sample_size=[each // shrink for each in canvas])
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    kind = AnimateDiffControlNetPipeline if more else AnimateDiffPipeline
    return kind(**parts, unet=network, motion_adapter=None, **more)


def _editor(parameters: Mapping[str, Any], inputs: Sequence[Files], device: str) -> Editor:
    """Of the teachers, the first two of ``inputs``."""
    found = {name: files for each in inputs[:2] for name, files in products(each).items()}
    control = unpacked(found["edits"], ControlNetModel.from_pretrained)
    return Editor(_pipeline(parameters, device), control.to(device), _motion_of(found["videos"], device))


def _motion_of(files: Files, device: str) -> UNetMotionModel:
    return unpacked(files, AnimateDiffPipeline.from_pretrained).unet.to(device)


def draw_teachers(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what critics are to take for real: frames as the edit teacher edits them, and videos that the video teacher
    draws for the captions of the edited."""
    editor, count, frames = _editor(parameters, inputs, device), parameters["real"], parameters["frames"]
    steps, seed = parameters["teacher_steps"], derive_seed(parameters["seed"], "real")
    data = _edits(parameters, "train", "real", count, frames)
    states = text_states(editor.pipeline, data.captions)
    when = torch.randint(frames, (count,), generator=torch.Generator().manual_seed(seed))
    shown = data.inputs[torch.arange(count), when][:, None].to(device)
    drawn = draw_edits(editor.pipeline, editor.frame_said, states, shown, steps, seed)
    told = {"steps": steps, "guidance_scale": parameters["guidance_scale"], "size": data.videos.videos.shape[2:4]}
    videos = draw_videos(editor.pipeline, editor.motion, data.captions, seed, frames, **told)
    real = {"frames": drawn, "inputs": shown, "videos": encode_videos(editor.pipeline, videos)[0]}
    found = {name: each.cpu().contiguous() for name, each in (real | {"states": states}).items()}
    return {"real.safetensors": save(found)}


def align(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the student, of the teachers and what they drew. The product edits videos as a stock
    ``AnimateDiffControlNetPipeline``; its LoRA, which is merged there, lies by itself in ``lora``."""
    editor, settings = _editor(parameters, inputs, device), AligningSettings(**parameters["aligning"])
    seed = derive_seed(parameters["seed"], "student")
    data = _edits(parameters, "train", "aligned", parameters["videos"], parameters["frames"])
    states, real = text_states(editor.pipeline, data.captions), load(inputs[2]["real.safetensors"])
    drawn = {name: each.to(device) for name, each in real.items()}
    unseen = torch.zeros(len(drawn["videos"]), *data.inputs.shape[1:], device=device)
    pools = {
        "frames": (drawn["frames"], drawn["states"], drawn["inputs"]),
        "videos": (drawn["videos"], drawn["states"], unseen),
    }
    student = student_of(editor.motion, settings.rank, seed)
    course = editor.align(student, states, data.inputs.to(device), pools, settings, seed)
    lora = {name: each.cpu() for name, each in exported(student).items()}
    with plain(student):
        parts = editor.pipeline.to("cpu"), student.cpu(), data.inputs.shape[3:]
        files = product(_animate_diff(*parts, controlnet=editor.control.cpu()), "editor")
    alone = packed(partial(AnimateDiffPipeline.save_lora_weights, unet_lora_layers=lora))
    return metrics(course) | files | {f"{PRODUCT}editor/lora/{name}": content for name, content in alone.items()}


def load_editor(files: Files) -> AnimateDiffControlNetPipeline:
    """The product of :func:`align`. Its motion modules are its UNet's, but diffusers insists on being told."""
    return unpacked(files, partial(AnimateDiffControlNetPipeline.from_pretrained, motion_adapter=None))


def judge(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: an arm's edits of videos of digits that nothing was trained on, what they are worth, and pictures.

    ``edit``: the share of frames that show the digit in the ink that was asked for, where the input's is; ``flicker``:
    of what does not move (:func:`pipelines.measures.motion.flicker`); ``change``: from frame to frame as they are;
    ``motion``: the length of the path as a share of the input's; ``position``: pixels from the input's place;
    ``error``: mean |difference| to the edited input, of pixels in [0, 1]. Those of teachers are of ``teacher_steps``,
    and as ``few/…`` of as many calls as the student makes.
    """
    pipeline, arm, calls = _pipeline(parameters, device), parameters["arm"], parameters["calls"]
    parts, times = {name: files for each in inputs for name, files in products(each).items()}, [calls]
    if "editor" in parts:
        whole = load_editor(parts["editor"]).to(device)
        network, control = whole.unet, whole.controlnet
    else:
        times.insert(0, parameters["teacher_steps"])
        control = unpacked(parts["edits"], ControlNetModel.from_pretrained).to(device)
        network = _motion_of(parts["videos"], device) if "videos" in parts else pipeline.unet
    data = _edits(parameters, "test", "judged", parameters["drawn"], parameters["frames"])
    states, shown = text_states(pipeline, data.captions), data.inputs.to(device)
    evaluator = load_evaluator(resolve_model(parameters["evaluator"]), device)
    said, seed = partial(controlled, network, control), derive_seed(parameters["seed"], "drawn")
    seen = []
    for steps in times:
        latents = draw_edits(pipeline, said, states, shown, steps, seed)
        videos = decode_videos(pipeline, latents[:, :1].expand_as(latents) if arm == "static" else latents)
        seen.append((videos, measured(videos, data, evaluator)))
    few = {f"few/{name}": value for name, value in seen[-1][1].items()}
    return metrics(seen[0][1] | few) | drawings(seen[0][0], data, arm)


def measured(videos: np.ndarray, data: Edits, judge: Any) -> dict[str, float]:
    """What :func:`judge` says of the edited ``videos``."""
    columns = data.videos.columns
    apart = np.abs(videos.astype(np.float32) - data.edited) / 255
    return {
        "edit": float(identity(videos, columns, data.captions, judge).mean()),
        "flicker": float(flicker(videos, columns).mean()),
        "change": float(np.abs(np.diff(videos.astype(np.float32), axis=1)).mean() / 255),
        "motion": float((travelled(videos) / travelled(data.videos.videos)).mean()),
        "position": float(position(videos, columns).mean()),
        "error": float(apart.mean()),
    }


def drawings(videos: np.ndarray, data: Edits, name: str) -> Files:
    """Some inputs, and below each the edited one: all frames beside each other, and as they move."""

    def large(image: np.ndarray) -> Image.Image:
        return Image.fromarray(image.repeat(_ZOOM, 0).repeat(_ZOOM, 1))

    pairs = [each for row in range(min(_SHOWN, len(videos))) for each in (data.videos.videos[row], videos[row])]
    strip([[large(frame) for frame in video] for video in pairs]).save(picture := BytesIO(), "PNG")
    moments = [
        strip([[large(each[at]) for each in pairs[::2]], [large(each[at]) for each in pairs[1::2]]])
        for at in range(videos.shape[1])
    ]
    moments += moments[-2:0:-1]  # and back, as a video that begins anew would leap
    return {f"figures/{name}.png": picture.getvalue(), f"figures/{name}.gif": animation(moments, _FRAME_MS, _FRAME_MS)}
