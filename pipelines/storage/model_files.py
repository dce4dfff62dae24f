"""Files of models, read without torch and without trust: what is wrong is one error that names file or directory."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.storage import atomic
from pipelines.storage.locations import find

_STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call them
_MOST_LAYERS, _MOST = 1000, 10**9  # in a configuration: beyond, memory and time would end before the network begins
# Of what a network divides by or draws roots of, by the end of its name; of freq_shift, that of width / 2 − freq_shift.
_RANGES = {"_eps": (1e-12, 1), "_epsilon": (1e-12, 1), "scaling_factor": (1e-9, _MOST), "scale_factor": (1e-9, _MOST)}
_RANGES |= {"freq_shift": (0, 1)}
_TYPES = ("F64", "F32", "F16", "BF16")

Shapes = dict[str, list[int]]


class ModelFilesError(ValueError):
    """A model that cannot be used as it lies there: which directory or file, what is wrong, and what to do."""


def quieten() -> None:
    """Let diffusers and transformers say nothing but errors, unless their environment variables ask for more."""
    import diffusers
    import transformers

    for name, library in (("TRANSFORMERS_VERBOSITY", transformers), ("DIFFUSERS_VERBOSITY", diffusers)):
        if name not in os.environ:
            library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Whatever a library raises over the files of ``path`` becomes a ModelFilesError of one line that names it; lack of
    memory stays what it is."""
    try:
        yield
    except (ModelFilesError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(error).split())[:500]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ModelFilesError(f"{path}: {kind}{said}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        return atomic.read_json(file)
    except atomic.DamagedFiles as error:
        raise ModelFilesError(str(error)) from error


def check_pipeline(path: str, kind: str) -> None:
    """Raise ModelFilesError unless ``path`` is a directory of a diffusers pipeline of the class ``kind``."""
    directory = find(path)
    if directory is None or not directory.is_dir():
        raise ModelFilesError(f"path: there is no directory {path!r}; name one that save_pretrained wrote")
    if (found := read_json(directory / "model_index.json").get("_class_name")) != kind:
        raise ModelFilesError(f"path: {path!r} is a {found}; give a {kind}")


def read_config(file: Path) -> dict[str, Any]:
    """The configuration of a network in a JSON file, if its numbers are such as a network can have."""
    content = read_json(file)
    inner = [pair for value in content.values() if isinstance(value, dict) for pair in value.items()]
    for key, value in [*content.items(), *inner]:
        most = _MOST_LAYERS if "layers" in key else _MOST
        wanted = next((_RANGES[end] for end in _RANGES if key.endswith(end)), None)
        least, most = wanted or (-most, most)
        for number in value if isinstance(value, list) and not wanted else [value]:
            if not least <= number <= most if type(number) in (int, float) else wanted:
                raise ModelFilesError(f"{file}: {key} is {number!r}, which no network here has")
    return content


def load_whole(kind: Any, directory: object, device: str | None = None, unused: str = "", **options: Any) -> Any:
    """``kind.from_pretrained`` of safetensors, to be used and not trained; on the ``device`` "meta", shapes alone.

    Raises ModelFilesError where tensors are missing, which libraries leave random, or have another shape, but for those
    below a module ``unused``.
    """
    with reading(directory):
        if kind.__module__.startswith("transformers"):
            options["ignore_mismatched_sizes"] = True  # its own error is a table
        if device == "meta":
            options["device_map"] = {"": device}
        network, found = kind.from_pretrained(directory, output_loading_info=True, use_safetensors=True, **options)
        for problem in ("missing_keys", "mismatched_keys"):
            names = sorted(str(each if isinstance(each, str) else each[0]) for each in found[problem])
            if names := [name for name in names if not unused or unused not in name.split(".")]:
                what = "lacks" if problem == "missing_keys" else "holds other shapes of"
                raise ModelFilesError(f"{directory} {what} {len(names)} of its tensors, such as {names[0]}")
    return network.eval().to(device or network.device)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that libraries load from ``directory``: one, or the shards that an index names."""
    for stem in _STEMS:
        index = directory / f"{stem}.safetensors.index.json"
        if (single := directory / f"{stem}.safetensors").is_file():
            return [single]
        if index.is_file():
            places = read_json(index).get("weight_map")
            names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
            absent = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
            if absent or not names:
                raise ModelFilesError(
                    f"{index} names {absent[0] if absent else 'no file'}, which is not in its directory"
                )
            return [directory / name for name in names]
    variants = sorted(path.name for path in directory.glob("*.*.safetensors"))
    pickled = sorted(
        path.name for kind in ("bin", "ckpt", "pt", "pth", "msgpack", "h5") for path in directory.glob(f"*.{kind}")
    )
    found = f"only {(variants or pickled)[0]}" if variants or pickled else "no weights"
    why = "a variant is not loaded" if variants else "pickled weights are not opened" if pickled else "none to load"
    raise ModelFilesError(
        f"{directory} holds {found} ({why}): load it where it comes from and write it with save_pretrained(…, "
        f"safe_serialization=True) as {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors"
    )


def load_tokenizer(path: object) -> Any:
    """The tokenizer of a text model. Raises ModelFilesError where it knows no words, which libraries let pass."""
    from transformers import AutoTokenizer

    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("its tokenizer knows no words: put tokenizer.json beside its tokenizer_config.json")
    return tokenizer


def encoder_parts(directory: Path) -> list[Path]:
    """The directories of a sentence encoder's modules, in their order, if the transformers among them have weights."""
    index = directory / "modules.json"
    with reading(index):
        modules = json.loads(index.read_text(encoding="utf-8"))
        for module in modules:
            if module["type"].endswith(".Transformer"):
                weight_shapes(directory / module["path"])
        return [directory / module["path"] for module in modules]


def weight_shapes(directory: Path) -> Shapes:
    """Names and shapes of what :func:`weight_files` hold, from their headers."""
    from safetensors import safe_open

    shapes: Shapes = {}
    for file in weight_files(directory):
        with reading(file), safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                shapes[name] = list(part.get_shape())
                if name.endswith((".weight", ".bias")) and part.get_dtype() not in _TYPES:
                    kind = part.get_dtype()
                    raise ModelFilesError(
                        f"{file}: {name} is {kind}; known are {', '.join(_TYPES)}: bring it unquantised"
                    )
    if not shapes:
        raise ModelFilesError(f"{directory} holds no tensors")
    return shapes
