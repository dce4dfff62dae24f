"""Families by name, imported when they are used."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.generators import Generator
from pipelines.generators import settings as families
from pipelines.storage.atomic import Files
from policies.rl.settings import Settings

SETTINGS: dict[str, type[Settings]] = {
    "gaussian": families.GaussianSettings,
    "categorical": families.CategoricalSettings,
    "mixture": families.MixtureSettings,
    "gan": families.GanSettings,
    "diffusion": families.DiffusionSettings,
}
# The truth of a closed-form family is a distribution, its fit is arithmetic, and it draws as cheaply as it reads.
CLOSED_FORM = ("gaussian", "categorical", "mixture")
CONDITIONAL = ("diffusion",)


def generator_class(family: str) -> Any:
    """The class that implements a family."""
    return getattr(importlib.import_module(f"pipelines.generators.{family}"), f"{family.capitalize()}Generator")


def packed(save: Callable[[Path], Any]) -> Files:
    """The files that ``save(directory)`` writes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save(directory)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def unpacked(files: Files, load: Callable[[Path], Any]) -> Any:
    """What ``load(directory)`` makes of ``files``."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            target = Path(name) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return load(Path(name))


def load_generator(family: str, files: Files, device: str = "cpu") -> Generator:
    """The fitted generator that ``packed(generator.save)`` holds."""
    return unpacked(files, lambda directory: generator_class(family).load(directory, device))
