"""What a drag looks like: small images enlarged pixel by pixel, with a red point on its way to a blue one."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

_PIXELS, _POINT, _TARGET, _RIM = 192, "#e02020", "#2f6bff", "white"  # an enlarged image's height, at least


def enlarged(image: np.ndarray) -> tuple[Image.Image, int]:
    """``image`` (height, width, 1 or 3) uint8 with every pixel a square, and the side of one."""
    height, width = image.shape[:2]
    zoom = max(1, -(-_PIXELS // height))
    return Image.fromarray(np.broadcast_to(image, (height, width, 3)).repeat(zoom, 0).repeat(zoom, 1)), zoom


def marked(image: np.ndarray, points: np.ndarray, targets: np.ndarray) -> Image.Image:
    """``image`` (height, width, 1 or 3) uint8 with its ``points`` and their ``targets``, (points, 2) both, as (x, y) in
    pixels with whole numbers at their centres."""
    picture, zoom = enlarged(image)
    pen, radius = ImageDraw.Draw(picture), max(3, zoom / 3)
    for point, target in zip((points + 0.5) * zoom, (targets + 0.5) * zoom, strict=True):
        pen.line([*point, *target], fill=_RIM, width=max(1, round(radius / 2)))
        for (x, y), colour in ((target, _TARGET), (point, _POINT)):
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline=_RIM)
    return picture


def strip(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size beside one another, row by row, with gutters."""
    width, height = rows[0][0].size
    gutter = max(2, width // 48)
    size = max(map(len, rows)) * (width + gutter) - gutter, len(rows) * (height + gutter) - gutter
    whole = Image.new("RGB", size, "white")
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            whole.paste(picture, (across * (width + gutter), down * (height + gutter)))
    return whole


def animation(frames: Sequence[Image.Image], frame_ms: int = 60, last_ms: int = 1500) -> bytes:
    """A GIF that begins again and again."""
    spans = [frame_ms] * (len(frames) - 1) + [last_ms]
    frames[0].save(buffer := BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=spans, loop=0)
    return buffer.getvalue()
