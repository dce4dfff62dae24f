"""Moving digits and their truth, what is measured of a video, and motion modules: they add nothing until trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNetMotionModel

from pipelines.animation import (
    decode_videos,
    draw_videos,
    encode_videos,
    learn_motion,
    motion_network,
    predict,
    text_states,
)
from pipelines.data.digits import load_split, parse, tint
from pipelines.data.motion import CANVAS, moving, paths
from pipelines.measures.evaluator import Evaluator, load_evaluator
from pipelines.measures.motion import flicker, found_columns, identity, obedience, position, travelled, unshifted
from pipelines.settings import FittingSettings, MotionSettings


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = StableDiffusionPipeline.from_pretrained("models/digits-attention/pipeline", torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    for part in (found.unet, found.vae, found.text_encoder):
        part.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return load_evaluator("models/digits/evaluator")


def test_a_moving_digit_is_the_same_pixels_in_every_frame() -> None:
    ways = paths(40, 6, 3)
    found = moving(ways, "test", 5)
    assert found.videos.shape == (40, 6, 16, CANVAS, 3)
    assert np.abs(found.columns - ways).max() <= 0.5  # to the nearest pixel
    assert np.abs(np.diff(found.columns, axis=1) % 1).max() < 1e-9  # by whole ones
    assert np.allclose(found_columns(found.videos), found.columns)
    held = unshifted(found.videos, found.columns)
    assert (held == held[:, :1]).all()
    digits = load_split("test")
    assert len(set(found.rows.tolist())) == 40
    for row, text, square in zip(found.rows, found.captions, held, strict=True):
        slots = parse(text)
        ink, ground = str(slots["ink"]), str(slots["ground"])
        known = tint(np.pad(digits.strokes[row], ((0, 0), (3, 3)))[None], [ink], [ground])[0]
        assert any((known[:, by : by + 16] == square[0]).all() for by in range(7))


def test_moving_digits_are_told_by_their_seed_and_of_whom_by_rows() -> None:
    ways = paths(4, 3, 0)
    assert (moving(ways, "train", 1).videos == moving(ways, "train", 1).videos).all()
    assert not (moving(ways, "train", 1).videos == moving(ways, "train", 2).videos).all()
    assert moving(ways, "test", 1, np.array([7, 7, 8, 9])).rows.tolist() == [7, 7, 8, 9]
    part = moving(ways, "test", 1).taken(np.array([2]))
    assert len(part.videos) == len(part.captions) == len(part.columns) == len(part.rows) == 1


def test_paths_are_steady_and_turn_at_the_edge() -> None:
    ways = paths(200, 30, 1, most=2.0)
    steps = np.abs(np.diff(ways, axis=1))
    assert steps.max() <= 2.0
    assert ways.min() >= 8
    assert ways.max() <= 24
    steady = np.median(steps, axis=1)
    assert (steady >= 1).all()
    assert (np.abs(steps - steady[:, None]) < 1e-9).mean() > 0.8  # all but the turns


@pytest.mark.parametrize("way", [np.full((2, 3), 7.5), np.full((2, 3), 24.5), np.full(3, 12.0), np.zeros((0, 3))])
def test_a_path_that_leaves_the_canvas_is_refused(way: np.ndarray) -> None:
    with pytest.raises(ValueError, match="columns from 8 to 24"):
        moving(way, "test", 0)


def test_measures_know_the_truth_and_what_departs_from_it(judge: Evaluator) -> None:
    found = moving(paths(60, 5, 2), "test", 2)
    videos, commanded = found.videos, found.columns
    assert position(videos, commanded).max() < 1e-9
    assert flicker(videos, commanded).max() == 0
    assert np.allclose(travelled(videos), np.abs(np.diff(commanded, axis=1)).sum(axis=1))
    assert np.allclose(obedience(videos, commanded), 1)
    assert identity(videos, commanded, found.captions, judge).mean() > 0.95
    shifted = np.roll(videos, 2, axis=3)
    inside = (commanded < 20).all(axis=1)
    assert np.allclose(position(shifted, commanded)[inside], 2, atol=1e-6)
    assert identity(videos, commanded, [*found.captions[1:], found.captions[0]], judge).mean() < 0.3
    still = np.repeat(videos[:, :1], 5, axis=1)
    assert (obedience(still, commanded) == 0).all()
    assert (travelled(still) == 0).all()
    mixed = videos.copy()
    mixed[:, 2] = 255 - mixed[:, 2]
    change = flicker(mixed, commanded)
    assert (change[:, [0, 3]] == 0).all()
    by_hand = np.abs(unshifted(mixed, commanded)[:, 2].astype(float) - unshifted(mixed, commanded)[:, 1]) / 255
    assert np.allclose(change[:, 1], by_hand.mean(axis=(1, 2, 3)), atol=1e-6)


def test_new_motion_modules_change_nothing_and_each_video_is_told_its_own_text(pipeline: Any) -> None:
    network = motion_network(pipeline.unet, MotionSettings(), 0)
    random = torch.Generator().manual_seed(0)
    latents, times = torch.randn(3, 4, 4, 8, 16, generator=random), torch.tensor([10, 500, 999])
    states = text_states(pipeline, ["a red two on a black background", "", "a blue one on a gray background"])
    with torch.no_grad():
        apart = predict(pipeline.unet, latents, times, states)
        assert torch.allclose(predict(network, latents, times, states), apart, atol=1e-6)
        alone = pipeline.unet(latents[2], times[2], states[2].expand(4, -1, -1), return_dict=False)[0]
        assert torch.allclose(apart[2], alone, atol=1e-5)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        moved = predict(network, latents, times, states)
        assert not torch.allclose(moved, apart, atol=1e-3)
        other = latents.clone()
        other[0, 3] += 1  # one frame is seen by the others of its video, and by no other video
        changed = (predict(network, other, times, states) - moved).abs().amax(dim=(2, 3, 4))
    assert (changed[0] > 1e-5).all()
    assert (changed[1:] < 1e-6).all()


def test_motion_modules_have_the_sizes_that_are_asked_for(pipeline: Any) -> None:
    network = motion_network(pipeline.unet, MotionSettings(heads=4, longest=9, middle=True), 0)
    assert (network.config.motion_num_attention_heads, network.config.motion_max_seq_length) == (4, 9)
    assert hasattr(network.mid_block, "motion_modules")
    assert not any(parameter.requires_grad for name, parameter in network.named_parameters() if "motion" not in name)
    with pytest.raises(ValueError, match=r"motion\.heads: 5 do not divide the 48 channels"):
        motion_network(pipeline.unet, MotionSettings(heads=5), 0)


def test_only_motion_modules_are_trained_and_the_stock_class_reads_them(pipeline: Any, tmp_path: Path) -> None:
    data = moving(paths(8, 4, 0), "train", 0)
    network = motion_network(pipeline.unet, MotionSettings(), 1)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    learn_motion(pipeline, network, data.videos, data.captions, FittingSettings(steps=3, batch_size=2), 0)
    changed = {name for name, each in network.state_dict().items() if not torch.equal(each, before[name])}
    assert changed
    assert all("motion_modules" in name for name in changed)
    again = motion_network(pipeline.unet, MotionSettings(), 1)
    learn_motion(pipeline, again, data.videos, data.captions, FittingSettings(steps=3, batch_size=2), 0)
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in network.state_dict().items())
    network.save_pretrained(tmp_path)
    stock = UNetMotionModel.from_pretrained(tmp_path)
    captions = ["a red two on a black background"]
    drawn = draw_videos(pipeline, network, captions, 0, frames=3, steps=2)
    assert drawn.shape == (1, 3, 16, 32, 3)
    assert (draw_videos(pipeline, stock, captions, 0, frames=3, steps=2) == drawn).all()


def test_videos_by_untrained_modules_are_those_of_the_image_pipeline(pipeline: Any, judge: Evaluator) -> None:
    captions = ["a red two on a black background", "a green zero on a white background"]
    network = motion_network(pipeline.unet, MotionSettings(), 0)
    drawn = draw_videos(pipeline, network, captions, 3, frames=2, steps=6)
    apart = draw_videos(pipeline, pipeline.unet, captions, 3, frames=2, steps=6)
    assert np.abs(drawn.astype(int) - apart).max() <= 1
    assert identity(drawn, found_columns(drawn), captions, judge).mean() > 0.7
    unguided = draw_videos(pipeline, pipeline.unet, captions, 3, frames=2, steps=6, guidance_scale=1)
    assert not np.array_equal(unguided, apart)


def test_latents_of_videos_are_those_of_their_frames(pipeline: Any) -> None:
    data = moving(paths(3, 4, 0), "test", 0)
    mean, deviation = encode_videos(pipeline, data.videos)
    assert mean.shape == deviation.shape == (3, 4, 4, 8, 16)
    back = decode_videos(pipeline, mean)
    assert back.shape == data.videos.shape
    assert np.abs(back.astype(float) - data.videos).mean() < 10
    assert position(back, data.columns).mean() < 0.4
