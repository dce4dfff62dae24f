"""The pictures a run leaves behind: grids for the dashboard, before and after, and the curves of its numbers.

Images are uint8 RGB, ``(batch, height, width, 3)``. Small ones are enlarged by whole factors without smoothing, so
that every pixel of a 16-pixel image is seen as it is; large ones are reduced. Nothing here touches the display.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID_PIXELS = 96  # an image in a dashboard grid is at least this high
_PAIR_PIXELS = 160  # an image of a before/after pair is about this high
_GUTTER = 250  # grey of the gutters, 0 to 255

_INK, _FAINT, _RIGHT, _WRONG = "#1f2430", "#8b93a1", "#1a7f4b", "#c0392b"
_LINES = {"blue": "#3b6fd4", "green": "#1a9e77", "orange": "#e0822f", "purple": "#8757c7", "red": "#cf4a5a"}
_STAGES = {
    "sample": "#3b6fd4",
    "reward": "#e9b44c",
    "learn": "#1a9e77",
    "publish": "#8757c7",
    "evaluate": "#e0822f",
    "commit": "#9aa3b2",
}


def image_grid(images: np.ndarray, columns: int, zoom: int | None = None) -> np.ndarray:
    """One picture of ``images``, row by row, with thin gutters; ``zoom`` None chooses the enlargement.

    Returns (height, width, 3) uint8. Raises ValueError if there are no images or they are not RGB bytes.
    """
    _check_images(images)
    count, height, width, _ = images.shape
    columns = max(1, min(columns, count))
    zoom = zoom or max(1, -(-_GRID_PIXELS // height))
    gutter = max(1, zoom // 3)
    rows = -(-count // columns)
    cell_height, cell_width = height * zoom + gutter, width * zoom + gutter
    grid = np.full((rows * cell_height + gutter, columns * cell_width + gutter, 3), _GUTTER, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * cell_height + gutter, index % columns * cell_width + gutter
        grid[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    return grid


def before_after(
    path: Path,
    before: np.ndarray,
    after: np.ndarray,
    prompts: Sequence[str],
    captions_before: Sequence[str] | None = None,
    captions_after: Sequence[str] | None = None,
    columns: int = 4,
) -> None:
    """Write a PNG of pairs: what a prompt and seed gave before the run, and what they give after it.

    Under each image stand the captioner's words, green where they are the prompt and red where they are not. Raises
    ValueError if the numbers of images, prompts and captions differ.
    """
    _check_images(before)
    _check_images(after)
    captions = {"before": captions_before, "after": captions_after}
    lengths = {len(before), len(after), len(prompts), *(len(words) for words in captions.values() if words is not None)}
    if len(lengths) != 1:
        raise ValueError(f"images, prompts and captions must be equally many, got {sorted(lengths)}")
    with_captions = any(words is not None for words in captions.values())
    columns = max(1, min(columns, len(prompts)))
    rows = -(-len(prompts) // columns)
    width, top, below = 2.75, 0.52, 0.46 if with_captions else 0.2  # inches: of a pair, over it, under it
    side = (width - 0.35) / 2
    high = side * before.shape[1] / before.shape[2]
    total_width, total_height = columns * width + 0.2, rows * (top + high + below) + 0.45
    figure = _figure(total_width, total_height)
    for index, prompt in enumerate(prompts):
        left = 0.1 + index % columns * width
        base = total_height - 0.45 - (index // columns + 1) * (top + high + below) + below
        _write(figure, left + width / 2, base + high + 0.26, prompt, 8.5, _INK, width - 0.3, bold=True, above=True)
        for half, (name, images) in enumerate((("before", before), ("after", after))):
            x = left + 0.15 + half * (side + 0.05)
            _place(figure, images[index], x, base, side, high)
            _write(figure, x + side / 2, base + high + 0.04, name, 6.5, _FAINT, side, above=True)
            words = captions[name]
            if words is not None:
                colour = _RIGHT if words[index].strip() == prompt.strip() else _WRONG
                _write(figure, x + side / 2, base - 0.06, words[index], 6.8, colour, side)
    heading = "Same prompts, same seeds: before and after"
    figure.text(0.5, 1 - 0.16 / total_height, heading, ha="center", va="top", fontsize=12, color=_INK, weight="bold")
    _save(figure, path)
