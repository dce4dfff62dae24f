"""Image files as they look: first frame, upright, transparency composited, 8 bits a channel, grey or RGB."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageColor, ImageOps

# What Pillow reads by itself. Others it hands to programs (EPS), or they hold no pictures of the world.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def colour(name: str) -> tuple[int, ...]:
    """Red, green and blue of a colour's name or ``#rrggbb``. Raises ValueError."""
    return ImageColor.getrgb(name)[:3]


def read_picture(file: Path | BinaryIO, background: str = "white") -> Image.Image:
    """The picture in ``file``, by :func:`flat`. Raises OSError, ValueError, and what decoders raise."""
    Image.init()
    with Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
        return flat(opened, background)


def flat(opened: Image.Image, background: str = "white") -> Image.Image:
    """A picture of any mode in mode L or RGB; what is transparent shows the ``background``.

    Of an animation it is the first frame, and the camera's orientation is applied. Raises ValueError for more than 8
    bits of grey, as nothing says which of them are meant.
    """
    picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":
        raise ValueError("more than 8 bits a channel")
    grey = picture.mode in ("1", "L", "LA")
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, (*colour(background), 255))
        grey = grey and len(set(colour(background))) == 1
        picture = Image.alpha_composite(behind, picture.convert("RGBA")).convert("RGB")
    return picture.convert("L" if grey else "RGB")
