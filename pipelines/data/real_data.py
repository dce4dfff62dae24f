"""Real images for the self-consuming loop, and which of them a model may ever see: a pure function of the seed.

Every kind of source becomes the same arrays. Nothing is written beside it, and no code that comes with it is run.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from pipelines.data.digits import DIGITS, IMAGE_SIZE, captioned
from pipelines.data.image_folder import read_folder, shown
from pipelines.data.pictures import colour, read_picture
from pipelines.storage.locations import find
from policies.common.seeding import derive_seed
from policies.rl.settings import Settings

_MOST_NAMES = 20  # that a line for people lists


class DataSettings(Settings):
    """Where real images come from, and how they are read."""

    source: str = Field(
        "digits", min_length=1, description="digits, captioned_digits, a directory, or a data set of the hub"
    )
    split: str = Field("train", description="which split, where the source has several")
    image_size: int | None = Field(None, ge=1, description="crop to the middle square and resize; null: as they are")
    background: str = Field("white", description="what shows through transparent images: a colour's name or #rrggbb")
    image_column: str | None = Field(None, description="the column of images; null: the only one")
    label_column: str | None = Field(None, description="null: the only one of class labels, or no labels")
    caption_column: str | None = Field(None, description="the column of what each image shows, in words; null: none")
    reference: int = Field(397, ge=1, description="images kept apart for the metrics; no model is trained on them")
    limit: int | None = Field(None, ge=2, description="use at most so many images, a fixed random choice; null: all")
    extractor: str | None = Field(
        None, description="of the metrics: classifier, self_supervised or a directory; null: by what labels there are"
    )

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, name: str) -> str:
        colour(name)
        return name


@dataclass(frozen=True, eq=False)
class RealData:
    """``images`` (n, height, width, 1 or 3) uint8, ``labels`` (n,) int64 in 0..classes−1.

    ``classes`` are their names, by label; ``left_out`` what a directory holds that is no image; ``captions`` (n,) of
    text what each shows.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    captions: np.ndarray | None = None

    @cached_property
    def sha256(self) -> str:
        """What identifies the images, labels and captions, wherever they came from."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        for array in (self.images, self.labels):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        for caption in () if self.captions is None else self.captions.tolist():
            digest.update(f"{len(caption)} {caption}".encode())
        return digest.hexdigest()

    def describe(self) -> list[str]:
        """Lines for people: images and classes found, and what was left out."""
        count, height, width, channels = self.images.shape
        found = f"{count:,} images, {height}×{width}, {'grey' if channels == 1 else 'RGB'}"
        if self.labels is not None:
            counts = np.bincount(self.labels, minlength=len(self.classes))
            each = [f"{name} {number:,}" for name, number in zip(self.classes, counts, strict=True)]
            found += f", {len(each)} classes: {_some(each)}"
        if self.captions is not None:
            found += f"; {len(set(self.captions.tolist())):,} captions, such as {str(self.captions[0])!r}"
        return [found] + ([f"left out, as no images: {_some(self.left_out)}"] if self.left_out else [])


def load_real_data(settings: DataSettings) -> RealData:
    """The images of ``settings.source`` in its own order, with one channel if every one of them is grey.

    Raises ValueError if the source cannot be found or reached, holds no images or an unreadable one, something in a
    directory does not fit, a column is missing or ambiguous, a label is missing, or the images' sizes differ and
    ``image_size`` is None.
    """
    made = {"digits": _digits, "captioned_digits": _captioned_digits}.get(settings.source)
    found = _open(settings) if made is None else made(settings)
    items, known = found.items, None if found.labels is None else np.asarray(found.labels, np.int64)
    chosen = _drawn(len(items), min(settings.limit or len(items), len(items)), known, derive_seed(0, "limit"))
    images = _images(items, chosen, settings)
    captions = None if found.captions is None else np.array(found.captions, dtype=str)[chosen]
    return RealData(images, None if known is None else known[chosen], found.classes, found.left_out, captions)


def split_reference(data: RealData, reference: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the pool that models learn from, and of the ``reference`` images kept apart from it.

    Each class has its share of the reference, to within one image. Raises ValueError if either part would be empty.
    """
    count = len(data.images)
    if not 0 < reference < count:
        raise ValueError(f"reference: {reference} of {count} images leave none to learn from: give 1 to {count - 1}")
    apart = _drawn(count, reference, data.labels, derive_seed(seed, "reference"))
    return np.setdiff1d(np.arange(count), apart), apart


def _drawn(count: int, wanted: int, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """Sorted indices (wanted,) of ``count`` images at random, with each class's share to within one image: systematic
    sampling along the sorted ``labels``."""
    keys = np.random.default_rng(seed).permutation(count)
    order = np.lexsort((keys,) if labels is None else (keys, labels))
    return np.sort(order[(2 * np.arange(wanted) + 1) * count // (2 * wanted)])


def ledger_order(size_of_pool: int, seed: int) -> np.ndarray:
    """The order (size_of_pool,) int64 in which the run of ``seed`` uses up the pool's real samples."""
    return np.random.default_rng(derive_seed(seed, "ledger")).permutation(size_of_pool)


class _Found(NamedTuple):
    """Images to decode, their labels, the names of the classes, what was left out, and captions."""

    items: Sequence[Any]
    labels: Sequence[int] | np.ndarray | None = None
    classes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    captions: Sequence[str] | None = None


def _digits(settings: DataSettings) -> _Found:
    """scikit-learn's 1,797 handwritten digits, 8x8; their 17 grey levels cover 0..255."""
    from sklearn.datasets import load_digits

    strokes, labels = load_digits(return_X_y=True)
    return _Found(np.rint(strokes.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels, [*map(str, range(10))])


def _captioned_digits(settings: DataSettings) -> _Found:
    """Tinted digits, each with the caption that names its digit, ink and ground: drawn at 16x16 pixels, or at the size
    that is asked for if that is larger."""
    images, labels, captions = captioned(size=max(settings.image_size or 0, IMAGE_SIZE))
    return _Found([*images], labels, DIGITS, captions=captions)


def _open(settings: DataSettings) -> _Found:
    """What a split holds, from the disk or the hub."""
    import datasets
    from huggingface_hub import HfApi, constants

    datasets.disable_progress_bars()
    source, split, directory = settings.source, settings.split, find(settings.source)
    if directory and not ((directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()):
        return _folder(settings, directory)
    try:
        if directory is None:
            if not constants.HF_HUB_OFFLINE:
                HfApi().dataset_info(source, timeout=10)  # asks once, where load_dataset retries for half a minute
            return _table(settings, datasets.load_dataset(source, split=split))
        held = datasets.load_from_disk(directory)
        found = held[split] if (directory / "dataset_dict.json").is_file() else held
    except Exception as error:  # the hub, its transport and each file format fail in their own ways
        reason = " ".join(str(error).split())
        if directory is None and "/" not in source.strip("./"):
            reason = f"there is no directory {source!r} here; {reason}"
        raise ValueError(f"{source}: no images of split {split} in a directory or on the hub ({reason})") from error
    return _table(settings, found)


def _folder(settings: DataSettings, directory: Path) -> _Found:
    """A directory of images; of a split such as train[:100], that part."""
    from datasets import ReadInstruction

    for setting in ("image_column", "label_column", "caption_column"):
        if getattr(settings, setting):
            raise ValueError(f"{setting}: {settings.source} is a directory of images, whose labels are its directories")
    found = read_folder(directory, name := settings.split.partition("[")[0])
    part = ReadInstruction.from_spec(settings.split).to_absolute({name: len(found.paths)})[0]
    rows = slice(part.from_, part.to)
    if not found.paths[rows]:
        of = "" if settings.split == "train" else f" of split {settings.split}"
        raise ValueError(f"data.source: {settings.source} holds no images{of}")
    return _Found(found.paths[rows], found.labels and found.labels[rows], found.classes, found.left_out)


def _table(settings: DataSettings, data: Any) -> _Found:
    """The columns of images, labels and captions of a data set."""
    from datasets import ClassLabel, Image

    column = _column(data, "image_column", settings.image_column, Image)
    if column is None:
        raise ValueError(f"{settings.source} has no column of images; its columns are {', '.join(data.column_names)}")
    items, captions = data.cast_column(column, Image(decode=False))[column], _captions(settings, data)
    column = _column(data, "label_column", settings.label_column, ClassLabel)
    if column is None:
        return _Found(items, captions=captions)
    names, values = getattr(data.features[column], "names", None), data[column][:]
    if any(value is None or value != value for value in values) or (names and -1 in values):
        raise ValueError(f"label_column: {column!r} leaves images without a label: choose another split or column")
    if names is None:
        if not all(isinstance(value, str | int) for value in values):
            raise ValueError(f"label_column: {column!r} holds no classes, which are words or whole numbers")
        known, values = np.unique(values, return_inverse=True)
        names = [*map(str, known)]
    return _Found(items, values, names, captions=captions)


def _captions(settings: DataSettings, data: Any) -> Sequence[str] | None:
    """The column of captions; None if none is named."""
    if (name := settings.caption_column) is None:
        return None
    if name not in data.column_names:
        raise ValueError(f"caption_column: choose one of {', '.join(data.column_names)}, not {name}")
    values = data[name][:]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"caption_column: {name!r} leaves images without a text: choose another")
    return list(values)


def _column(data: Any, setting: str, name: str | None, kind: type) -> str | None:
    """The column ``name``, or else the only one of a kind; None if there is none."""
    fitting = [key for key, feature in data.features.items() if (key == name if name else isinstance(feature, kind))]
    if len(fitting) > 1 or (name and not fitting):
        raise ValueError(f"{setting}: choose one of {', '.join(fitting or data.column_names)}, not {name or 'null'}")
    return fitting[0] if fitting else None


def _images(items: Sequence[Any], chosen: np.ndarray, settings: DataSettings) -> np.ndarray:
    """Decode, crop and stack those that are ``chosen`` into (n, height, width, channels)."""
    from PIL import Image, ImageOps

    size, pictures = settings.image_size, []
    for index in chosen.tolist():
        item = items[index]
        if isinstance(item, np.ndarray):
            picture = Image.fromarray(item)
        else:
            path, content = (item, None) if isinstance(item, Path) else map((item or {}).get, ("path", "bytes"))
            try:
                picture = read_picture(Path(path) if content is None else io.BytesIO(content), settings.background)
            except Exception as error:  # decoders fail in as many ways as there are formats
                name = shown(path) if path else f"image {index}"
                raise ValueError(f"{name} cannot be read as an 8-bit image ({error}): repair or remove it") from error
        pictures.append(picture if size is None else ImageOps.fit(picture, (size, size)))  # antialiased
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"images differ in size (width, height): {sizes[0]} and {sizes[-1]}; set data.image_size")
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    return np.stack([np.asarray(picture.convert(mode)) for picture in pictures]).reshape(-1, *sizes[0][::-1], len(mode))


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names) - _MOST_NAMES:,} more)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
