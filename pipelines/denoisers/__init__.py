"""The families of diffusion models, one file each behind :class:`pipelines.denoisers.family.Family`, and what a
directory has to hold to be of one. Importable without torch."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pipelines.denoisers.schedulers import ASSUMED, DdimConfig, DenoisingSteps, FlowConfig, read_scheduler
from pipelines.storage import model_files
from pipelines.storage.locations import find, resolve_model
from pipelines.storage.model_files import ModelFilesError, Shapes, read_json, reading

if TYPE_CHECKING:
    from pipelines.denoisers.family import Family
    from policies.rl.settings import SamplingSettings


@dataclass(frozen=True)
class _Kind:
    """A family: its file and class, its network, the parts it cannot be without, and, of the network's configuration,
    ``addition_embed_type``; ``packed``: whether it reads two by two latents as one token, and its channels are theirs;
    ``embeds_guidance``: whether guidance is told to the network, which then needs no second call without a prompt."""

    place: str
    network: str = "unet"
    parts: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    embedding: str | None = None
    packed: bool = False
    embeds_guidance: bool = False


_TWO_TEXTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_KINDS = {
    "StableDiffusionPipeline": _Kind("stable_diffusion:StableDiffusion"),
    "StableDiffusionXLPipeline": _Kind(
        "stable_diffusion_xl:StableDiffusionXL", parts=_TWO_TEXTS, embedding="text_time"
    ),
    "StableDiffusion3Pipeline": _Kind("stable_diffusion_3:StableDiffusion3", "transformer", _TWO_TEXTS),
    "FluxPipeline": _Kind("flux:Flux", "transformer", _TWO_TEXTS, packed=True, embeds_guidance=True),
    "AnimateDiffPipeline": _Kind("animate_diff:AnimateDiff"),
    "DDIMPipeline": _Kind("pixels:Pixels", parts=()),
    "DDPMPipeline": _Kind("pixels:Pixels", parts=()),
}
# Of a network's configuration: inputs and outputs that the stock pipelines give and take, and nothing does here.
_UNKNOWN = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "quantization_config")

_OF_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
_RECTANGULAR = "pixels:Pixels", "stable_diffusion:StableDiffusion", "animate_diff:AnimateDiff"
_FRAMES = 16  # that AnimateDiff's stock pipeline draws
_LARGEST = 4096  # channels, or numbers on a side, of what is denoised


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory, read but not loaded: nothing here asks it again, so it may be gone. ``parts``: library and
    class of each; ``absent``: those it does without; ``image_size``: height and width of what it draws, in pixels;
    ``shapes``: of the tensors of those parts that hold any; ``network``: the configuration of what is trained;
    ``frames``: of a video, which stand below each other in its image and in what is denoised."""

    directory: Path
    kind: _Kind
    parts: Mapping[str, tuple[str, str]]
    absent: Sequence[str]
    scheduler: DdimConfig | FlowConfig
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    shapes: Mapping[str, Shapes]
    network: Mapping[str, Any]
    frames: int = 1

    @property
    def knows_prompts(self) -> bool:
        """Whether prompts change what it draws."""
        return bool(self.kind.parts)


def inspect(directory: Path) -> ModelFiles:
    """What ``directory`` holds. Raises ModelFilesError naming the file, class or field that cannot be used."""
    index = read_json(directory / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _KINDS:
        raise ModelFilesError(f"model.path {str(directory)!r} is a {name}; known are {', '.join(_KINDS)}")
    kind, parts, absent = _KINDS[name], {}, []
    for part, entry in index.items():
        if isinstance(entry, list) and (entry == [None, None] or part in ("safety_checker", "feature_extractor")):
            absent.append(part)
        elif isinstance(entry, list):
            if len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
                raise ModelFilesError(
                    f"{directory}/model_index.json: {part} is {entry}, of neither diffusers nor transformers"
                )
            parts[part] = (entry[0], str(entry[1]))
    for part in (kind.network, "scheduler", *kind.parts):
        if part not in parts or not (directory / part).is_dir():
            raise ModelFilesError(f"{directory} has no {part}, which a {name} cannot be without")
    models = [part for part in parts if not part.startswith(("scheduler", "tokenizer", "feature_extractor"))]
    configs = {part: model_files.read_config(directory / part / "config.json") for part in models}
    scheduler = _scheduler(directory / "scheduler" / "scheduler_config.json", index)
    with reading(directory / kind.network / "config.json"):
        frames = _frames(configs[kind.network], kind)
        shape = _latent_shape(configs[kind.network], configs.get("vae"), kind)
        shape = shape[0], frames * shape[1], shape[2]
    for part in parts:
        held = {file.name for file in (directory / part).glob("*")} if part.startswith("tokenizer") else set()
        if part.startswith("tokenizer") and not any(held >= files for files in _OF_TOKENIZERS):
            raise ModelFilesError(f"{directory / part} holds no tokenizer.json, nor vocab.json and merges.txt")
    with reading(directory / "vae" / "config.json"):
        doublings = len(configs["vae"]["block_out_channels"]) - 1 if "vae" in configs else 0
    size = shape[1] << doublings, shape[2] << doublings
    shapes = {part: model_files.weight_shapes(directory / part) for part in models}
    network = {**configs[kind.network], "_class_name": parts[kind.network][1]}
    return ModelFiles(directory, kind, parts, absent, scheduler, shape, size, shapes, network, frames)


def is_distilled(path: str, sampling: "SamplingSettings") -> bool:
    """Whether a model is sampled as one that was made for few steps, of which it may be asked for fewer."""
    directory = find(path)
    if sampling.method or directory is None:
        return sampling.method in ("consistency", "tcd")
    file = directory / "scheduler" / "scheduler_config.json"
    return getattr(_scheduler(file, read_json(directory / "model_index.json")), "own", "sde") in ("consistency", "tcd")


def denoising_steps(path: str, sampling: "SamplingSettings") -> DenoisingSteps:
    """What samplers and learners of a model do; of one that is still on the hub, by an assumption. Raises ValueError
    where there are no such steps."""
    directory = find(path)
    if directory is None:
        is_flow = any(name in path.lower() for name in ("stable-diffusion-3", "flux"))
        return (FlowConfig() if is_flow else ASSUMED).steps(sampling)
    index = read_json(directory / "model_index.json")
    file = directory / "scheduler" / "scheduler_config.json"
    with reading(file):
        return _scheduler(file, index).steps(sampling)


def _scheduler(file: Path, index: Mapping[str, Any]) -> DdimConfig | FlowConfig:
    """Of both classes, that of the index, which is loaded, and the one that wrote the file."""
    content = read_json(file)
    with reading(file):
        entry = index.get("scheduler") or (None, None)
        read_scheduler({"_class_name": entry[1], **content}, index["_class_name"])
        return read_scheduler({**content, "_class_name": entry[1]}, index["_class_name"])


def network_calls(path: str, guidance_scale: float) -> int:
    """Of a model's network for one step: two where guidance compares with what it says without a prompt. One that is
    still on the hub is known by its name alone."""
    directory = find(path)
    told = inspect(directory).kind.embeds_guidance if directory else "flux" in path.lower()
    return 2 if guidance_scale > 1 and not told else 1


def check_lora(files: ModelFiles, targets: Sequence[str]) -> None:
    """Raise ValueError unless LoRA can bind to modules of each of ``targets``: linear layers or convolutions."""
    network = files.shapes[files.kind.network]
    for target in targets or ("",):
        found = [s for name, s in network.items() if f".{name}".endswith(f".{target}.weight")]
        if not found or any(len(shape) not in (2, 4) for shape in found):
            what = (
                "matches no module of the network"
                if not found
                else "is a layer that is neither linear nor a convolution"
            )
            raise ValueError(
                f"model.lora_targets: LoRA target {target!r} {what} in {files.directory / files.kind.network}"
            )


def _frames(network: Mapping[str, Any], kind: _Kind) -> int:
    """How many frames a network draws. Raises ValueError."""
    if kind.place != "animate_diff:AnimateDiff":
        return 1
    places = network.get("motion_max_seq_length")
    if type(places) is not int or places < 2:
        raise ValueError(f"motion_max_seq_length {places!r} leaves no frames to draw: it is no UNetMotionModel")
    return min(_FRAMES, places)


def _latent_shape(network: Mapping[str, Any], vae: Mapping[str, Any] | None, kind: _Kind) -> tuple[int, int, int]:
    """(channels, height, width) of a network's input. Raises ValueError if it is none that can be sampled here."""
    for field in _UNKNOWN:
        if network.get(field) is not None:
            raise ValueError(
                f"{field} {network[field]!r} is not supported: this network wants more than its stock pipeline's prompt"
            )
    if network.get("addition_embed_type") != kind.embedding:
        raise ValueError(f"addition_embed_type is {network.get('addition_embed_type')!r}, not {kind.embedding!r}")
    channels, size = network.get("in_channels"), network.get("sample_size")
    if kind.packed:
        channels, size = _unpacked(channels, vae or {})
    old = re.match(r"0\.[0-8]\.", str(network.get("_diffusers_version")))
    if old and kind.place == "stable_diffusion:StableDiffusion" and type(size) is int and size < 64:
        size = 64  # what the stock pipeline takes such a file to mean
    sides = [size, size] if not isinstance(size, list) else size
    if not all(type(each) is int and 0 < each <= _LARGEST for each in (channels, *sides)) or len(sides) != 2:
        raise ValueError(f"in_channels {channels!r} and sample_size {size!r} do not give the size of what it denoises")
    if sides[0] != sides[1] and kind.place not in _RECTANGULAR:
        raise ValueError(f"sample_size {size!r}: this family draws squares")
    for what, other in {
        "out_channels": channels if kind.packed else network.get("out_channels") or channels,
        "the autoencoder's latent_channels": (vae or {}).get("latent_channels", channels),
    }.items():
        if other != channels:
            raise ValueError(f"in_channels is {channels} and {what} {other}: they have to be the same")
    return channels, *sides


def _unpacked(packed: Any, vae: Mapping[str, Any]) -> tuple[Any, Any]:
    """Channels and side of the latents of a network that reads them two by two and does not say how large they are: of
    the images that its autoencoder was made for, or 128. Raises ValueError."""
    if type(packed) is not int or packed % 4:
        raise ValueError(f"in_channels {packed!r} are not those of two by two latents")
    size = vae.get("sample_size")
    side = size >> (len(vae.get("block_out_channels", ())) - 1) if type(size) is int else 128
    if side % 2:
        raise ValueError(f"latents of the autoencoder's sample_size {size!r} cannot be read two by two")
    return packed // 4, side


def check_guidance(files: ModelFiles, guidance_scale: float) -> None:
    """Raise ValueError if prompts are to guide what knows none."""
    if not files.knows_prompts and guidance_scale > 1:
        raise ValueError(
            f"model.path {str(files.directory)!r} knows no prompts that could guide it: set sampling.guidance_scale=1"
        )
    if files.kind.embeds_guidance and not files.network.get("guidance_embeds") and guidance_scale > 1:
        raise ValueError(
            f"model.path {str(files.directory)!r} was distilled without guidance (its transformer has guidance_embeds "
            "false): set sampling.guidance_scale=1"
        )


def check_cache(files: ModelFiles, cache: tuple[int, int] | None, key: str = "sampling.cache") -> None:
    """Raise ValueError unless features of the model's network can be kept as the setting ``key`` says."""
    from pipelines.denoisers import deep_cache

    if cache:
        try:
            deep_cache.check(files.network, cache[1])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def load_family(path: str, dtype: Any, device: str | None = None) -> "Family":
    """The pipeline of a directory or hub name, with frozen parts of ``dtype``, as its family. Raises ModelFilesError.

    On the ``device`` "meta" it has shapes and no numbers.
    """
    model_files.quieten()
    resolved = resolve_model(path)
    if find(path) is None:
        from diffusers import DiffusionPipeline

        resolved = DiffusionPipeline.download(path, use_safetensors=True, safety_checker=None, feature_extractor=None)
    files = inspect(Path(resolved))
    if files.frames > 1 and find(path) is None:
        raise ModelFilesError(
            f"model.path {path!r} draws videos: save it to a directory here, which is read beforehand"
        )
    with reading(files.directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what diffusers will call differently one day
        return resolve_name(f"pipelines.denoisers.{files.kind.place}").load(files, dtype, device)
