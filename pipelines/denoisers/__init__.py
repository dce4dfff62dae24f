"""The families of diffusion models, one file each behind :class:`pipelines.denoisers.family.Family`."""

import json
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pipelines.locations import find, resolve_model

if TYPE_CHECKING:
    from pipelines.denoisers.family import Family

_FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "DDIMPipeline": "pixels:Pixels",
    "DDPMPipeline": "pixels:Pixels",
}


def family_of(path: str) -> str:
    """File and class of the family that ``path``, a directory or hub name, belongs to. Raises ValueError if of none."""
    directory = find(path)
    if directory is not None:
        index = json.loads((directory / "model_index.json").read_text())
    else:
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(resolve_model(path))
    name = index.get("_class_name")
    if name not in _FAMILIES:
        raise ValueError(f"model.path {path!r} is a {name}; known are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def check_family(path: str, guidance_scale: float) -> None:
    """Raise ValueError if the model of ``path`` is of no known family, or knows no prompts that could guide it."""
    if family_of(path) == "pixels:Pixels" and guidance_scale > 1:
        raise ValueError(f"model.path {path!r} knows no prompts that could guide it: set sampling.guidance_scale=1")


def load_family(path: str, dtype: Any) -> "Family":
    """The pipeline of a directory or hub name, with frozen parts of ``dtype``, as its family."""
    return resolve_name(f"pipelines.denoisers.{family_of(path)}").load(resolve_model(path), dtype)
