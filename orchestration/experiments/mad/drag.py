"""Dragging points of an image with the GAN that a MAD run has fitted, or that is a study's product."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestration.cluster.forks import ACTORS
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.lineage import chain_of
from orchestration.runs.config import ConfigError, validate
from orchestration.runs.manifest import check_links, read_manifest
from orchestration.runs.seal import check_seal
from pipelines.generators import FAMILY, GENERATORS, load_generator
from pipelines.generators.adversarial import Adversarial
from pipelines.storage.atomic import read_json
from pipelines.storage.tasks import TaskStore
from policies.drag import DragSettings

_FRAMES = 40  # of an animation, at most


class Dragged(NamedTuple):
    """What came of a drag: of each point where it is believed to be and how far that is from its target, in pixels;
    whether all have arrived, after how many updates; the mean |error| of an image that was drawn again; and files."""

    points: list[list[float]]
    distances: list[float]
    arrived: bool
    updates: int
    error: float | None
    files: list[Path]


def drag(
    source: Path,
    handles: Sequence[str],
    targets: Sequence[str],
    mask: Path | None,
    image: Path | None,
    prompt: str | None,
    chosen: tuple[str | None, int | None, int | None],
    seed: int,
    settings: DragSettings,
    output: Path,
    trusted: bool = False,
) -> Dragged:
    """Drag the ``handles`` ("x,y" in pixels) of the image of a ``seed``, or of one that is drawn again first, to the
    ``targets``, and write a strip (PNG) and an animation (GIF) into ``output``. ``chosen``: arm, seed and generation of
    a MAD run, None for the first arm that can be dragged, its first seed, the last generation that is stored. Raises
    ConfigError."""
    os.environ.update(ACTORS | os.environ)  # before torch is imported
    pairs = _places("--from", handles), _places("--to", targets)
    if len(pairs[0]) != len(pairs[1]):
        raise ConfigError(f"{len(pairs[0])} --from and {len(pairs[1])} --to: give a --to for each --from, in order")
    if not pairs[0]:
        raise ConfigError("nothing is dragged: give --from x,y and --to x,y, in pixels of the image")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is out of range: seeds are 0 to 2**63 - 1")
    generator, height, width = _open(source, *chosen, trusted)
    for option, places in zip(("--from", "--to"), pairs, strict=True):
        for x, y in places:
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                raise ConfigError(
                    f"{option} {x:g},{y:g} is outside of the image: x is 0 to {width - 1}, y 0 to {height - 1}"
                )
    movable, wanted = _mask(mask, (height, width)), _image(image, generator.known["shape"])
    if prompt is not None and not generator.captioned:
        raise ConfigError("--prompt: this family learns from no captions; leave it out")
    count = 1 if wanted is None else _CANDIDATES
    import torch

    from pipelines.editing import as_bytes, invert, renderer
    from pipelines.figures.dragging import animation, marked, strip
    from policies.drag import drag as dragging

    drawn: Any = generator.styles  # those that learn from captions take prompts, too
    error, styles = None, drawn(count, seed, **({} if prompt is None else {"prompts": [prompt] * count}))
    if wanted is not None:
        styles, left = invert(generator, wanted[None], styles)
        error = float(left[0])
    begin, end = (torch.tensor(each)[None].float().to(generator.device) for each in pairs)
    fixed = None if movable is None else torch.from_numpy(~movable).float()[None].to(generator.device)
    moments = [*dragging(renderer(generator, styles), styles.w, begin, end, fixed, settings)]
    frames = [
        marked(as_bytes(each.images)[0], each.points[0].cpu().numpy(), np.array(pairs[1]))
        for each in (moments[at] for at in sorted({*np.linspace(0, len(moments) - 1, _FRAMES).round().astype(int)}))
    ]
    way = [frames[at] for at in sorted({*np.linspace(0, len(frames) - 1, 5).round().astype(int)})]
    name = f"drag-{image.stem if image else seed}"
    files = [output / f"{name}.png", output / f"{name}.gif"]
    try:
        output.mkdir(parents=True, exist_ok=True)
        strip([way]).save(files[0])
        files[1].write_bytes(animation(frames))
    except OSError as failure:
        raise ConfigError(f"--output {output} cannot be written: {failure.strerror or failure}") from failure
    last = moments[-1]
    distances = (last.points - end)[0].norm(dim=-1).tolist()
    return Dragged(last.points[0].tolist(), distances, bool(last.arrived), len(moments) - 1, error, files)


_CANDIDATES = 256  # images that a real one is compared with, to begin with the nearest


def _places(option: str, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Numbers of "x,y"."""
    found = []
    for text in texts:
        try:
            x, y = map(float, text.split(","))
        except ValueError:
            raise ConfigError(f"{option} {text!r} is no place x,y, such as 8,2.5") from None
        if not np.isfinite([x, y]).all():
            raise ConfigError(f"{option} {text!r} is no place x,y, such as 8,2.5")
        found.append((x, y))
    return found


def _mask(path: Path | None, size: tuple[int, int]) -> np.ndarray | None:
    """Where a picture is more white than black (height, width)."""
    if path is None:
        return None
    picture = _picture("--mask", path)
    if picture.size != size[::-1]:
        raise ConfigError(f"--mask {path} is {_of(picture.size)} pixels, and the images are {_of(size[::-1])}")
    found: np.ndarray = np.asarray(picture.convert("L")) >= 128
    return found


def _image(path: Path | None, shape: Sequence[int]) -> np.ndarray | None:
    """A picture (height, width, channels) uint8 of this shape."""
    if path is None:
        return None
    picture, (height, width, channels) = _picture("--image", path), shape
    if picture.size != (width, height):
        raise ConfigError(f"--image {path} is {_of(picture.size)} pixels, and the images are {_of((width, height))}")
    return np.array(picture.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels)


def _picture(option: str, path: Path) -> Any:
    from pipelines.data.pictures import read_picture

    try:
        return read_picture(path)
    except Exception as error:  # decoders fail in as many ways as there are formats
        raise ConfigError(
            f"{option} {path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}"
        ) from error


def _of(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _open(
    source: Path, arm: str | None, seed: int | None, number: int | None, trusted: bool
) -> tuple[Adversarial, int, int]:
    """The generator, and the height and width of its images."""
    if (source / FAMILY).is_file():
        if (arm, seed, number) != (None, None, None):
            raise ConfigError(f"{source} is one generator: leave out --arm, --run-seed and --generation")
        family = str(read_json(source / FAMILY).get("family"))
        if family not in GENERATORS.built_in:
            raise ConfigError(f"{source / FAMILY} names {family!r}, which is no family that is built in")
        kind = _draggable(family, str(source))
        try:
            generator = kind.load(source)
        except Exception as error:  # files fail in their own ways
            reason = " ".join(str(error).split())
            raise ConfigError(f"{source} holds no {family} that can be loaded: {reason}") from error
    else:
        generator = _fitted(source, arm, seed, number, trusted)
    height, width, _ = generator.known["shape"]
    return generator, height, width


def _draggable(family: str, where: str) -> type[Adversarial]:
    kind = GENERATORS.find(family)
    if not issubclass(kind, Adversarial):
        known = ", ".join(name for name, each in GENERATORS.built_in.items() if issubclass(each, Adversarial))
        raise ConfigError(f"{where} is of family {family}, which has no styles to drag by; those that have: {known}")
    return kind


def _fitted(directory: Path, arm: str | None, seed: int | None, number: int | None, trusted: bool) -> Any:
    """What an arm of a MAD run has fitted."""
    if not (directory / "manifest.json").is_file():
        raise ConfigError(f"{directory} is neither a run nor a product with a {FAMILY}")
    manifest = read_manifest(directory)
    if not trusted:
        check_links(directory)
    if manifest.get("loop") != "mad":
        raise ConfigError(f"{directory} is not a MAD run: name one, or a product that holds a {FAMILY}")
    config = validate(MadConfig, manifest["config"])
    arms = config.resolved_arms
    if arm is None:
        known = {name: each for name, each in arms.items() if not each.foreign}
        able = [name for name, each in known.items() if issubclass(each.generator, Adversarial)]
        arm = next(iter(able or arms))
    if arm not in arms:
        raise ConfigError(f"--arm {arm!r} is no arm of {directory}; there are {', '.join(arms)}")
    if arms[arm].foreign:  # which is imported
        check_seal(directory, manifest, trusted)
    _draggable(arms[arm].family, f"arm {arm} of {directory}")
    seed = config.seed_list[0] if seed is None else seed
    if seed not in config.seed_list:
        raise ConfigError(
            f"--run-seed {seed}: the seeds of {directory} are {config.seed_list[0]} to {config.seed_list[-1]}"
        )
    if number is not None and not 1 <= number <= config.generations:
        raise ConfigError(f"--generation {number}: {directory} has 1 to {config.generations}")
    store = TaskStore(directory / "tasks")
    models = [each.model.key for each in chain_of(directory, manifest, config, arm, seed)]
    wanted = models[::-1] if number is None else [models[number - 1]]
    key = next((each for each in wanted if each in store and not store.about(each).get("forgotten")), None)
    if key is None:
        which = f"generation {number}" if number else "generation"
        raise ConfigError(
            f"{directory} has no {which} of {arm}, seed {seed}, that is trained: ouroboros resume {directory}"
        )
    return load_generator(arms[arm].family, store.load(key))
