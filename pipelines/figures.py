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
_PAIR_PIXELS = 208  # an image of a before/after pair is about this wide
_DPI = 160
_GUTTER = 170  # grey of the gutters, seen between white images as between black ones

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
    columns: int | None = None,
) -> None:
    """Write a PNG of pairs: what a prompt and seed gave before the run, and what they give after it.

    Images of one size; ``columns`` None chooses rows of one length where it can. Under each image stand the
    captioner's words, green where they are the prompt and red where they are not. Raises ValueError if the numbers
    of images, prompts and captions differ.
    """
    _check_images(before)
    _check_images(after)
    captions = {"before": captions_before, "after": captions_after}
    lengths = {len(before), len(after), len(prompts), *(len(words) for words in captions.values() if words is not None)}
    if len(lengths) != 1:
        raise ValueError(f"images, prompts and captions must be equally many, got {sorted(lengths)}")
    columns = columns or _even_columns(len(prompts))
    rows = -(-len(prompts) // columns)
    pictures = {name: [_scaled(image) for image in images] for name, images in (("before", before), ("after", after))}
    high, side = (size / _DPI for size in pictures["before"][0].shape[:2])
    width = 2 * side + 0.42  # inches, as everything below: a pair with the space around it
    below = 0.2 if captions_before is None and captions_after is None else 0.44
    pair_height, heading = 0.62 + high + below, 0.4
    figure = _figure(columns * width + 0.1, rows * pair_height + heading)
    page = _Page(figure)
    title = "before and after: same prompts and seeds"
    page.write(page.width / 2, page.height - 0.12, title, 9, _FAINT, page.width, va="top")
    for index, prompt in enumerate(prompts):
        left = 0.05 + index % columns * width
        base = page.height - heading - (index // columns + 1) * pair_height + below
        page.write(left + width / 2, base + high + 0.23, prompt, 8.5, _INK, width - 0.2, va="bottom", weight="bold")
        for half, name in enumerate(("before", "after")):
            x = left + 0.18 + half * (side + 0.06)
            page.place(x, base, pictures[name][index])
            page.write(x + side / 2, base + high + 0.04, name, 6.5, _FAINT, side, va="bottom")
            words = captions[name]
            if words is not None:
                colour = _RIGHT if words[index].strip() == prompt.strip() else _WRONG
                page.write(x + side / 2, base - 0.05, words[index], 6.6, colour, side, va="top")
    _save(figure, path)


def curves(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write a PNG of a run's numbers over its steps.

    ``history`` holds one mapping a step, with ``step`` and any of the run's metrics; what no step has is left out,
    line by line and panel by panel.
    """
    panels = [
        (draw, title)
        for draw, title, keys in (
            (_draw_reward, "reward", ("reward/mean",)),
            (_draw_accuracy, "held-out accuracy", ("evaluator/full", *_slots(history))),
            (_draw_kl, "approximate KL", ("policy/approximate_kl",)),
            (_draw_clip, "share of clipped transitions", ("policy/clip_fraction",)),
            (_draw_gradient, "gradient norm", ("policy/gradient_norm",)),
            (_draw_seconds, "seconds a step", tuple(f"seconds/{stage}" for stage in _STAGES)),
        )
        if any(len(_series(history, key)[0]) for key in keys)
    ]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = _figure(4.3 * columns, 2.9 * rows, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for index, (draw, title) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _dress(axes, title)
        draw(axes, history)
    if not panels:
        figure.text(0.5, 0.5, "no steps yet", ha="center", va="center", color=_FAINT)
    _save(figure, path)


def _draw_reward(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    steps, mean = _series(history, "reward/mean")
    _line(axes, steps, mean, "blue", "mean")
    both = [entry for entry in history if "reward/mean" in entry and "reward/std" in entry]
    steps, mean = _series(both, "reward/mean")
    _, spread = _series(both, "reward/std")
    if len(steps) and len(steps) == len(spread):
        band = (mean - spread, mean + spread)
        axes.fill_between(steps, *band, color=_LINES["blue"], alpha=0.13, linewidth=0, label="± one standard deviation")
        _legend(axes)


def _draw_accuracy(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    palette = [_LINES[name] for name in ("orange", "purple", "red", "blue")]
    for index, key in enumerate(_slots(history)):
        steps, values = _series(history, key)
        colour = palette[index % len(palette)]
        axes.plot(steps, values, color=colour, linewidth=1, alpha=0.75, label=key.removeprefix("evaluator/"))
    steps, values = _series(history, "evaluator/full")
    if len(steps):
        axes.plot(steps, values, "o-", color=_LINES["green"], linewidth=2, markersize=3, label="all words right")
    _legend(axes)


def _draw_kl(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    _line(axes, *_series(history, "policy/approximate_kl"), "purple")
    axes.yaxis.set_major_formatter("{x:.2g}")


def _draw_clip(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    _line(axes, *_series(history, "policy/clip_fraction"), "orange")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:.0%}")


def _draw_gradient(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    steps, values = _series(history, "policy/gradient_norm")
    _line(axes, steps, values, "red")
    positive = values[values > 0]
    if len(positive) == len(values) and len(values) and positive.max() > 50 * positive.min():
        axes.set_yscale("log")


def _draw_seconds(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    history = [entry for entry in history if any(f"seconds/{stage}" in entry for stage in _STAGES)]
    steps = np.array([entry["step"] for entry in history])
    stages = [stage for stage in _STAGES if len(_series(history, f"seconds/{stage}")[0])]
    seconds = [[_finite(entry.get(f"seconds/{stage}")) or 0.0 for entry in history] for stage in stages]
    axes.stackplot(
        steps, seconds, labels=stages, colors=[_STAGES[stage] for stage in stages], step="mid", alpha=0.85, linewidth=0
    )
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    _legend(axes, handles=handles[::-1], labels=labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))


def _line(axes: "Axes", steps: np.ndarray, values: np.ndarray, colour: str, label: str | None = None) -> None:
    """The values, faint, under their running mean where there are enough of them to have one."""
    smooth = len(values) >= 20
    axes.plot(
        steps,
        values,
        color=_LINES[colour],
        linewidth=1 if smooth else 1.8,
        alpha=0.35 if smooth else 1,
        marker="" if len(values) > 1 else "o",
        label=None if smooth else label,
    )
    if smooth:
        axes.plot(
            steps, _running_mean(values, max(3, len(values) // 16)), color=_LINES[colour], linewidth=2, label=label
        )


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over the neighbours up to ``reach`` on either side, over fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _slots(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Keys of the evaluator's single slots, such as ``evaluator/digit``; shares only."""
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith("evaluator/"))
    return [key for key in keys if key != "evaluator/full" and "agreement" not in key and key.count("/") == 1]


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which ``key`` was measured, and its values there."""
    points = [(entry["step"], value) for entry in history if (value := _finite(entry.get(key))) is not None]
    return np.array([step for step, _ in points], float), np.array([value for _, value in points], float)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _dress(axes: "Axes", title: str) -> None:
    """The looks that all panels share."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color=_INK, weight="bold", pad=8)
    axes.set_xlabel("step", fontsize=8, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#cfd5de")


def _legend(axes: "Axes", **options: Any) -> None:
    axes.legend(fontsize=7.5, labelcolor=_INK, edgecolor="none", framealpha=0.7, **options)


def _even_columns(count: int) -> int:
    return next((columns for columns in (4, 5, 3) if count % columns == 0), min(4, count))


class _Page:
    """A figure addressed in inches from its lower left corner."""

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches()

    def place(self, x: float, y: float, picture: np.ndarray) -> None:
        """Put ``picture`` on whole pixels, unscaled, in a hairline frame."""
        framed = np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=_GUTTER)
        self.figure.figimage(framed, round(x * _DPI) - 1, round(y * _DPI) - 1, origin="upper")

    def write(self, x: float, y: float, text: str, size: float, colour: str, width: float, **style: Any) -> None:
        """Centre ``text`` (``size`` points) on x, in at most two lines of about ``width`` inches."""
        letters = max(8, int(width * 72 / (size * 0.56)))
        lines = textwrap.wrap(text, letters, max_lines=2, placeholder=" …")
        self.figure.text(
            x / self.width,
            y / self.height,
            "\n".join(lines),
            ha="center",
            fontsize=size,
            color=colour,
            parse_math=False,
            linespacing=1.15,
            **style,
        )


def _scaled(image: np.ndarray) -> np.ndarray:
    """``image`` about ``_PAIR_PIXELS`` wide: whole factors up, smoothly down."""
    from PIL import Image

    height, width, _ = image.shape
    if width <= _PAIR_PIXELS:
        zoom = max(1, _PAIR_PIXELS // width)
        return image.repeat(zoom, 0).repeat(zoom, 1)
    size = (_PAIR_PIXELS, max(1, round(height * _PAIR_PIXELS / width)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _figure(width: float, height: float, **options: Any) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    """Write the PNG without matplotlib's version in it, so that equal pictures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"expected uint8 images (batch, height, width, 3), got {images.dtype} {images.shape}")
