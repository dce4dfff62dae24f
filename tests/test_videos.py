"""Videos: their frames, what is said of them whole and frame by frame, and a run that draws them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actors.roles.evaluator import EvaluatorActor
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.generate import generate
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.experiments.ddpo.reward_audit import audit
from orchestration.runs.config import ConfigError, load_config
from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS, load_split, tint
from pipelines.denoisers import load_family
from pipelines.rewards import load_reward, parse_options
from pipelines.rewards.videos import motion
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import CHECKOUT
from pipelines.videos import apart, frames_of, gif, of_each_frame
from policies.inverting import InvertingSettings
from tests.models import PROMPTS, build_tiny_pipeline, build_tiny_video
from tests.test_config import command

JUDGE, CAPTIONER = (str(CHECKOUT / "models/digits" / each) for each in ("evaluator", "captioner"))


def moving(path: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """A video (1, frames, 20, 30, 3) of a patch of noise on black that stands at each (row, column) of ``path``."""
    patch = np.random.default_rng(seed).integers(50, 256, (6, 6, 3), np.uint8)
    video = np.zeros((1, len(path), 20, 30, 3), np.uint8)
    for frame, (row, column) in zip(video[0], path, strict=True):
        frame[row : row + 6, column : column + 6] = patch
    return video


def test_frames_stand_below_each_other_in_a_video() -> None:
    video = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    images = video.reshape(2, 12, 5, 3)
    np.testing.assert_array_equal(apart(images, 3), video)
    np.testing.assert_array_equal(frames_of(images, 3)[4], video[1, 1])
    np.testing.assert_array_equal(images[1, 4:8], video[1, 1])
    assert of_each_frame(["a\nb", "c"]) == ["a", "b", "c"]


def test_an_animation_has_every_frame() -> None:
    levels = np.array([0, 120, 255], np.uint8).repeat(8)[None, :, None, None]
    videos = np.broadcast_to(levels, (2, 24, 16, 3))
    with Image.open(io.BytesIO(gif(videos, 3, 2))) as animation:
        assert animation.n_frames == 3
        seen = []
        for frame in range(3):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB"))
            seen.append(int(pixels[pixels.shape[0] // 2, pixels.shape[1] // 4].mean()))
    assert seen == pytest.approx([0, 120, 255], abs=4)


def test_motion_is_the_shift_that_explains_most() -> None:
    changed, down, right = motion(moving([(5, 5), (5, 7), (4, 7), (4, 7)]), reach=3)
    assert down.tolist() == [[0, -1, 0]]
    assert right.tolist() == [[2, 0, 0]]
    assert changed.max() == 0
    assert motion(moving([(5, 5), (5, 12)]), reach=3)[0][0, 0] > 0  # farther than it looks
    with pytest.raises(ValueError, match="frames of 20×30 pixels are too small to move by 10"):
        motion(moving([(5, 5), (5, 7)]), reach=10)


def test_a_still_video_is_steady_but_does_not_travel() -> None:
    steps = [(5, 2 + 2 * each) for each in range(5)]
    videos = np.concatenate([moving([(5, 5)] * 5), moving(steps), moving([(5, 5)] * 5)])
    videos[2, ::2] = moving(steps, seed=1)[0, ::2]  # another patch every second frame
    said = {
        name: load_reward(name, parse_options(name, {"pace": 2.0}), frames=5)(
            videos.reshape(3, 100, 30, 3), [""] * 3, None
        )
        for name in ("steadiness", "travel")
    }
    assert said["steadiness"][:2].tolist() == [1, 1]
    assert said["steadiness"][2] < 0.99
    assert said["travel"][:2].tolist() == [0, 1]


def test_other_rewards_are_asked_about_each_frame() -> None:
    """With the video's prompt and the frame's caption; the mean counts."""
    asked: list[Any] = []

    def brightness(images: np.ndarray, prompts: list[str], captions: list[str] | None) -> np.ndarray:
        asked.append((images.shape, prompts, captions))
        return images.mean(axis=(1, 2, 3))

    reward = parse_options("jpeg_compressibility", {})
    videos = np.zeros((2, 8, 4, 3), np.uint8)
    videos[0, :4], videos[0, 4:], videos[1, 4:] = 10, 30, 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reward), "load", lambda *_: brightness)
        found = load_reward("jpeg_compressibility", reward, frames=2)(videos, ["a", "b"], ["one\ntwo", "three\nfour"])
    assert found.tolist() == [20, 30]
    assert asked == [((4, 4, 4, 3), ["a", "a", "b", "b"], ["one", "two", "three", "four"])]


def test_captions_and_verdicts_are_of_frames() -> None:
    """A video is what its prompt asks for if all of its frames are; on a wider canvas, wherever the digit stands."""
    digits = load_split("test")
    of = [np.flatnonzero(digits.labels == DIGITS.index(name))[:3] for name in ("seven", "zero")]
    seven, zero = (tint(digits.strokes[rows], ["red"] * 3, ["black"] * 3) for rows in of)
    spoiled = np.concatenate([seven[:2], zero[:1]])
    videos = np.stack([seven, spoiled]).reshape(2, 48, 16, 3)
    captions = Captioner(CaptionerSettings(path=CAPTIONER), frames=3).caption(videos)
    assert [len(of_each_frame([each])) for each in captions] == [3, 3]
    assert "zero" in of_each_frame([captions[1]])[2]
    assert "zero" not in captions[0]
    wide = np.zeros((2, 48, 32, 3), np.uint8)
    wide[0, :, 3:19], wide[1, :, 14:30] = videos
    judge = EvaluatorActor(JUDGE, 3, "cpu", 1)
    for each in (videos, wide):
        met, seen = judge.judge(each, ["a red seven on a black background"] * 2)
        assert met["full"].tolist() == [True, False]
        assert met["ink"].tolist() == [True, True]
        assert seen == {}


@pytest.fixture(scope="module")
def video_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("videos")
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={build_tiny_video(directory / 'video')}",
        "captioner.path=null",
        "reward.function={jpeg_compressibility: 1, steadiness: 2, travel: 0.5}",
        "reward.options.steadiness.reach=2",
        "evaluation={evaluator: null, images: 4, interim_images: 4, patience: 0}",
        "sampling.steps=3",
        "training={steps: 1, images_per_step: 8, images_per_prompt: 4, updates_per_step: 1, learning_rate: 1e-3}",
        "actors={samplers: 1, images_per_call: 4}",
        f"tracking.uri=sqlite:///{directory / 'mlflow.db'}",
        "tracking.system_metrics=false",
    ]


def test_what_scores_videos_is_refused_where_images_are_drawn(video_run: list[str], tmp_path: Path) -> None:
    still = f"model.path={build_tiny_pipeline(tmp_path / 'still')}"
    with pytest.raises(
        ConfigError, match=r"reward\.function steadiness scores videos, and model\.path .* draws images"
    ):
        preflight_ddpo(load_config(DdpoConfig, None, [*video_run, still]))


def test_an_audit_of_videos_is_refused(video_run: list[str], tmp_path: Path) -> None:
    config = load_config(DdpoConfig, None, [*video_run, "reward={function: jpeg_compressibility}"])
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"evaluator": JUDGE})})
    with pytest.raises(ConfigError, match=r"draws videos, and an audit looks at images"):
        audit(config, [], 2, InvertingSettings(), None, tmp_path / "audit", print)


def test_a_guard_that_looks_at_images_is_refused_of_videos(tmp_path: Path) -> None:
    model = build_tiny_video(tmp_path / "video")
    (tmp_path / "guard.yaml").write_text(f"output: {{words: [three], captioner: {CAPTIONER}}}\n")
    with pytest.raises(ConfigError, match="output stage looks at images, and this model draws videos"):
        generate(model, [PROMPTS[0]], [1], tmp_path / "drawn", guard=str(tmp_path / "guard.yaml"))
    assert not (tmp_path / "drawn").exists()


def test_what_scores_videos_is_not_served(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["reward", "serve", "travel", "--port", "1"], monkeypatch) == 2
    assert "travel scores videos, and a server is sent images" in capsys.readouterr().err


def test_frames_are_decoded_as_many_at_once_as_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video counts for its frames; a frame for itself."""
    loaded = load_family(str(build_tiny_video(tmp_path)), torch.float32)
    monkeypatch.setattr("pipelines.denoisers.family._PIXELS", 5 * 16 * 16)
    sizes: list[int] = []
    decode = loaded.pipeline.vae.decode

    def counted(part: torch.Tensor, **given: Any) -> Any:
        sizes.append(len(part))
        return decode(part, **given)

    monkeypatch.setattr(loaded.pipeline.vae, "decode", counted)
    assert loaded.decode(torch.zeros(4, 4, 3 * 8, 8)).shape == (4, 3, 3 * 16, 16)
    assert sizes == [5, 5, 2]
    assert loaded.decoded_at_once(4) == 1


def test_a_network_without_places_for_frames_is_refused(video_run: list[str], tmp_path: Path) -> None:
    directory = build_tiny_video(tmp_path / "video")
    path = directory / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"motion_max_seq_length": 1}))
    with pytest.raises(ConfigError, match="motion_max_seq_length 1 leaves no frames to draw"):
        preflight_ddpo(load_config(DdpoConfig, None, [*video_run, f"model.path={directory}"]))


def test_a_run_draws_videos_and_shows_them_move(video_run: list[str], ray_session: None, tmp_path: Path) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo

    config = load_config(DdpoConfig, None, [*video_run, f"output_dir={tmp_path / 'run'}"])
    plan = preflight_ddpo(config.model_copy(update={"output_dir": None}))
    assert plan.frames == 3
    assert "videos of 3 frames" in describe_ddpo(config, plan)
    run_ddpo(config)
    directory = tmp_path / "run"
    before = json.loads((directory / "evaluations" / "step-000000.json").read_text())
    images = np.load(directory / "evaluations" / "step-000000.npz")["images"]
    assert images.shape == (4, 3 * 16, 16, 3)
    functions = {name: load_reward(name, options, frames=3) for name, options in config.reward.functions.items()}
    scores = {name: each(images, before["prompts"], None).mean() for name, each in functions.items()}
    for name, value in scores.items():
        assert before[f"rewards/{name}"] == pytest.approx(value)
    weighted = scores["jpeg_compressibility"] + 2 * scores["steadiness"] + 0.5 * scores["travel"]
    assert before["evaluation/reward"] == pytest.approx(weighted)
    with Image.open(directory / "figures" / "videos.gif") as animation:
        assert animation.n_frames == 3
    assert "data:image/gif;base64," in (directory / "report.html").read_text()

    (path,) = generate(directory, [PROMPTS[0]], [5], tmp_path / "drawn")
    assert path.name == "a-red-seven-on-a-black-background-5.gif"
    with Image.open(path) as animation:
        assert animation.n_frames == 3
