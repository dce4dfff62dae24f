"""Animating an image: windows of a long video, reference attention, what poses tell, and the study in short."""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNetMotionModel
from PIL import Image

from orchestration.experiments.animate import Animate
from pipelines.animator import Animator, boxes
from pipelines.data.digits import load_split
from pipelines.data.motion import moving, paths
from pipelines.settings import FittingSettings
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.tasks import in_order
from pipelines.studies import perform, products
from pipelines.studies.animate import handwriting, references
from policies.animate import fused, repeated, windows


def test_windows_go_round_and_see_every_frame_alike() -> None:
    found = windows(12, 8, 4)
    assert found.tolist() == [[*range(8)], [*range(4, 12)], [8, 9, 10, 11, 0, 1, 2, 3]]
    assert (torch.bincount(found.flatten()) == 2).all()
    assert windows(16, 8, 0).tolist() == [[*range(8)], [*range(8, 16)]]
    assert windows(5, 8, 4).tolist() == [[*range(5)]]


@pytest.mark.parametrize(("frames", "overlap"), [(14, 4), (16, 8), (16, -1), (12, 0)])
def test_windows_that_do_not_meet_are_refused(frames: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=r"windows: .* whole number of windows of 8"):
        windows(frames, 8, overlap)


def test_a_frame_is_the_mean_of_what_windows_say_of_it() -> None:
    seen, random = windows(12, 8, 4), np.random.default_rng(0)
    outputs = random.standard_normal((3, 2, 8, 5))
    by_hand = np.zeros((2, 12, 5))
    for frame in range(12):
        said = [outputs[w, :, at] for w in range(3) for at in range(8) if seen[w, at] == frame]
        by_hand[:, frame] = np.mean(said, axis=0)
    assert np.allclose(fused(torch.from_numpy(outputs), seen, 12).numpy(), by_hand)
    whole = torch.from_numpy(random.standard_normal((2, 12, 5)))  # windows that agree change nothing
    assert torch.allclose(fused(whole[:, seen].transpose(0, 1), seen, 12), whole)


def test_noise_comes_again_after_each_window() -> None:
    noise = torch.randn(2, 4, 3)
    assert torch.equal(repeated(noise, 10)[:, 4:8], noise)
    assert torch.equal(repeated(noise, 10)[:, 8:], noise[:, :2])


def test_a_pose_tells_the_commanded_place_and_nothing_else() -> None:
    found = boxes(np.array([[10.0, 21.5]]))
    assert found.shape == (1, 2, 3, 16, 32)
    inside, across, down = found[0].unbind(dim=1)
    assert torch.equal(inside[0].sum(dim=1), torch.full((16,), 16.0))  # as wide as it is high
    centres = (inside[:, 0] * (torch.arange(32) + 0.5)).sum(dim=1) / inside[:, 0].sum(dim=1)
    assert (centres - torch.tensor([10.0, 21.5])).abs().max() <= 0.5
    assert torch.allclose(across[0, :, 2:18], ((torch.arange(16) + 0.5) / 16).expand(16, -1))
    assert torch.allclose(down[1, :, 20], (torch.arange(16) + 0.5) / 16)
    assert (found.amin(), found.amax()) == (0, 1)
    same = moving(np.full((2, 1), 16.0), "test", 0, np.array([0, 5]))  # of two digits in one column
    told = boxes(np.rint(same.columns))
    assert torch.equal(told[0], told[1])


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = StableDiffusionPipeline.from_pretrained("models/digits-attention/pipeline", torch_dtype=torch.float32)
    found.unet.requires_grad_(False)
    return found


def test_the_reference_reaches_each_frame_of_its_own_video_alone(pipeline: Any) -> None:
    """An untrained animator without reference says what the UNet says; a reference changes its own frames."""
    animator, random = Animator(pipeline), torch.Generator().manual_seed(0)
    assert all(each.requires_grad for each in animator.parameters())
    held = Animator(pipeline, frozen=True)
    assert not any(each.requires_grad for each in held.denoiser.parameters())
    assert all(each.requires_grad for each in held.control.parameters())
    noisy, times = torch.randn(2, 3, 4, 8, 16, generator=random), torch.tensor([100, 900])
    poses, first = boxes(np.full((2, 3), 12.0)), torch.randn(2, 4, 8, 8, generator=random)
    other = torch.cat([first[:1], first[1:] + 1])
    flat, told = noisy.flatten(0, 1), animator.untold.expand(6, -1, -1)
    with torch.no_grad():
        plain = StableDiffusionPipeline.from_pretrained("models/digits-attention/pipeline").unet.float()
        alone = plain(flat, times.repeat_interleave(3), told, return_dict=False)[0]
        assert torch.allclose(animator(noisy, times, poses, None).flatten(0, 1), alone, atol=1e-5)
        shown, changed = (animator(noisy, times, poses, each) for each in (first, other))
        assert not torch.allclose(shown.flatten(0, 1), alone, atol=1e-3)
        assert torch.allclose(shown[0], changed[0], atol=1e-6)
        assert (shown[1] - changed[1]).abs().amax(dim=(1, 2, 3)).min() > 1e-4
        of_each = animator(noisy, times, poses, first.repeat_interleave(3, dim=0))  # a reference for every frame
    assert torch.allclose(of_each, shown, atol=1e-5)


def test_handwriting_knows_the_reference_from_others_of_its_class() -> None:
    wanted = moving(paths(20, 3, 0), "test", 0)
    given = references(wanted)
    assert given.shape == (20, 16, 16, 3)
    assert (handwriting(wanted, given, wanted.videos, wanted.columns) == 1).all()
    labels = load_split("test").labels
    rows = np.array([np.flatnonzero(labels == labels[row])[-1] for row in wanted.rows])
    others = moving(paths(20, 3, 0), "test", 1, rows)  # another hand, in other colours
    strangers = handwriting(wanted, given, others.videos, others.columns)[rows != wanted.rows]
    assert 0.2 < strangers.mean() < 0.8


SHORT: dict[str, Any] = {
    "videos": 6,
    "length": 4,
    "overlap": 2,
    "drawn": 2,
    "frames": 8,
    "steps": 2,
    "appearance": FittingSettings(steps=2, batch_size=2),
    "motion": FittingSettings(steps=2, batch_size=2),
}


@pytest.fixture(scope="module")
def results() -> Mapping[str, Files]:
    """Every arm's last task, and all tasks by their labels."""
    study, done = Animate(**SHORT), dict[str, Files]()
    tasks = {arm: list(study.tasks(arm, 0)) for arm in study.arms}
    for each in in_order([one for several in tasks.values() for one in several]):
        done[each.key] = perform(each.kind, each.parameters, [done[one.key] for one in each.inputs], "cpu")
    return {arm: done[several[-1].key] for arm, several in tasks.items()} | {
        one.label: done[one.key] for one in tasks["animate"][:-1]
    }


def test_the_study_in_short(results: Mapping[str, Files]) -> None:
    names = {"identity", "position", "flicker", "seams", "handwriting"}
    for arm in Animate().arms:
        found = json.loads(results[arm]["metrics.json"])
        assert found.keys() == names
        assert np.isfinite([*found.values()]).all()
    moving = Image.open(BytesIO(results["animate"]["figures/videos.gif"]))
    assert getattr(moving, "n_frames", 1) > 1
    assert results["animate"]["figures/videos.png"] != results["unreferenced"]["figures/videos.png"]
    study = Animate(**SHORT)
    again = study.tasks("per_frame", 0)[-1]
    looks = perform(again.inputs[0].kind, again.inputs[0].parameters, [], "cpu")
    assert looks == results["encoder, seed 0"]  # equal parameters, equal files
    assert perform(again.kind, again.parameters, [looks], "cpu") == results["per_frame"]


def test_products_are_read_by_the_stock_classes(results: Mapping[str, Files]) -> None:
    found = products(results["encoder, seed 0"]) | products(results["motion, seed 0"])
    control = unpacked(found["controlnet"], ControlNetModel.from_pretrained)
    motion = unpacked(found["motion"], UNetMotionModel.from_pretrained)
    assert control.config.conditioning_embedding_out_channels == [16, 32]
    told = torch.zeros(2, 16, 64)
    poses = boxes(np.full((1, 2), 9.0))[0]
    with torch.no_grad():
        extra = control(torch.zeros(2, 4, 8, 16), 5, told, poses, return_dict=False)
        said = motion(
            torch.zeros(1, 4, 2, 8, 16),
            5,
            told,
            down_block_additional_residuals=extra[0],
            mid_block_additional_residual=extra[1],
        ).sample
    assert said.shape == (1, 4, 2, 8, 16)
    assert said.isfinite().all()


def test_arms_share_what_they_learn_from() -> None:
    study = Animate()
    tasks = {arm: study.tasks(arm, 0) for arm in study.arms}
    assert len({several[-1].key for several in tasks.values()}) == len(study.arms)
    looks, moves, _ = tasks["animate"]
    assert all(several[-1].inputs[0].key == looks.key for several in tasks.values())
    assert {arm for arm, several in tasks.items() if len(several[-1].inputs) < 2} == {"per_frame"}
    others = {arm for arm, several in tasks.items() if several[-1].inputs[-1].key not in (moves.key, looks.key)}
    assert others == {"shuffled"}
    assert {claim.arm for claim in study.claimed()} == {"animate", "unreferenced", "shuffled", "apart"}
    assert {claim.control for claim in study.claimed()} >= {"per_frame", "animate"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 14}, "make them a multiple of 3"),
        ({"overlap": 6}, "the overlap at least 0 and less than the length"),
        ({"frames": 9}, "with 0 in common"),
        ({"length": 30, "frames": 30}, "modules.longest=24"),
        ({"modules": {"heads": 5}}, "5 do not divide the 48 channels"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
        ({"path": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_animated_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Animate(**changes).preflight()
    assert "\n" not in str(caught.value)
