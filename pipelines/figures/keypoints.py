"""What keypoints look like: small images enlarged pixel by pixel, with a point of one colour for each."""

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from pipelines.figures.dragging import enlarged

_COLOURS, _RIM = "tab10", "white"


def pointed(image: np.ndarray, points: np.ndarray) -> Image.Image:
    """``image`` (height, width, 1 or 3) uint8 with its ``points`` (points, 2), (x, y) in pixels; equal positions in the
    list have equal colours in all images."""
    picture, zoom = enlarged(image)
    pen, radius, colours = ImageDraw.Draw(picture), max(3, zoom / 3), colormaps[_COLOURS]
    for number, (x, y) in enumerate((points + 0.5) * zoom):
        fill = tuple(round(255 * part) for part in colours(number % colours.N)[:3])
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline=_RIM)
    return picture
