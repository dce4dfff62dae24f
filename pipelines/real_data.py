"""Real images for the self-consuming loop, and which of them a model may ever see: a pure function of the seed.

Every kind of source becomes the same arrays. Nothing is written beside it, and no code that comes with it is run.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from pipelines.locations import find
from policies.settings import Settings
from policies.streams import derive_seed


class DataSettings(Settings):
    """Where real images come from, and how they are read."""

    source: str = Field("digits", min_length=1, description="digits, a directory, or a data set of the hub")
    split: str = Field("train", description="which split, where the source has several")
    image_size: int | None = Field(None, ge=1, description="crop to the middle square and resize; null: as they are")
    image_column: str | None = Field(None, description="null: the one column of images")
    label_column: str | None = Field(None, description="null: the one column of class labels, or no labels")
    reference: int = Field(397, ge=1, description="images kept apart for the metrics; no model is trained on them")
    limit: int | None = Field(None, ge=2, description="use at most so many images, a fixed random choice; null: all")


@dataclass(frozen=True, eq=False)
class RealData:
    """``images`` (n, height, width, 1 or 3) uint8, ``labels`` (n,) int64 in 0..classes−1."""

    images: np.ndarray
    labels: np.ndarray | None = None

    @cached_property
    def sha256(self) -> str:
        """What identifies the images and labels, wherever they came from."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        for array in (self.images, self.labels):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_real_data(settings: DataSettings) -> RealData:
    """The images of ``settings.source`` in its own order, with one channel if every one of them is grey.

    Raises ValueError if the source cannot be found or reached, holds no images or an unreadable one, a column is
    missing or ambiguous, a label is missing, or the images' sizes differ and ``image_size`` is None.
    """
    from datasets import ClassLabel, Image

    data = _digits() if settings.source == "digits" else _open(settings)
    shuffled = np.random.default_rng(derive_seed(0, "limit")).permutation(len(data))
    data = data.select(np.sort(shuffled[: settings.limit]))
    column = _column(data, "image_column", settings.image_column, Image)
    if column is None:
        raise ValueError(f"{settings.source} has no column of images; its columns are {', '.join(data.column_names)}")
    images = _images(data.cast_column(column, Image(decode=False))[column], settings.image_size)
    column = _column(data, "label_column", settings.label_column, ClassLabel)
    if column is None:
        return RealData(images)
    names, values = getattr(data.features[column], "names", None), data[column][:]
    if None in values or (names and -1 in values):
        raise ValueError(f"label_column: {column!r} leaves images without a label: choose another split or column")
    if names is None:
        _, values = np.unique(values, return_inverse=True)
    return RealData(images, np.asarray(values, np.int64))


def split_reference(data: RealData, reference: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the pool that models learn from, and of the ``reference`` images kept apart from it.

    Each class has its share of the reference, to within one image (systematic sampling along the sorted labels).
    Raises ValueError if either part would be empty.
    """
    count = len(data.images)
    if not 0 < reference < count:
        raise ValueError(f"reference: {reference} of {count} images leave none to learn from: give 1 to {count - 1}")
    keys = np.random.default_rng(derive_seed(seed, "reference")).permutation(count)
    order = np.lexsort((keys,) if data.labels is None else (keys, data.labels))
    apart = order[(2 * np.arange(reference) + 1) * count // (2 * reference)]
    return np.setdiff1d(order, apart), np.sort(apart)


def ledger_order(size_of_pool: int, seed: int) -> np.ndarray:
    """The order (size_of_pool,) int64 in which the run of ``seed`` uses up the pool's real samples."""
    return np.random.default_rng(derive_seed(seed, "ledger")).permutation(size_of_pool)


def _digits() -> Any:
    """scikit-learn's 1,797 handwritten digits, 8x8; their 17 grey levels cover 0..255."""
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    strokes, labels = load_digits(return_X_y=True)
    grey = np.rint(strokes.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Dataset.from_dict({"image": grey, "label": labels}, Features({"image": Image(), "label": ClassLabel(10)}))


def _open(settings: DataSettings) -> Any:
    """The rows of the split, from the disk or the hub."""
    import datasets
    from huggingface_hub import HfApi, constants

    datasets.disable_progress_bars()
    source, split, directory = settings.source, settings.split, find(settings.source)
    try:
        if directory is None and not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(source, timeout=10)  # asks once, where load_dataset retries for half a minute
        if directory is None:
            return datasets.load_dataset(source, split=split)
        if (directory / "dataset_dict.json").is_file():
            return datasets.load_from_disk(directory)[split]
        if (directory / "state.json").is_file():
            return datasets.load_from_disk(directory)
        return datasets.load_dataset("imagefolder", data_dir=str(directory), split=split)
    except Exception as error:  # the hub, its transport and each file format fail in their own ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: no images of split {split} in a directory or on the hub ({reason})") from error


def _column(data: Any, setting: str, name: str | None, kind: type) -> str | None:
    """The column ``name``, or else the only one of a kind; None if there is none."""
    fitting = [key for key, feature in data.features.items() if (key == name if name else isinstance(feature, kind))]
    if len(fitting) > 1 or (name and not fitting):
        raise ValueError(f"{setting}: choose one of {', '.join(fitting or data.column_names)}, not {name or 'null'}")
    return fitting[0] if fitting else None


def _images(items: Any, size: int | None) -> np.ndarray:
    """Decode, crop and stack into (n, height, width, channels). An undecoded item still knows its file, if broken."""
    from datasets import Image
    from PIL import ImageOps

    pictures = []
    for index, item in enumerate(items):
        try:
            picture = Image().decode_example(item)
            if picture.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        except Exception as error:  # decoders fail in as many ways as there are formats
            name = (item or {}).get("path") or f"image {index}"
            raise ValueError(f"{name} cannot be read as an 8-bit image ({error}): repair or remove it") from error
        pictures.append(picture if size is None else ImageOps.fit(picture, (size, size)))  # antialiased
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"images differ in size (width, height): {sizes[0]} and {sizes[-1]}; set image_size")
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    return np.stack([np.asarray(picture.convert(mode)) for picture in pictures]).reshape(-1, *sizes[0][::-1], len(mode))
