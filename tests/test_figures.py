"""The pictures: pixels stay what they were, and missing numbers leave a panel out."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipelines.figures import plots as figures
from pipelines.figures import style, sweep
from pipelines.figures.plots import before_after, curves, image_grid
from policies.common.intervals import interval
from policies.common.search_space import PointResult

PROMPTS = ["a red seven on a black background", "a blue two on a white background", "a green one on a blue background"]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def shown(page: np.ndarray, image: np.ndarray, side: int) -> bool:
    """Whether ``image`` stands somewhere in ``page``, every pixel a block of one colour, in all about ``side`` wide."""
    middles = ((np.arange(len(image)) + 0.5) * side / len(image)).astype(int)
    first = np.argwhere((page[: -side + 1, : -side + 1] == image[0, 0]).all(-1))
    return any(
        np.array_equal(page[np.ix_(y + middles - middles[0], x + middles - middles[0])], image) for y, x in first
    )


def has_colour(page: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((page == wanted).all(-1).any())


def test_a_grid_keeps_every_pixel(images: np.ndarray) -> None:
    grid = image_grid(images, columns=2)
    gutter = 2
    cell = 16 * 6 + gutter
    assert grid.shape == (2 * cell + gutter, 2 * cell + gutter, 3)
    assert grid.dtype == np.uint8
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = row * cell + gutter, column * cell + gutter
        np.testing.assert_array_equal(grid[top : top + 96 : 6, left : left + 96 : 6], images[index])
        np.testing.assert_array_equal(grid[top + 5 : top + 96 : 6, left + 5 : left + 96 : 6], images[index])
    assert len(np.unique(grid[cell + gutter :, cell + gutter :])) == 1


@pytest.mark.parametrize(("size", "zoom"), [(8, 12), (16, 6), (64, 2), (512, 1)])
def test_a_grid_enlarges_small_images_by_itself(size: int, zoom: int) -> None:
    grid = image_grid(np.zeros((1, size, size, 3), np.uint8), columns=4)
    assert grid.shape[0] == size * zoom + 2 * max(1, zoom // 3)


def test_pairs_show_every_pixel_of_small_images(images: np.ndarray, tmp_path: Path) -> None:
    before_after(tmp_path / "pairs.png", images, images[::-1].copy(), PROMPTS, None, None)
    page = picture(tmp_path / "pairs.png")
    for image in images:
        assert any(shown(page, image, side) for side in range(200, 225))
    assert not has_colour(page, style.RIGHT)
    assert not has_colour(page, style.WRONG)


def test_captions_are_green_where_right_and_red_where_wrong(tmp_path: Path) -> None:
    grey = np.full((3, 16, 16, 3), 128, np.uint8)
    before_after(tmp_path / "right.png", grey, grey, PROMPTS, PROMPTS, PROMPTS)
    before_after(tmp_path / "wrong.png", grey, grey, PROMPTS, PROMPTS[::-1], None)
    before_after(tmp_path / "none.png", grey, grey, PROMPTS, ["x"] * 3, ["y"] * 3)
    colours = {
        name: tuple(has_colour(picture(tmp_path / f"{name}.png"), colour) for colour in (style.RIGHT, style.WRONG))
        for name in ("right", "wrong", "none")
    }
    assert colours == {"right": (True, False), "wrong": (True, True), "none": (False, True)}


def test_large_images_are_reduced(tmp_path: Path) -> None:
    large = np.zeros((2, 512, 512, 3), np.uint8)
    large[..., 0] = 200
    before_after(tmp_path / "pairs.png", large, large, ["costs $5 and $6", "x" * 500], None, None)
    page = picture(tmp_path / "pairs.png")
    assert 200**2 < (page == [200, 0, 0]).all(-1).sum() / 4 < 225**2
    assert page.shape[0] < 512
    assert page.shape[1] < 1100


def test_equal_pictures_are_equal_files(images: np.ndarray, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        before_after(tmp_path / "new" / name, images, images, PROMPTS, PROMPTS, PROMPTS)
    assert (tmp_path / "new" / "one.png").read_bytes() == (tmp_path / "new" / "two.png").read_bytes()


def history(steps: int) -> list[dict[str, float]]:
    entries = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "reward/mean": step / 100,
            "reward/std": 0.1,
            "policy/approximate_kl": 1e-5,
            "policy/clip_fraction": 0.2,
            "policy/gradient_norm": 2.0**step,
            "seconds/sample": 1.0,
            "seconds/learn": 2.0,
        }
        if step % 5 == 0:
            entry |= {"evaluator/full": 0.5, "evaluator/digit": 0.6, "seconds/evaluate": 1.0}
        entries.append(entry)
    return entries


@pytest.mark.parametrize("steps", [1, 20])
def test_curves_have_a_panel_for_each_thing_measured(steps: int, tmp_path: Path) -> None:
    curves(tmp_path / "curves.png", [{"step": 0, "reward/mean": 0.0}, *history(steps)])
    page = picture(tmp_path / "curves.png")
    assert page.shape == (928, 2064, 3)
    assert has_colour(page, style.LINES["red"])
    assert has_colour(page, style.LINES["green"]) == (steps >= 5)


def test_curves_leave_out_what_is_missing(tmp_path: Path) -> None:
    curves(tmp_path / "reward.png", [{"step": step, "reward/mean": 0.5} for step in range(3)])
    curves(
        tmp_path / "two.png", [{"step": 1, "reward/mean": 0.5, "reward/std": float("nan"), "policy/clip_fraction": 0}]
    )
    widths = {path.stem: picture(path).shape[1] for path in tmp_path.glob("*.png")}
    assert widths == {"reward": 688, "two": 1376}


def test_no_global_state_of_matplotlib_is_used(images: np.ndarray, tmp_path: Path) -> None:
    from matplotlib import _pylab_helpers

    before_after(tmp_path / "pairs.png", images, images, PROMPTS, None, None)
    curves(tmp_path / "curves.png", history(3))
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []


def test_the_running_mean_is_exact() -> None:
    values = np.arange(20.0) ** 2
    axes = Figure().add_subplot()
    figures._course("x", "red")(axes, pandas.DataFrame({"x": values}))
    whole, smooth = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(whole, values)
    np.testing.assert_allclose(smooth, [values[max(0, i - 3) : i + 4].mean() for i in range(20)])


def point(settings: dict[str, Any], *values: float, complete: bool = True) -> PointResult:
    return PointResult(settings, complete, list(values), *map(float, interval(np.array(values))))


@pytest.mark.filterwarnings("error")
def test_a_sweeps_best_is_seen_and_what_has_not_finished_is_grey(tmp_path: Path) -> None:
    points = [
        point({"rate": 1e-4, "rule": "fresh", "flag": True, "list": [1, 2]}, 0.9, 0.8),
        point({"rate": 1e-3, "rule": "$odd_rule$", "flag": False, "list": [1]}, 0.5),
        point({"rate": 1e-2, "rule": "fresh", "flag": True, "list": [1, 2]}, 0.95, complete=False),
    ]
    for name, some in {"all": points, "running": points[2:]}.items():
        measured = sweep.Measured(some, "reward/mean", "max")
        sweep.responses(tmp_path / f"{name}.png", measured, ["rate"])
        sweep.parallel_coordinates(tmp_path / f"{name}_lines.png", measured, ["rate"])
        for page in (picture(tmp_path / f"{name}.png"), picture(tmp_path / f"{name}_lines.png")):
            assert has_colour(page, style.LINES["orange"]) == (name == "all")
            assert has_colour(page, "#b9c0cb")
    wide = [point({"a": a, "b": b}, 10.0**a, complete=a < 3) for a in (1, 2, 3) for b in ("x", "y")]
    measured = sweep.Measured(wide, "fid", "min")
    sweep.phase_diagram(tmp_path / "plane.png", measured, "a", "b")
    colours = measured.colours(np.array([10.0, 31.6, 100.0, np.nan])).mean(axis=1)
    assert colours[0] < colours[1] < colours[2]  # darker is better, on the logarithm
    assert has_colour(picture(tmp_path / "plane.png"), "#1c3a7a")
