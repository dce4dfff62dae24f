"""Factorised diffusion distillation: its maths, adapters that add nothing until trained, and the study in short."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch.autograd.functional import jacobian

from orchestration.experiments.edit_videos import EditVideos
from pipelines.animation import control_network, controlled, denoise, motion_network, predict, text_states
from pipelines.data.digits import parse
from pipelines.data.motion import moving, paths
from pipelines.settings import MotionSettings
from pipelines.storage.atomic import Files, unpacked
from pipelines.storage.tasks import Task
from pipelines.studies import perform, products
from pipelines.studies.edit_videos import Edits, load_editor
from pipelines.video_editor import (
    Critic,
    Editor,
    draw_edits,
    edit,
    schedule_of,
    student_of,
)
from policies.factorised import critic_loss, maker_loss, score_distillation, visits

PATH = "models/digits-attention/pipeline"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return StableDiffusionPipeline.from_pretrained(PATH, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def data() -> Edits:
    return Edits(moving(paths(6, 3, 1), "test", 1), 2)


@pytest.fixture(scope="module")
def editor(pipeline: Any) -> Editor:
    return Editor(pipeline, control_network(pipeline.unet, 0), motion_network(pipeline.unet, MotionSettings(), 0))


def test_each_call_has_its_bin_of_time() -> None:
    assert visits(1000, 3, 2).tolist() == [[999, 999], [666, 666], [332, 332]]
    assert visits(1000, 1, 1).tolist() == [[999]]
    drawn = visits(1000, 3, 4000, torch.Generator().manual_seed(0))
    for times, (low, high) in zip(drawn, ((667, 999), (333, 666), (0, 332)), strict=True):
        assert (times.min(), times.max()) == (low, high)
        assert abs(times.double().mean() - (low + high) / 2) < 5


def test_the_times_are_those_that_the_stock_scheduler_visits(pipeline: Any) -> None:
    for calls in (1, 3, 10):
        pipeline.scheduler.set_timesteps(calls)
        assert visits(1000, calls, 1)[:, 0].tolist() == pipeline.scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_gradient_of_score_distillation_is_the_difference_of_noises(kind: str) -> None:
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=kind)
    schedule, random = schedule_of(scheduler), torch.Generator().manual_seed(0)
    clean, noise, output = torch.randn(3, 2, 4, 4, 4, generator=random).double()
    times = torch.tensor([30, 600])
    clean.requires_grad_()
    noisy = scheduler.add_noise(clean.detach(), noise, times)
    score_distillation(schedule, clean, noisy, noise, output, times).backward()
    alpha = scheduler.alphas_cumprod[times].double().view(-1, 1, 1, 1)
    found = output if kind == "epsilon" else alpha.sqrt() * output + (1 - alpha).sqrt() * noisy
    assert clean.grad is not None
    assert torch.allclose(clean.grad, (1 - alpha) * (found - noise) / clean.numel(), atol=1e-6)


def test_a_teacher_that_finds_the_noise_teaches_nothing() -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    schedule, times = schedule_of(scheduler), torch.tensor([5, 900])
    clean, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    noisy, velocity = scheduler.add_noise(clean, noise, times), scheduler.get_velocity(clean, noise, times)
    slope = jacobian(lambda x: score_distillation(schedule, x, noisy, noise, velocity, times), clean)
    assert slope.abs().max() < 1e-5


def test_critics_and_makers_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert critic_loss(real, made) == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)
    assert maker_loss(made) == 1.5
    slope = jacobian(maker_loss, made)
    assert (slope == -0.5).all()  # below -1, too


def test_the_edited_are_the_same_pixels_in_another_ink(data: Edits) -> None:
    for row, (was, told) in enumerate(zip(data.videos.captions, data.captions, strict=True)):
        before, after = parse(was), parse(told)
        assert before["ink"] != after["ink"]
        assert (before["digit"], before["ground"]) == (after["digit"], after["ground"])
        assert data.inputs[row, 1].permute(1, 2, 0).mul(255).round().byte().numpy().tolist() == (
            data.videos.videos[row, 1].tolist()
        )
    again = Edits(data.videos._replace(videos=data.edited, captions=data.captions), 5)
    known = [text == one for text, one in zip(again.captions, data.videos.captions, strict=True)]
    assert any(known)  # in the ink that it was in at first, it is what it was at first
    change = np.abs(again.edited[known].astype(int) - data.videos.videos[known])
    assert change.max() <= 2


def test_adapters_add_nothing_until_they_are_trained(pipeline: Any, editor: Editor, data: Edits) -> None:
    states, times = text_states(pipeline, data.captions), torch.tensor([10, 500, 999, 1, 2, 3])
    noisy = torch.randn(6, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    student = student_of(editor.motion, 2, 0)
    assert {name.split(".")[-3] for name, each in student.named_parameters() if each.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert not any(each.requires_grad for name, each in student.named_parameters() if "motion_modules" in name)
    with torch.no_grad():
        alone = predict(pipeline.unet, noisy, times, states)
        for network in (pipeline.unet, editor.motion, student):
            assert torch.allclose(
                controlled(network, editor.control, noisy, times, states, data.inputs), alone, atol=1e-5
            )
        known = editor.video_said(noisy, times, states, data.inputs * 0)
        assert torch.equal(editor.video_said(noisy, times, states, data.inputs), known)  # it sees no inputs


def test_editing_is_ddim_and_gradients_flow_through_the_last_call(pipeline: Any, editor: Editor, data: Edits) -> None:
    states, inputs = text_states(pipeline, data.captions[:2]), data.inputs[:2]
    noise = torch.randn(2, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    drawn = draw_edits(pipeline, partial(controlled, editor.motion, editor.control), states, inputs, 5, 7)

    def predicted(latents: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        return predict(pipeline.unet, latents, when.expand(2), states)

    first = torch.randn(2, 3, 4, 8, 16, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(drawn, denoise(pipeline.scheduler, first, 5, predicted), atol=1e-4)
    calls, scale = list[bool](), torch.ones((), requires_grad=True)

    def said(noisy: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return noisy * scale

    clean = edit(said, editor.schedule, noise, visits(1000, 3, 2), states, inputs)
    clean.sum().backward()
    assert calls == [False, False, True]
    assert scale.grad is not None
    assert scale.grad != 0


def test_a_critic_sees_frames_apart_and_videos_in_time(editor: Editor, pipeline: Any, data: Edits) -> None:
    states = text_states(pipeline, data.captions)
    clean = torch.randn(6, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    critic = Critic(editor.motion, editor.video_said, 0)
    with torch.no_grad():
        features = critic.features(clean, states, data.inputs)
        assert [tuple(each.shape) for each in features] == [(6, 64, 3, 4, 8), (6, 48, 3, 8, 16)]
        assert critic(features).shape == (6, 3 * 4 * 8 + 3 * 8 * 16)
        swapped = critic([each.flip(2) for each in features])
    assert not torch.allclose(critic(features).mean(), swapped.mean(), atol=1e-6)
    assert not critic.blocks[0]._forward_hooks


SHORT: dict[str, Any] = {
    "frames": 2,
    "pairs": 8,
    "videos": 8,
    "real": 2,
    "drawn": 2,
    "teacher_steps": 2,
    "editing": {"steps": 2, "batch_size": 2},
    "filming": {"steps": 2, "batch_size": 2},
    "aligning": {"steps": 3, "rank": 2, "critic_from": 0.6},
}


def done(task: Task, held: dict[str, Files]) -> Files:
    if task.key not in held:
        held[task.key] = perform(task.kind, task.parameters, [done(each, held) for each in task.inputs], "cpu")
    return held[task.key]


def test_the_study_in_short(tmp_path: Path) -> None:
    study, held = EditVideos(**SHORT), dict[str, Files]()
    study.preflight()
    *_, aligned, judged = study.tasks("student", 0)
    found = done(judged, held)
    assert found == perform(judged.kind, judged.parameters, [held[each.key] for each in judged.inputs], "cpu")
    names, numbers = ("edit", "flicker", "change", "motion", "position", "error"), json.loads(found["metrics.json"])
    assert numbers.keys() == {*names, *(f"few/{name}" for name in names)}
    assert all(numbers[f"few/{name}"] == numbers[name] for name in names)
    assert {"figures/student.png", "figures/student.gif"} <= found.keys()
    course = json.loads(held[aligned.key]["metrics.json"])
    assert {name: len(each) for name, each in course.items()} == {
        f"{kind}/{name}": steps
        for kind in ("frames", "videos")
        for name, steps in (("distilled", 3), ("critic", 1), ("hinge", 1))
    }
    still = json.loads(done(study.tasks("static", 0)[-1], held)["metrics.json"])
    assert still["change"] == 0
    stacked = json.loads(done(study.tasks("unaligned", 0)[-1], held)["metrics.json"])
    assert stacked != numbers
    assert stacked["few/flicker"] != stacked["flicker"]
    videos = unpacked(products(held[aligned.inputs[1].key])["videos"], AnimateDiffPipeline.from_pretrained)
    assert videos.unet.config.motion_max_seq_length == 2
    assert tuple(videos.unet.config.sample_size) == (8, 16)
    product = products(held[aligned.key])["editor"]
    stock = load_editor(product)
    stock.set_progress_bar_config(disable=True)
    data = Edits(moving(paths(1, 2, 0), "test", 0), 0)
    states = text_states(stock, data.captions)
    own = draw_edits(stock, partial(controlled, stock.unet, stock.controlnet), states, data.inputs, 3, 4)
    noise = torch.randn(1, 2, 4, 8, 16, generator=torch.Generator().manual_seed(4)).transpose(1, 2)
    how = {"num_frames": 2, "num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 32}
    shown = [Image.fromarray(frame) for frame in data.videos.videos[0]]
    theirs = stock(data.captions[0], latents=noise, conditioning_frames=shown, output_type="latent", **how).frames
    assert torch.allclose(theirs.transpose(1, 2), own, atol=2e-2)  # DDIM takes 333 for 332, where 3 divides no 1,000
    lora = {name.removeprefix("lora/"): each for name, each in product.items() if name.startswith("lora/")}
    unpacked(lora, videos.load_lora_weights)
    videos.fuse_lora()
    weights = dict(stock.unet.named_parameters())
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.allclose(videos.unet.get_submodule(name).get_base_layer().weight, weights[f"{name}.weight"], atol=1e-6)


def test_arms_share_what_they_can() -> None:
    study = EditVideos()
    judged = {arm: study.tasks(arm, 0)[-1] for arm in study.arms}
    assert len({each.key for each in judged.values()}) == len(study.arms)
    edits, videos, aligned, _ = study.tasks("student", 0)
    for arm in ("student", "no_sds", "no_critics"):
        assert [one.key for one in judged[arm].inputs[0].inputs] == [one.key for one in aligned.inputs]
    assert {arm: [one.key for one in judged[arm].inputs] for arm in ("unaligned", "per_frame", "static")} == {
        "unaligned": [edits.key, videos.key],
        "per_frame": [edits.key],
        "static": [edits.key],
    }
    assert {one.key for one in study.tasks("student", 1)[2].inputs} == {one.key for one in aligned.inputs}
    assert {each.arm for each in study.claimed()} == {*study.arms}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "models/digits/evaluator"}, "model_index"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
        ({"heads": 5}, "heads: 5 do not divide the 48 channels"),
        ({"aligning": {"critic_from": 1.0}}, "no step is left with critics"),
        ({"aligning": {"sds_weight": 0.0}}, "leaves no score distillation"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        EditVideos(**changes).preflight()
    assert "\n" not in str(caught.value)
