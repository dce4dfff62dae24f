"""Keypoints: affine maps and places, peaks, the choice of tokens, both losses, regression; attention; the study."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from orchestration.experiments.keypoints import FindKeypoints
from pipelines.keypoints import FILE, Keypoints, Looking, Seer
from pipelines.rewards import load_reward, parse_options, score
from pipelines.storage.model_files import ModelFilesError
from pipelines.studies import products
from pipelines.studies.keypoints import landmarks, learn, measure
from policies.keypoints import (
    KeypointSettings,
    bumps,
    carried,
    choose,
    divergence,
    far_apart,
    inverse,
    losses,
    mean_distance,
    peaks,
    regressed,
    regression,
    turns,
    unwarped,
    warped,
)

SIZE = (24, 40)
SETTINGS = KeypointSettings(tokens=6, keypoints=2, candidates=3, steps=2, batch=2, resolution=2, views=2, images=4)


def some_turns(count: int, **changes: object) -> Tensor:
    return turns(count, KeypointSettings(**changes), SIZE, np.random.default_rng(0))  # type: ignore[arg-type]


def test_what_is_drawn_at_a_place_is_drawn_where_the_place_is_carried() -> None:
    """Also on a canvas that is no square, where a rotation in the coordinates of a grid is none."""
    how, places = some_turns(20), torch.tensor([[20.0, 12.0], [15.0, 9.0]]).repeat(20, 1, 1)
    expected = carried(places, how, SIZE)
    inside = ((expected >= 1) & (expected <= torch.tensor([SIZE[1] - 2, SIZE[0] - 2]))).all(dim=2)
    found = peaks(warped(bumps(places, SIZE, 1.5), how))
    assert inside.sum() > 20
    assert (found - expected)[inside].norm(dim=1).max() < 1.0
    apart, before = (expected[:, 0] - expected[:, 1]).norm(dim=1), (places[0, 0] - places[0, 1]).norm()
    assert ((apart / before >= 0.8 - 1e-4) & (apart / before <= 1 + 1e-4)).all()  # of the zoom alone


def test_turned_back_is_as_before_where_there_is_anything() -> None:
    how = some_turns(8)
    maps = bumps(torch.rand(8, 3, 2) * torch.tensor([20.0, 10.0]) + 8, SIZE, 3.0)
    back, inside = unwarped(warped(maps, how), how)
    assert ((back - maps).abs() * inside).max() < 0.12  # sampled twice
    assert 0.4 < inside.mean() < 1
    outside = carried(torch.tensor([[[0.0, 0.0]]]).repeat(8, 1, 1), how, SIZE)[:, 0].min(dim=1).values < -0.5
    assert inside[outside, 0, 0, 0].eq(0).all()
    still = some_turns(2, rotation=0.0, zoom=(1.0, 1.0), shift=0.0)
    assert torch.allclose(inverse(still), torch.eye(3)[:2].expand(2, 2, 3))
    assert unwarped(maps, still.repeat(4, 1, 1))[1].eq(1).all()


def test_a_clear_peak_is_nearer_to_a_gaussian_than_a_faint_or_a_second_one() -> None:
    """Against KL(Gaussian ‖ softmax) by the definition, in float64."""
    peak = bumps(torch.tensor([[[9.0, 8.0]]]), SIZE, 1.0)
    two = torch.maximum(peak, bumps(torch.tensor([[[30.0, 15.0]]]), SIZE, 1.0))
    maps = torch.cat([0.01 * peak, peak, two, torch.full_like(peak, 0.5)], dim=1)
    found = divergence(maps, 1.0)[0]
    assert found.argmin() == 1
    assert found.argmax() == 3
    wanted = peak.double().flatten() / peak.double().sum()
    seen = two.double().flatten().exp() / two.double().exp().sum()
    by_hand = sum(float(p * (p / q).log()) for p, q in zip(wanted, seen, strict=True) if p > 0)
    assert float(found[2]) == pytest.approx(by_hand, abs=1e-3)


def test_candidates_are_far_apart_and_each_once() -> None:
    places = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [9, 9], [0, 8], [0, 8]]])
    order = torch.tensor([[1, 0, 2, 3, 4, 5]])
    assert far_apart(places, order, 3).tolist() == [[1, 3, 4]]
    assert sorted(far_apart(places, order, 6)[0].tolist()) == [0, 1, 2, 3, 4, 5]  # though two are in one place
    assert far_apart(places, order[:, :3], 2).tolist() == [[1, 2]]  # sqrt 2 from the first, and no other is asked


def test_the_choice_with_and_without_distance() -> None:
    places = torch.tensor([[[5.0, 5.0], [6.0, 5.0], [30.0, 20.0], [20.0, 5.0]]])
    maps = bumps(places, SIZE, 1.0) * torch.tensor([1.0, 0.9, 0.8, 0.1])[:, None, None]
    how = KeypointSettings(tokens=4, keypoints=2, candidates=3, peak=1.0)
    assert choose(maps, how).tolist() == [[0, 2]]
    assert choose(maps, how.model_copy(update={"spread": False})).tolist() == [[0, 1]]


def test_maps_that_move_with_the_image_cost_nothing_and_others_something() -> None:
    how, settings = some_turns(4), KeypointSettings(tokens=3, keypoints=2, candidates=3, peak=2.0)
    places = torch.tensor([[[15.0, 10.0], [25.0, 12.0], [20.0, 14.0]]]).repeat(4, 1, 1)
    maps = bumps(places, SIZE, 2.0)
    moving = bumps(carried(places, how, SIZE), SIZE, 2.0)
    local, moved = losses(maps, moving, how, settings)
    assert local < 1e-9
    _, still = losses(maps, maps, how, settings)
    assert moved < still / 20
    _, inside = unwarped(moving, how)
    garbage = maps + 7 * (1 - inside)  # where the turned image says nothing
    _, same = losses(garbage, moving, how, settings.model_copy(update={"spread": False}))
    chosen = choose(garbage, settings.model_copy(update={"spread": False}))
    kept = maps.gather(1, chosen[..., None, None].expand(-1, -1, *SIZE))
    back = unwarped(moving.gather(1, chosen[..., None, None].expand(-1, -1, *SIZE)), how)[0]
    by_hand = sum(float((((k - b) ** 2) * i).sum()) for k, b, i in zip(kept, back, inside, strict=True))
    assert float(same) == pytest.approx(by_hand / float(inside.sum() * 2), rel=1e-4)


def test_landmarks_that_are_linear_in_keypoints_are_found_and_the_middle_tells_nothing() -> None:
    rng, size = np.random.default_rng(0), (16, 32)
    points = rng.uniform(0, 15, (60, 3, 2))
    middle = (np.array([32, 16]) - 1) / 2
    marks = np.stack([0.5 * (points[:, 0] + points[:, 1]), points[:, 2] * 0.8 + 0.2 * middle], axis=1)
    weights = regression(points[:40], marks[:40], size)
    assert np.allclose(regressed(points[40:], weights, size), marks[40:], atol=1e-8)
    blind = np.tile(middle, (60, 3, 1))
    assert np.allclose(regressed(blind, regression(blind, marks, size), size), middle)
    assert mean_distance(blind) == 0
    assert mean_distance(np.array([[[0.0, 0], [3, 4], [0, 0]]])) == pytest.approx(10 / 3)


@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_attention_is_what_it_was_and_its_maps_are_the_softmax_over_tokens(shape: float) -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=12, cross_attention_dim=10, heads=2, dim_head=6).eval()
    states, tokens = torch.randn(3, int(16 * shape), 12), torch.randn(3, 5, 10)
    looking = Looking(1)
    looking.shape = shape
    with torch.no_grad():
        assert torch.equal(looking(attention, states, tokens), AttnProcessor2_0()(attention, states, tokens))
        query, key = (attention.head_to_batch_dim(each) for each in (attention.to_q(states), attention.to_k(tokens)))
        plain = attention.get_attention_scores(query, key).unflatten(0, (3, 2)).mean(dim=1)
    assert looking.seen.shape == (3, 5, 4, int(4 * shape))
    assert torch.allclose(looking.seen.flatten(2).transpose(1, 2), plain, atol=1e-6)
    finer = Looking(4)
    finer.shape = shape
    with torch.no_grad():
        finer(attention, states, tokens)
    assert finer.seen.shape == (3, 5, 16, int(16 * shape))
    assert torch.allclose(finer.seen.sum(dim=1), torch.ones(3, 16, int(16 * shape)), atol=1e-5)


def test_what_is_no_file_of_tokens_is_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(2, 3)}, other := tmp_path / "other.safetensors")
    (broken := tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for file, says in ((other, "holds no tokens"), (broken, "broken.safetensors")):
        with pytest.raises(ModelFilesError, match=says) as caught:
            Keypoints(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"digits": (3, 12)}, "12 is no digit"),
        ({"posing": {"inks": ["pink"]}}, "posing.inks: 'pink' is none of"),
        ({"path": "models/digits/evaluator"}, "has no model_index.json"),
        ({"learning": {"tokens": 5, "candidates": 9}}, "let them rise"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        FindKeypoints(**changes).preflight()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_network_without_cross_attention_is_refused(tmp_path: Path) -> None:
    shutil.copytree("models/digits-attention/pipeline", path := tmp_path / "pipeline")
    config = json.loads((path / "unet/config.json").read_text())
    (path / "unet/config.json").write_text(json.dumps(config | {"up_block_types": ["UpBlock2D", "UpBlock2D"]}))
    with pytest.raises(ValueError, match="no cross-attention on the way up"):
        FindKeypoints(path=str(path)).preflight()


def test_the_study_in_short(tmp_path: Path) -> None:
    """Its tasks, by themselves: equal repeats, metrics of every arm, tokens that find the same keypoints again."""
    study = FindKeypoints(learning=SETTINGS, labelled=12, judged=8, posing={"rounds": 1}, width=24)  # type: ignore[arg-type]
    found = {}
    for arm in study.arms:
        *learned, judged = study.tasks(arm, 0)
        files = [learn(each.parameters, [], "cpu") for each in learned]
        found[arm] = measure(judged.parameters, files, "cpu")
        values = json.loads(found[arm]["metrics.json"])
        assert {claim.metric for claim in study.claims()} <= set(values)
        if arm == "learned":
            assert learn(learned[0].parameters, [], "cpu") == files[0]
            assert measure(judged.parameters, files, "cpu") == found[arm]
            (tmp_path / FILE).write_bytes(products(files[0])[""][FILE])
        if arm == "centre":
            assert values["spread"] == 0
            assert values["of_mean_shape"] > 0.9
    assert len({files["metrics.json"] for files in found.values()}) == len(study.arms)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    find = Keypoints(tmp_path / FILE)
    points = find(images)
    assert points.shape == (3, 2, 2)
    assert ((points >= 0) & (points <= [23, 15])).all()
    assert np.array_equal(points, Keypoints(tmp_path / FILE)(images))
    assert not torch.equal(
        find.found.tokens, Seer(study.path, SETTINGS.model_copy(update={"steps": 0})).fit(images, 0).tokens
    )


def test_landmarks_are_eight_ends_of_the_ink() -> None:
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, 4:12, 6:9] = 255
    places = landmarks(image)[0]
    assert np.abs(places[[1, 3, 5, 7]] - [[8, 4], [8, 11], [6, 11], [6, 4]]).max() < 0.8


def test_the_reward_ranks_places_and_refuses_what_it_cannot_score(tmp_path: Path) -> None:
    """A pose is where keypoints are in a picture: that picture scores 0, a moved one less, and it is the prompt that
    says which is which."""
    seer = Seer("models/digits-attention/pipeline", SETTINGS.model_copy(update={"steps": 0, "tokens": 12}))
    images = np.zeros((2, 16, 32, 3), np.uint8)
    images[0, 3:13, 4:9] = images[1, 3:13, 20:25] = (245, 215, 25)
    (file := tmp_path / FILE).write_bytes(seer.fit(images, 0).file())
    places = dict(zip(("left", "right"), Keypoints(file)(images).round(3).tolist(), strict=True))
    (poses := tmp_path / "poses.yaml").write_text(yaml.safe_dump(places))
    options = parse_options("keypoint_pose", {"tokens": str(file), "poses": str(poses)})
    options.check(["left", "right"])
    function = load_reward("keypoint_pose", options)
    right, wrong = (score(function, images, asked, None) for asked in (["left", "right"], ["right", "left"]))
    assert np.abs(right).max() < 0.01
    assert (wrong < right - 1).all()
    assert np.allclose(score(function, images[1:], ["right"], None), right[1:])  # whatever is beside it
    more = tmp_path / "more.safetensors"
    more.write_bytes(Seer(seer.path, KeypointSettings(steps=0, views=1)).fit(images, 0).file())
    begun = load_reward("keypoint_pose", options.model_copy(update={"tokens": str(more)}), "meta")  # a run tried out
    with pytest.raises(ValueError, match="2 places a prompt, for 6 keypoints"):
        begun(images, ["left", "right"], None)
    assert load_reward("keypoint_pose", options, "meta")(images, ["left", "right"], None).shape == (2,)
    expected = -np.linalg.norm(np.subtract(places["left"], places["right"]), axis=1)
    assert wrong[0] == pytest.approx(expected.mean(), abs=0.01)
    poses.write_text(yaml.safe_dump({"left": [None, places["left"][1]], "right": [[1, 2]], "none": [None, None]}))
    options = parse_options("keypoint_pose", {"tokens": str(file), "poses": str(poses)})
    half = score(load_reward("keypoint_pose", options), images[1:], ["left"], None)
    assert half[0] == pytest.approx(expected[1], abs=0.01)
    for asked, says in (
        (["up"], "no pose for the prompt 'up'"),
        (["none"], "has no place"),
        (["left", "right"], "as many"),
    ):
        with pytest.raises(ValueError, match=says):
            options.check(asked)
    poses.write_text("left: here")
    with pytest.raises(ValueError, match="is not a mapping of prompts to lists of places"):
        parse_options("keypoint_pose", {"tokens": str(file), "poses": str(poses)}).check(["left"])
