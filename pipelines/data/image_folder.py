"""A directory of images, read as a person sees it: each directory in it is a class, whatever it is called, but for one
called ``unlabelled`` beside others, in any case: its images have no label.

Links are followed. What begins with a dot is not seen, and what has no image's suffix is left out. What does not fit is
refused by its path, so that no image or label is lost without a word.
"""

import os
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp"),
}
UNLABELLED = "unlabelled"
_Names = tuple[str, ...]  # that lead from the directory to something in it


@dataclass
class ImageFolder:
    """``paths`` in the order of their names, their ``labels`` (−1: none) or None, and the ``classes`` by label.

    ``left_out`` are what is no image, and the directories without one.
    """

    paths: list[Path]
    labels: list[int] | None
    classes: list[str]
    left_out: list[str]


def read_folder(root: Path, split: str) -> ImageFolder:
    """The images of a directory, or if all its directories hold directories of their own, of the one named ``split``.

    Raises ValueError naming what does not fit: an image beside the classes or a directory of images inside of one, two
    classes of one name but for its case or of one place, a broken link, what is no file.
    """
    if root.is_file():
        raise ValueError(f"{shown(root)} is a file: name the directory that holds the images")
    images, others = _walk(root)
    if images and all(len(path) > 2 for path in images):
        splits = sorted({path[0] for path in images})
        if split not in splits:
            raise ValueError(
                f"{shown(root)} holds directories of classes ({', '.join(map(shown, splits))}) and none is called "
                f"{split}: set data.split, or give one of them as data.source"
            )
        images = [path[1:] for path in images if path[0] == split]
        root /= split
    elif split != "train":
        raise ValueError(f"{shown(root)} holds no directory {split!r} with directories of classes: see data.split")
    for path in images:
        if len(path) > 2:
            raise ValueError(
                f"{shown(root.joinpath(*path[:-1]))} is a directory of images inside of the class {shown(path[0])}: "
                "move its images into the class, or it out of the data"
            )
    classes = sorted({path[0] for path in images if len(path) == 2})
    stray = next((path for path in images if len(path) == 1), None)
    if classes and stray:
        raise ValueError(
            f"{shown(root / stray[0])} lies beside the directories of classes: move it into one, or out of the data"
        )
    known: dict[str, str] = {}
    for name in classes:
        if (other := known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            raise ValueError(f"{shown(root)}: the classes {shown(other)} and {shown(name)} differ in case only: rename")
    images.sort(key="/".join)
    classes = [name for name in classes if name.casefold() != UNLABELLED]
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(path[0], -1) for path in images] if classes else None
    left_out = [shown("/".join(path)) for path in sorted(others)]
    return ImageFolder([root.joinpath(*path) for path in images], labels, [*map(shown, classes)], left_out)


def shown(path: Path | str) -> str:
    """A path for people: what cannot be printed, as in names that are no UTF-8, is replaced."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(path))


def _walk(root: Path) -> tuple[list[_Names], list[_Names]]:
    """Images below ``root``, and what is none; no directory is entered twice, nor by a link from inside of it."""
    images: list[_Names] = []
    others: list[_Names] = []
    seen: dict[tuple[int, int], _Names] = {}  # directories, by device and inode
    waiting: list[tuple[_Names, tuple[tuple[int, int], ...]]] = [((), ())]  # and what it lies in
    while waiting:
        place, above = waiting.pop()
        here = root.joinpath(*place)
        try:
            found, about = sorted(os.listdir(here)), here.stat()
            kinds = {name: (here / name).stat().st_mode for name in found if not name.startswith(".")}
        except OSError as error:
            raise ValueError(
                f"{shown(error.filename)} cannot be read ({error.strerror}): repair or remove it"
            ) from error
        identity = about.st_dev, about.st_ino
        if identity in above:
            others.append(place)
            continue
        if (first := seen.setdefault(identity, place)) != place:
            raise ValueError(f"{shown(here)} and {shown(root.joinpath(*first))} are one directory: remove one of them")
        for name, kind in kinds.items():
            if stat.S_ISDIR(kind):
                waiting.append(((*place, name), (*above, identity)))
            elif Path(name).suffix.lower() not in _SUFFIXES:
                others.append((*place, name))
            elif stat.S_ISREG(kind):
                images.append((*place, name))
            else:
                raise ValueError(f"{shown(here / name)} is no regular file: remove it")
    full = {path[:length] for path in images for length in range(len(path))}
    return images, others + [place for place in seen.values() if place and place not in full]
