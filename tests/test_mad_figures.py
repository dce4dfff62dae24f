"""The pictures of a self-consuming experiment: what is drawn is what was measured, and every name has its colour."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from pipelines.figures import mad as mad_figures
from pipelines.figures import style
from pipelines.figures.mad import (
    arm_curves,
    class_heatmap,
    fresh_fraction_curve,
    generations_grid,
    points_grid,
    precision_recall_paths,
)
from pipelines.figures.plots import image_grid
from pipelines.figures.style import save
from policies.common.intervals import interval

RNG = np.random.default_rng(0)
VALUES = 1 + RNG.random((4, 6))  # seeds, generations


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, in order; they are saved all the same."""
    seen: list[Any] = []
    for module in (mad_figures, style):
        monkeypatch.setattr(module, "save", lambda figure, path: (seen.append(figure), save(figure, path)))
    return seen


def page(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def lines(axes: Any) -> dict[str, np.ndarray]:
    """The data (points, 2) of the labelled lines."""
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def legend(figure: Any) -> list[str]:
    texts = figure.legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts)  # a name may hold dollar signs
    return [text.get_text() for text in texts]


def band(axes: Any, index: int = 0) -> np.ndarray:
    return axes.collections[index].get_paths()[0].vertices


def test_curves_are_means_with_intervals_laws_and_floors(figures: list[Any], tmp_path: Path) -> None:
    law = np.linspace(1, 3, 6)
    curves = {"fid": {"a": VALUES, "b": VALUES + 1}, "recall": {"b": VALUES}}
    arm_curves(tmp_path / "x.png", curves, {"fid": {"a": law}}, {"recall": 0.5}, titles={"fid": "FID"})
    fid, recall = figures[0].axes
    mean, low, high = interval(VALUES, "logarithm")
    generations = np.arange(1, 7)
    np.testing.assert_allclose(lines(fid)["a"], np.stack([generations, mean], 1))
    np.testing.assert_allclose(lines(fid)["b"][:, 1], interval(VALUES + 1, "logarithm").mean)
    np.testing.assert_allclose(lines(fid)["exact law"], np.stack([generations, law], 1))
    np.testing.assert_allclose(lines(recall)["real against real"][:, 1], 0.5)
    corners = {tuple(corner) for corner in band(fid).round(9)}
    assert {(x, y) for x, y in zip(generations, low.round(9), strict=True)} <= corners
    assert {(x, y) for x, y in zip(generations, high.round(9), strict=True)} <= corners
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["FID", "recall"]
    assert legend(figures[0]) == ["a", "b", "exact law", "95 % interval over seeds", "real against real"]


def test_an_arm_keeps_its_colour_and_its_law_is_darker(figures: list[Any], tmp_path: Path) -> None:
    curves = {"x": {"a": VALUES, "b": VALUES}, "y": {"b": VALUES}}
    arm_curves(tmp_path / "x.png", curves, {"y": {"b": VALUES[0]}}, {}, {})
    x, y = ({line.get_label(): line for line in axes.lines} for axes in figures[0].axes)
    assert x["b"].get_color() == y["b"].get_color() != x["a"].get_color()
    assert (y["exact law"].get_color() <= 0.7 * np.array(to_rgb(y["b"].get_color()))).all()
    assert (y["exact law"].get_linestyle(), y["b"].get_linestyle()) == ("--", "-")


@pytest.mark.parametrize("count", [8, 20])
def test_all_arms_differ_in_colour_or_dashes(count: int, figures: list[Any], tmp_path: Path) -> None:
    names = [f"an arm with a long name and ${index}_{index}" for index in range(count)]
    arm_curves(tmp_path / "x.png", {"fid": {name: VALUES + k for k, name in enumerate(names)}}, {}, {}, {})
    drawn = figures[0].axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn}) == count
    assert len({line.get_color() for line in drawn}) == 8
    assert legend(figures[0])[:count] == names
    pixels = page(tmp_path / "x.png")
    for line in drawn:
        assert (np.abs(pixels - np.array(to_rgb(line.get_color())) * 255).max(-1) < 2).sum() > 200


def test_arms_are_told_apart_by_the_colour_blind_too() -> None:
    """Their distance in CIELAB as others see them, by Machado et al. (2009)."""
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    colours = np.array([to_rgb(each) for each in style.ARM_COLOURS])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4339, 0.3762, 0.1899], [0.2127, 0.7152, 0.0721], [0.0178, 0.1095, 0.8727]])  # of white 1, 1, 1
    for eyes in (np.eye(3), np.array(protan), np.array(deutan)):
        x, y, z = np.cbrt(np.maximum((linear @ eyes.T).clip(0, 1) @ xyz.T, 1e-3)).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 99 * np.eye(len(lab))
        assert apart.min() > 20
    assert len({*style.ARM_COLOURS, *style.PALE}) == 2 * len(colours)  # in MLflow, which has no dashes


def test_the_legend_takes_no_room_from_the_panels_and_covers_none(figures: list[Any], tmp_path: Path) -> None:
    heights = []
    for count in (1, 8):
        arm_curves(
            tmp_path / "x.png", {"fid": {f"a fairly long name, number {k}": VALUES for k in range(count)}}, {}, {}, {}
        )
        figure = figures[-1]
        renderer = FigureCanvasAgg(figure).get_renderer()
        box = figure.axes[0].get_tightbbox(renderer)
        below = figure.legends[0].get_window_extent(renderer)
        assert below.y1 < box.y0
        assert below.x0 > 0
        assert below.x1 < figure.bbox.x1
        heights.append(figure.axes[0].bbox.height)
    assert heights[1] > 0.9 * heights[0]


def test_one_seed_has_no_band(figures: list[Any], tmp_path: Path) -> None:
    arm_curves(tmp_path / "one.png", {"fid": {"a": VALUES[:1]}}, {}, {}, {})
    assert legend(figures[0]) == ["a"]
    np.testing.assert_allclose(lines(figures[0].axes[0])["a"][:, 1], VALUES[0])


def test_thousands_of_generations_and_gaps_are_drawn(figures: list[Any], tmp_path: Path) -> None:
    walk = np.exp(np.cumsum(RNG.normal(0, 0.1, (3, 2000)), axis=1))
    walk[:, 700:900] = np.nan
    arm_curves(tmp_path / "x.png", {"variance": {"a": walk}}, {}, {}, {})
    axes = figures[0].axes[0]
    assert np.isfinite(axes.get_ylim()).all()
    assert lines(axes)["a"][[0, -1], 0].tolist() == [1, 2000]
    assert axes.lines[0].get_markevery() > 100
    everywhere_nan = np.full((2, 3), np.nan)
    arm_curves(tmp_path / "nan.png", {"fid": {"a": everywhere_nan}}, {}, {}, {})
    assert page(tmp_path / "nan.png").shape[1] == 688


def test_wide_bands_do_not_flatten_the_curves(figures: list[Any], tmp_path: Path) -> None:
    mean = np.linspace(1, 2, 6)
    for spread, low, high in ((0.01, 0.9, 2.15), (50.0, -0.1, 3.1)):
        arm_curves(tmp_path / "x.png", {"density": {"a": mean + spread * np.array([[-1], [1]])}}, {}, {}, {})
        bottom, top = figures[-1].axes[0].get_ylim()
        assert low - 0.1 < bottom < low + 0.1
        assert high - 0.1 < top < high + 0.1


def test_precision_and_recall_stand_on_their_axes(figures: list[Any], tmp_path: Path) -> None:
    precision, recall = np.linspace(0.7, 0.9, 5) + 0.01 * np.eye(3, 5), np.linspace(0.9, 0.1, 5) + 0.02 * np.eye(3, 5)
    precision_recall_paths(tmp_path / "x.png", {"biased": (precision, recall), "other": (precision - 0.5, recall)})
    axes = figures[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    assert axes.get_aspect() == 1
    means = [interval(each, "share").mean for each in (recall, precision)]
    np.testing.assert_allclose(lines(axes)["biased"], np.stack(means, 1))
    seeds = [line.get_xydata() for line in axes.lines[:3]]
    np.testing.assert_allclose(seeds, np.stack([recall, precision], -1))
    later, first = axes.collections[:2]
    np.testing.assert_allclose(first.get_offsets(), [[each[0] for each in means]])
    assert (*axes.get_xlim(), *axes.get_ylim()) == (-0.02, 1.02, -0.02, 1.02)
    assert len(later.get_offsets()) == 4
    assert (np.diff(later.get_sizes()) > 0).all()


def test_the_fresh_fraction_curve_shows_each_seed(figures: list[Any], tmp_path: Path) -> None:
    fractions, final = np.array([0.0, 0.1, 0.4]), 1 + RNG.random((5, 3))
    fresh_fraction_curve(tmp_path / "x.png", fractions, final, floor=0.2, metric="KID", scale="logarithm")
    axes = figures[0].axes[0]
    mean, low, high = interval(final, "logarithm")
    middle, caps, (bars,) = axes.containers[0]
    np.testing.assert_allclose(middle.get_xydata(), np.stack([fractions, mean], 1))
    np.testing.assert_allclose([cap.get_ydata().astype(float) for cap in caps], [low, high])
    assert len(bars.get_segments()) == 3
    points = {tuple(point) for point in axes.collections[-1].get_offsets().round(9)}
    assert points == {(fractions[k], final[s, k].round(9)) for s in range(5) for k in range(3)}
    assert axes.get_ylim()[0] == 0
    assert axes.get_title(loc="left") == "KID of the last generation"
    assert sorted(legend(figures[0])) == ["mean, 95 % interval", "one seed", "real against real"]
    np.testing.assert_allclose(lines(axes)["real against real"][:, 1], 0.2)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_has_a_row_for_each_generation_and_keeps_every_pixel(
    channels: int, figures: list[Any], tmp_path: Path
) -> None:
    images = RNG.integers(0, 256, (3, 5, 8, 8, channels), np.uint8)
    generations_grid(tmp_path / "x.png", images, ["G1", "G10", "G100"])
    expected = image_grid(images.repeat(3 // channels, -1).reshape(15, 8, 8, 3), columns=5)
    (axes,) = figures[0].axes
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert abs(axes.bbox.width / expected.shape[1] - 1) < 0.2  # about pixel for pixel
    rows = [(text.get_text(), text.get_position()[1] * 3 / len(expected)) for text in axes.get_yticklabels()]
    assert rows == [("G1", pytest.approx(0.5)), ("G10", pytest.approx(1.5)), ("G100", pytest.approx(2.5))]
    large = np.full((2, 3, 800, 800, channels), 7, np.uint8)
    generations_grid(tmp_path / "y.png", large, ["a prompt of many words, wrapped"] * 2, ["step 1\nreward"] * 3)
    (axes,) = figures[1].axes
    assert axes.images[0].get_array().shape[1] < 1650
    assert [text.get_text() for text in axes.get_xticklabels()] == ["step 1\nreward"] * 3


def test_points_stand_over_the_reference_in_one_square(figures: list[Any], tmp_path: Path) -> None:
    reference = RNG.normal(0, 1, (300, 2))
    clouds = {f"G{k}": RNG.normal(k, 0.3, (200, 2)) for k in range(1, 8)}
    clouds["G7"][0] = 1000.0  # one runaway point is no reason to shrink all the others
    points_grid(tmp_path / "x.png", clouds, reference)
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == list(clouds)
    views = {(axes.get_xlim(), axes.get_ylim()) for axes in figures[0].axes}
    assert len(views) == 1
    (low, high), vertical = views.pop()
    assert (low, high) == vertical
    assert -5 < low < np.percentile(reference, 1)
    assert 7 < high < 12
    for axes, cloud in zip(figures[0].axes, clouds.values(), strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), reference)
        np.testing.assert_array_equal(axes.collections[1].get_offsets(), cloud)
        assert axes.bbox.width == pytest.approx(axes.bbox.height)
    assert legend(figures[0]) == ["real", "generated"]


def test_the_heatmap_has_generations_across_and_classes_up(figures: list[Any], tmp_path: Path) -> None:
    shares = RNG.dirichlet(np.ones(4), 6)
    class_heatmap(tmp_path / "x.png", shares)
    axes = figures[0].axes[0]
    (picture,) = axes.images
    np.testing.assert_array_equal(picture.get_array(), shares.T)
    assert (picture.origin, list(picture.get_extent())) == ("lower", [0.5, 6.5, -0.5, 3.5])
    assert all(tick % 1 == 0 for tick in (*axes.get_xticks(), *axes.get_yticks()))
    assert picture.get_clim() == (0, shares.max())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("generation", "class")


def draw_all(directory: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8, 1), np.uint8)
    arm_curves(directory / "curves.png", {"fid": {"a": VALUES}}, {"fid": {"a": VALUES[0]}}, {"fid": 0.1}, {})
    precision_recall_paths(directory / "paths.png", {"a": (VALUES, VALUES)})
    fresh_fraction_curve(directory / "fresh.png", np.arange(6) / 10, VALUES, None, "FID", "logarithm")
    generations_grid(directory / "grid.png", images, ["G1", "G2"])
    points_grid(directory / "points.png", {"G1": VALUES[:, :2]}, VALUES[:, 2:4])
    class_heatmap(directory / "classes.png", VALUES)


def test_equal_pictures_are_equal_files_of_sane_size_and_no_global_state(tmp_path: Path) -> None:
    from matplotlib import _pylab_helpers

    for name in ("one", "two"):
        draw_all(tmp_path / "new" / name)
    files = sorted((tmp_path / "new" / "one").iterdir())
    assert len(files) == 6
    for path in files:
        assert path.read_bytes() == (tmp_path / "new" / "two" / path.name).read_bytes()
        assert 200 < min(page(path).shape[:2]) < max(page(path).shape[:2]) < 1500
        assert page(path).std() > 5
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []
