"""Dragging: places, motion supervision, tracking and stopping on a drawn bump; landmarks; the command; the study."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from orchestration.cli.main import app
from orchestration.experiments.drag import Drag
from orchestration.runs.config import ConfigError
from pipelines.editing import invert, renderer
from pipelines.generators import FAMILY
from pipelines.generators.gan import GanGenerator, GanSettings
from pipelines.generators.gigagan import GigaGan
from pipelines.measures.landmarks import tips
from pipelines.storage.atomic import unpacked
from pipelines.studies import products
from pipelines.studies.drag import learn, measure
from policies.drag import DragSettings, Moment, around, at, drag, motion_loss, resized, towards, track
from policies.loops.samples import Samples
from tests.one_by_one import one_by_one

WIDTH, HEIGHT = 20, 14
SETTINGS = DragSettings(steps=150, learning_rate=0.2, stop=0.75, hold=0.3)


def bump(styles: Tensor) -> tuple[Tensor, Tensor]:
    """A bump whose centre (x, y) is the first two numbers of its style, and a second one that never moves; features
    with a slope of their own each, so that a place is known by them."""
    y, x = torch.meshgrid(torch.arange(HEIGHT).float(), torch.arange(WIDTH).float(), indexing="ij")
    left, up = (axis - styles[:, each, None, None] for each, axis in enumerate((x, y)))
    round_it = torch.exp(-(left**2 + up**2) / 12)
    still = torch.exp(-((x - 17) ** 2 + (y - 11) ** 2) / 4).expand_as(left)
    features = torch.stack([round_it, round_it * left, round_it * up, still], dim=1)
    return features[:, :1] * 2 - 1, features


def dragged(
    settings: DragSettings = SETTINGS,
    begin: tuple[float, float] = (6.0, 5.0),
    end: tuple[float, float] = (10.0, 8.0),
    fixed: Tensor | None = None,
    render: Callable[[Tensor], tuple[Tensor, Tensor]] = bump,
) -> list[Moment]:
    handles, targets = (torch.tensor(each)[None, None] for each in (begin, end))
    return [*drag(render, torch.tensor([begin]), handles, targets, fixed, settings)]


def test_places_are_x_and_y_in_pixels_also_of_resized_features() -> None:
    """A linear field is read exactly between pixels; one of half the resolution still is the same field in pixels."""
    y, x = torch.meshgrid(torch.arange(HEIGHT).float(), torch.arange(WIDTH).float(), indexing="ij")
    places = torch.tensor([[[3.0, 4.0], [3.25, 4.75], [12.5, 9.1]]])
    expected = torch.stack([places[..., 0], places[..., 1], 2 * places[..., 0] - 3 * places[..., 1]], dim=-1)
    field = torch.stack([x, y, 2 * x - 3 * y])[None]
    assert torch.allclose(at(field, places), expected, atol=1e-4)
    coarse = torch.nn.functional.avg_pool2d(field, 2)
    assert torch.allclose(at(resized(coarse, (HEIGHT, WIDTH)), places), expected, atol=1e-4)
    corners = torch.tensor([[[0.0, 0.0], [WIDTH - 1.0, HEIGHT - 1.0], [-2.0, 50.0]]])
    found = at(field, corners)[0, :, :2]
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [WIDTH - 1, HEIGHT - 1], [0.0, HEIGHT - 1]]), atol=1e-4)


def test_regions_are_in_pixels_and_never_empty() -> None:
    assert len(around(1.5, disc=True)) == 29
    assert len(around(3.0, disc=False)) == 13 * 13
    assert around(0.2, disc=True).tolist() == [[0.0, 0.0]]  # where the paper's rounding leaves nothing to average
    assert around(1.5, disc=True).norm(dim=1).max() <= 1.5


def test_the_way_is_a_step_toward_the_target_and_none_for_who_is_there() -> None:
    points, targets = torch.tensor([[[0.0, 0.0], [5.0, 5.0]]]), torch.tensor([[[3.0, 4.0], [5.5, 5.5]]])
    assert torch.allclose(towards(points, targets, 0.5, 0.75), torch.tensor([[[0.3, 0.4], [0.0, 0.0]]]))
    assert towards(points, points, 0.5, 0.75).eq(0).all()


def test_a_bump_is_pulled_to_its_target_and_tracked_all_the_way() -> None:
    moments = dragged()
    last = moments[-1]
    assert bool(last.arrived)
    assert len(moments) < SETTINGS.steps
    assert (last.styles[0] - torch.tensor([10.0, 8.0])).norm() < 0.75 + 0.5  # within what a window's grid can tell
    assert (last.points[0, 0] - torch.tensor([10.0, 8.0])).norm() <= 0.75
    for each in moments:  # the features' place is the bump's centre
        assert (each.points[0, 0] - each.styles[0]).norm() < 0.51
    assert not any(bool(each.arrived) for each in moments[:-1])


def test_no_gradient_flows_through_what_is_to_be_moved() -> None:
    """It is that of the loss whose source was computed beforehand, and not the one of both ends."""
    points, way = torch.tensor([[[6.0, 5.0]]]), torch.tensor([[[0.4, 0.3]]])
    styles = torch.tensor([[6.0, 5.0]], requires_grad=True)
    (found,) = torch.autograd.grad(motion_loss(bump(styles)[1], points, way, 1.5).sum(), styles)
    places = points[:, 0, None] + around(1.5, disc=True)

    def loss(source: Tensor) -> Tensor:
        return (at(bump(styles)[1], places + way[:, 0, None]) - source).abs().mean()

    (constant,) = torch.autograd.grad(loss(at(bump(styles)[1], places).detach()), styles)
    (both,) = torch.autograd.grad(loss(at(bump(styles)[1], places)), styles)
    assert torch.allclose(found, constant, atol=1e-6)
    assert not torch.allclose(found, both, atol=1e-3)
    assert (found * way[:, 0]).sum() < 0  # downhill is the way that the point is to go


def test_the_mask_is_fixed_and_holds_what_it_covers() -> None:
    """Held where the target is, nothing may appear there; held elsewhere, the bump moves as without."""
    everywhere, elsewhere = torch.ones(1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH)
    elsewhere[:, :, 16:] = 1
    hard = SETTINGS.model_copy(update={"hold": 20.0})
    held, moved = dragged(hard, fixed=everywhere), dragged(hard, fixed=elsewhere)
    assert (held[-1].styles - held[0].styles).norm() < 1.0
    assert not bool(held[-1].arrived)
    assert bool(moved[-1].arrived)
    change = (moved[-1].images - moved[0].images).abs()[0, 0]
    assert change[:, 16:].max() < change[:, :16].max() / 4


def test_it_stops_by_the_rule_and_each_image_by_itself() -> None:
    assert len(dragged(end=(6.5, 5.5))) == 1  # it is there
    assert len(dragged(SETTINGS.model_copy(update={"steps": 3}))) == 4
    begin = torch.tensor([[6.0, 5.0], [6.0, 5.0]])
    targets = torch.tensor([[[8.0, 5.0]], [[12.0, 8.0]]])
    moments = [*drag(bump, begin, begin[:, None], targets, None, SETTINGS)]
    first = next(number for number, each in enumerate(moments) if each.arrived[0])
    assert first < len(moments) - 1
    assert all(torch.equal(each.styles[0], moments[first].styles[0]) for each in moments[first:])
    alone = [*drag(bump, begin[:1], begin[:1, None], targets[:1], None, SETTINGS)]
    assert torch.allclose(alone[-1].styles[0], moments[first].styles[0], atol=1e-4)


def test_what_is_not_tracked_is_moved_from_where_it_was() -> None:
    """Its place is taken to be the first one, and what is there is moved on for as long as there are steps."""
    lost = dragged(SETTINGS.model_copy(update={"tracking": False, "steps": 40}))
    assert len(lost) == 41
    assert not bool(lost[-1].arrived)
    assert all(torch.equal(each.points[0, 0], torch.tensor([6.0, 5.0])) for each in lost)
    assert (lost[-1].styles - lost[0].styles).norm() > 0.5


def test_tracking_stays_within_its_window_and_the_image() -> None:
    known = at(bump(torch.tensor([[6.0, 5.0]]))[1], torch.tensor([[[6.0, 5.0]]]))
    moved = bump(torch.tensor([[8.0, 4.0]]))[1]
    assert torch.allclose(track(moved, torch.tensor([[[6.0, 5.0]]]), known, 3.0), torch.tensor([[[8.0, 4.0]]]))
    near = track(moved, torch.tensor([[[6.0, 5.0]]]), known, 1.0)
    assert (near - torch.tensor([[[6.0, 5.0]]])).abs().max() <= 1
    edge = track(moved, torch.tensor([[[0.0, 0.0]]]), known, 2.0)
    assert edge.min() >= 0


def test_two_points_are_dragged_at_once() -> None:
    """Of an image of two bumps, each by two numbers of the style."""

    def two(styles: Tensor) -> tuple[Tensor, Tensor]:
        (first, one), (second, other) = bump(styles[:, :2]), bump(styles[:, 2:])
        return torch.maximum(first, second), torch.cat([one[:, :3], other[:, :3]], dim=1)

    begin, end = torch.tensor([[[5.0, 4.0], [13.0, 9.0]]]), torch.tensor([[[5.0, 8.0], [16.0, 9.0]]])
    *_, last = drag(two, begin.flatten(1), begin, end, None, SETTINGS)
    assert bool(last.arrived)
    assert (last.styles.view(1, 2, 2) - end).norm(dim=-1).max() < 1.25


def test_landmarks_are_tips_of_the_ink_on_any_ground() -> None:
    images = np.full((2, 16, 16, 3), 120, np.uint8)
    images[0, 2:12, 7] = images[1, 2:12, 7] = (250, 20, 20)  # a stroke
    images[1, 2, 4:11] = (250, 20, 20)  # and a bar on it
    up = np.array([[0.0, -1.0]] * 2)
    places, spread = tips(images, up)
    assert np.abs(places[0] - [7, 2]).max() < 0.6
    assert spread[0] < 1 < spread[1]
    assert np.isinf(tips(np.full_like(images, 120), up)[1]).all()  # no ink
    down, _ = tips(images, -up)
    assert np.abs(down - [7, 11]).max() < 0.6


def test_a_reconstruction_draws_what_it_was_given() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 16, 16, 3), dtype=np.uint8)
    generator = GanGenerator.fit(GanSettings(width=4, latent=6, steps=2, batch_size=4), Samples(images), [0])
    known = generator.styles(3, 5)
    found, left = invert(generator, generator.draw(known), generator.styles(63, 6), steps=250)
    _, untrained = invert(generator, generator.draw(known), generator.styles(63, 6), steps=0)
    assert (left < untrained).all()
    assert left.max() < 0.02
    drawn, features = renderer(generator, known)(known.w)
    assert torch.allclose(drawn, generator.render(known)[0])
    assert features.shape == (3, 4, 8, 8)  # the finer map
    assert found.w.shape == known.w.shape


ARMS = {"moments": "{family: gaussian, n_ini: 20}", "gan": "{family: gan, rule: accumulate, n_ini: 60}"}


@pytest.fixture(scope="module")
def run(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished MAD run of seconds, whose first arm has no images."""
    from orchestration.experiments.mad.loop import run_mad
    from tests.test_mad import configure

    directory = tmp_path_factory.mktemp("drag") / "run"
    store = shutil.copy(empty_store, directory.with_name("mlflow.db"))
    settings = "generations=2", "seeds=1", "gan.width=4", f"tracking.uri=sqlite:///{store}"
    with one_by_one():
        run_mad(configure(directory, *settings, arms=ARMS), figures=False)
    return directory


def command(*words: object) -> list[str]:
    """What ``ouroboros drag`` prints. Raises ConfigError."""
    found = CliRunner().invoke(app, ["drag", *map(str, words)])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output.splitlines()


def test_the_command_drags_what_a_run_has_fitted(run: Path, tmp_path: Path) -> None:
    asked = run, "--from", "2,2", "--to", "5,2", "--from", "4,6", "--to", "4,5", "--steps", 4, "--seed", 3
    lines = command(*asked, "--output", tmp_path)
    assert [each.split(" ")[0] for each in lines[:2]] == ["2,2", "4,6"]
    assert "arrived after" in lines[2]
    strip, moving = Image.open(tmp_path / "drag-3.png"), Image.open(tmp_path / "drag-3.gif")
    assert strip.width > 4 * strip.height
    assert 1 < moving.n_frames <= 5
    start = np.asarray(strip)[: strip.height, : strip.height]
    first = tmp_path / "first"
    command(*asked, "--output", first, "--generation", 1, "--arm", "gan", "--run-seed", 0)
    other = np.asarray(Image.open(first / "drag-3.png"))[: strip.height, : strip.height]
    assert not np.array_equal(start, other)  # another generation's
    command(*asked, "--output", again := tmp_path / "again")
    assert (again / "drag-3.gif").read_bytes() == (tmp_path / "drag-3.gif").read_bytes()


def test_the_command_draws_a_picture_again_and_drags_that(run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))).save(tmp_path / "own.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    words = "--image", tmp_path / "own.png", "--mask", tmp_path / "mask.png", "--steps", 2, "--output", tmp_path
    lines = command(run, "--from", "2,2", "--to", "5,2", *words)
    assert "mean error" in lines[0]
    assert lines[-2:] == [str(tmp_path / "drag-own.png"), str(tmp_path / "drag-own.gif")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from", "2,2", "--to", "5,2", "--from", "1,1"], "2 --from and 1 --to"),
        (["--from", "2,2", "--to", "8,2"], "--to 8,2 is outside of the image: x is 0 to 7, y 0 to 7"),
        (["--from", "2,-1", "--to", "5,2"], "--from 2,-1 is outside"),
        (["--from", "2;2", "--to", "5,2"], "is no place x,y"),
        (["--from", "nan,2", "--to", "5,2"], "is no place x,y"),
        (["--arm", "moments"], "family gaussian, which has no styles to drag by"),
        (["--arm", "none"], "is no arm of"),
        (["--run-seed", "7"], "--run-seed 7"),
        (["--generation", "3"], "has 1 to 2"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--mask", "small.png"], "small.png is 4×6 pixels, and the images are 8×8"),
        (["--image", "small.png"], "small.png is 4×6 pixels, and the images are 8×8"),
        (["--mask", "no.png"], "cannot be read as a picture"),
        (["--prompt", "a seven"], "learns from no captions"),
    ],
)
def test_what_cannot_be_dragged_is_one_line(run: Path, tmp_path: Path, words: list[str], says: str) -> None:
    Image.new("L", (4, 6)).save(tmp_path / "small.png")
    places = [] if "--from" in words else ["--from", "2,2", "--to", "5,2"]
    given = [str(tmp_path / each) if each.endswith(".png") else each for each in words]
    with pytest.raises(ConfigError, match=says) as caught:
        command(run, *places, *given, "--output", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_of_a_gan_is_one_line(tmp_path: Path) -> None:
    for content, says in (
        ({"family": "diffusion"}, "no styles"),
        ({"family": "os:system"}, "no family that is built"),
        ({"family": "gan"}, "holds no gan that can be loaded"),
    ):
        (tmp_path / FAMILY).write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=says):
            command(tmp_path, "--from", "2,2", "--to", "5,2")
    (tmp_path / FAMILY).unlink()
    with pytest.raises(ConfigError, match="neither a run nor a product"):
        command(tmp_path, "--from", "2,2", "--to", "5,2")


def test_the_study_in_short(tmp_path: Path) -> None:
    """Its tasks, by themselves: equal repeats, metrics of every arm, a product that can be dragged."""
    changes = {"settings": {"steps": 3, "width": 4}, "drags": 4, "pixels": (1, 2), "spread": 9.0}
    study = Drag(**changes, dragging={"steps": 3}, posing={"rounds": 1})
    study.preflight()
    made, found = study.tasks("dragged", 0)
    model = learn(made.parameters, [], "cpu")
    result = measure(found.parameters, [model], "cpu")
    assert result == measure(found.parameters, [model], "cpu")
    numbers = json.loads(result["metrics.json"])
    names = {"reach", "distance", "believed", "kept", "changed", "disagree/at_1", "reconstruction/error"}
    assert numbers.keys() >= names
    assert len(numbers["disagree"]) == 2
    assert result["images/drags.png"][:4] == b"\x89PNG"
    (walk,) = study.tasks("walk", 0)
    assert [each.key for each in walk.inputs] == [made.key, found.key]
    walked = measure(walk.parameters, [model, result], "cpu")
    for name, lengths in json.loads(result["lengths.json"]).items():
        assert np.allclose(json.loads(walked["lengths.json"])[name], lengths, atol=1e-4)
    others = measure(study.tasks("unmasked", 0)[0].parameters, [model], "cpu")
    assert "disagree" not in json.loads(others["metrics.json"])  # of real digits nothing is asked there
    still = measure(study.tasks("still", 0)[0].parameters, [model], "cpu")
    assert json.loads(still["metrics.json"])["changed"] == 0
    assert json.loads(still["metrics.json"])["kept"] == 1
    place = tmp_path / "product"
    for name, content in products(model)[""].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    lines = command(place, "--from", "8,2", "--to", "8,4", "--steps", 1, "--output", tmp_path)
    assert "not arrived" in lines[1]
    assert unpacked(products(model)[""], GigaGan.load).settings.width == 4


def test_the_study_claims_what_its_controls_can_deny() -> None:
    study = Drag()
    keys = {arm: study.tasks(arm, 0)[-1].key for arm in study.arms}
    assert len(set(keys.values())) == len(study.arms)
    assert {each.inputs[0].key for arm in study.arms for each in study.tasks(arm, 0)[-1:]} == {
        study.tasks("dragged", 0)[0].key
    }
    assert {each.arm for each in study.claimed()} == {"dragged", "untracked", "walk", "still", "unmasked"}
    assert {each.arm for each in Drag(arms=("dragged",)).claimed()} == {"dragged"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "diffusion"}, "no styles to drag by"),
        ({"settings": {"widht": 3}}, "did you mean 'width'"),
        ({"posing": {"inks": ("pink",)}}, "posing.inks: 'pink' is none of red"),
        ({"pixels": (2, 1)}, "each larger than the last"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
        ({"captioner": "nowhere"}, "captioner: there is no directory"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Drag(**changes).preflight()
    assert "\n" not in str(caught.value)
