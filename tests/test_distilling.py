"""Distilling: the teacher's step and the grid are diffusers' own, stock products, equal repeats, the study."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestration.experiments.distil import LEARNED, Distil
from pipelines.data.real_data import DataSettings
from pipelines.storage.model_files import ModelFilesError
from pipelines.studies.distil import Distiller, distil, draw, draw_latents, learn_features, measure, sampler
from policies.consistency import ConsistencySettings, consistency, grid, pseudo_huber
from policies.diffusion.ddim import PredictionType
from tests.models import PROMPTS, build_tiny_sd3

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SMALL = ConsistencySettings(updates=2, batch=3)
DATA = DataSettings(source="captioned_digits", reference=12, limit=40).model_dump()
COMMON = {"data": DATA, "seed": 3, "guidance_scale": 2.0}


def schedulers(kind: PredictionType) -> tuple[Any, Any]:
    """DDIM of 50 steps that ends at ᾱ_0, and LCM."""
    from diffusers import DDIMScheduler, LCMScheduler

    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": kind, "clip_sample": False}
    if kind == "epsilon":  # at whose last timestep an image is left
        betas |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddim = DDIMScheduler(**betas, timestep_spacing="trailing", set_alpha_to_one=False)
    ddim.set_timesteps(50)
    return ddim, LCMScheduler(**betas, original_inference_steps=50)


@pytest.mark.parametrize("kind", KINDS)
def test_teachers_step_is_ddims_on_guided_output(kind: PredictionType) -> None:
    """At every step of the grid; and guiding the output guides x̂_0, for all that a network predicts."""
    ddim, lcm = schedulers(kind)
    here = grid(lcm.alphas_cumprod, kind).here
    assert here.timesteps.tolist() == ddim.timesteps.tolist()
    x, free, asked = torch.randn(3, 50, 2, 2, 2)
    guided, every = free + 2.5 * (asked - free), torch.arange(50)
    stepped = here.mean(x, guided, every)
    stock = [
        ddim.step(guided[step], time, x[step], eta=0.0).prev_sample for step, time in enumerate(ddim.timesteps.tolist())
    ]
    assert torch.allclose(stepped.float(), torch.stack(stock), rtol=1e-3, atol=1e-3)
    assert stepped.isfinite().all()
    parts = [here.denoised(x, each, every) for each in (free, asked, guided)]
    assert torch.allclose(parts[0] + 2.5 * (parts[1] - parts[0]), parts[2], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_function_is_lcms_and_keeps_x_0(kind: PredictionType) -> None:
    _, lcm = schedulers(kind)
    steps = grid(lcm.alphas_cumprod, kind)
    x, output = torch.randn(2, 50, 2, 2, 2)
    found = consistency(steps.here, x, output, torch.arange(50))
    for step in (0, 24, 49):
        lcm.set_timesteps(50)
        lcm._step_index = step
        stock = lcm.step(output[step], steps.here.timesteps[step], x[step]).denoised
        assert torch.allclose(found[step].float(), stock, rtol=1e-3, atol=1e-3)
    assert steps.next.timesteps[-1] == 0
    last = torch.full((50,), 49)
    assert torch.equal(consistency(steps.next, x, output, last), x.double())  # the boundary condition


@pytest.mark.parametrize(("calls", "times"), [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])])
def test_grid_holds_what_lcm_draws_at(calls: int, times: list[int]) -> None:
    for kind in KINDS:
        _, lcm = schedulers(kind)
        lcm.set_timesteps(calls)
        here, after = grid(lcm.alphas_cumprod, kind, skip=7)
        assert lcm.timesteps.tolist() == times
        assert {*times} <= {*here.timesteps.tolist()}
        assert after.timesteps.tolist() == [max(time - 140, 0) for time in here.timesteps.tolist()]
        assert torch.equal(here.alpha_previous, after.alpha)
    with pytest.raises(ValueError, match="49 timesteps are fewer than the 50"):
        grid(torch.linspace(0.9, 0.1, 49), "epsilon")


def test_loss_is_the_norm_far_away_and_its_square_nearby() -> None:
    target, constant = torch.zeros(1, 3, 2, 2), 0.00054 * 12**0.5
    far, near = torch.full((1, 3, 2, 2), 5.0), torch.full((1, 3, 2, 2), 1e-6)
    assert pseudo_huber(far, target).item() == pytest.approx(5 * 12**0.5, rel=1e-3)
    assert pseudo_huber(near.double(), target).item() == pytest.approx(12e-12 / (2 * constant), rel=1e-3)


@pytest.mark.parametrize("guidance_scale", [2.0, None])
@pytest.mark.parametrize(("model", "skip"), [("tiny_pipeline", 10), ("tiny_v_pipeline", 50)])
def test_training_brings_answers_together(
    model: str, skip: int, guidance_scale: float | None, request: pytest.FixtureRequest
) -> None:
    distiller = Distiller(str(request.getfixturevalue(model)))
    clean = torch.randn(6, *distiller.family.latent_shape)
    settings = ConsistencySettings(updates=20, batch=16, learning_rate=1e-3, skip=skip)
    before, after = distiller.distil(clean, PROMPTS[:2] * 3, settings, 0, guidance_scale)
    assert after < 0.95 * before
    assert all(each.grad is None and not each.requires_grad for each in distiller.teacher.parameters())


@pytest.mark.parametrize("model", ["tiny_pipeline", "tiny_v_pipeline"])
def test_product_is_stock_and_a_repeat_gives_the_same_bytes(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    path = str(request.getfixturevalue(model))
    job = {**COMMON, "path": path, "latents": 5, "steps": 2, "settings": SMALL.model_dump()}
    drawn = draw_latents(job, [], "cpu")
    assert drawn == draw_latents(job, [], "cpu")
    files = distil(job, [drawn], "cpu")
    assert files == distil(job, [drawn], "cpu")
    assert files != distil({**job, "seed": 4}, [drawn], "cpu")
    assert files != distil({**job, "guidance_scale": None}, [drawn], "cpu")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    product = tmp_path / "product" / "distilled"
    assert json.loads((product / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    written = json.loads((product / "scheduler/scheduler_config.json").read_text())
    source = json.loads((Path(path) / "scheduler/scheduler_config.json").read_text())
    assert written["_class_name"] == "LCMScheduler"
    assert written["original_inference_steps"] == 50
    kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "set_alpha_to_one", "clip_sample")
    assert {name: written[name] for name in kept} == {name: source[name] for name in kept}
    stock, base = (StableDiffusionPipeline.from_pretrained(each) for each in (product, path))
    assert isinstance(stock.scheduler, LCMScheduler)
    changed = dict(base.unet.named_parameters())
    assert any(not torch.equal(each, changed[name]) for name, each in stock.unet.named_parameters())
    images = draw(stock, PROMPTS[:2], 0, num_inference_steps=2, guidance_scale=1.0)
    assert images.shape == (2, 16, 16, 3)
    assert np.array_equal(images, draw(stock, PROMPTS[:2], 0, num_inference_steps=2, guidance_scale=1.0))

    eye = learn_features({**COMMON, "path": None}, [], "cpu")
    judged = {**COMMON, "path": path, "guidance_scale": 1.0, "sampler": "lcm", "calls": [1, 2], "steps": None}
    found = measure({**judged, "evaluator": "models/digits/evaluator"}, [eye, files], "cpu")
    numbers = json.loads(found["metrics.json"])
    assert numbers.keys() >= {"fid/of_1", "recall/of_2", "evaluator/full/of_1", "evaluator/ink/of_2"}
    assert numbers["second_call/fid"] == pytest.approx(numbers["fid/of_2"] / numbers["fid/of_1"])
    teacher = {**judged, "sampler": "ddim", "steps": 3, "guidance_scale": 2.0, "evaluator": None}
    numbers = json.loads(measure(teacher, [eye], "cpu")["metrics.json"])
    assert numbers["fid/of_1"] == numbers["fid/of_2"]
    assert "evaluator/full/of_1" not in numbers


def test_ddim_begins_at_pure_noise(tiny_pipeline: Path) -> None:
    pipeline = Distiller(str(tiny_pipeline)).pipeline
    scheduler = sampler(pipeline, "ddim").scheduler
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]


def test_study_plans_arms_with_their_controls() -> None:
    study = Distil(evaluator=None)
    latents = {arm: study.tasks(arm, 0)[0].inputs[0].key for arm in LEARNED}
    assert latents["distilled"] == latents["trained"]
    job, judged = study.tasks("distilled", 0)
    assert job.parameters["guidance_scale"] == 2.0
    assert study.tasks("trained", 0)[0].parameters["guidance_scale"] is None
    assert judged.inputs[1] == job
    assert judged.parameters["guidance_scale"] == 1.0  # it is in the weights
    plain = {arm: study.tasks(arm, 0)[-1].parameters for arm in ("undistilled", "ddim", "teacher")}
    assert {arm: (each["sampler"], each["guidance_scale"], each["steps"]) for arm, each in plain.items()} == {
        "undistilled": ("lcm", 1.0, None),
        "ddim": ("ddim", 2.0, None),
        "teacher": ("ddim", 2.0, 20),
    }
    eyes = {study.tasks(arm, seed)[-1].inputs[0].key for arm in study.arms for seed in (0, 1)}
    assert len(eyes) == 1
    whole = Distil()
    claims = whole.claimed()
    assert {each.arm for each in claims} == {"distilled", "trained", "undistilled", "ddim"}
    assert len(claims) > len(study.claimed())
    assert {each.metric for each in Distil(calls=(4,)).claimed()} == set()
    assert {each.arm for each in Distil(arms=("teacher", "ddim")).claimed()} == {"ddim"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "models/digits/captioner"}, "model_index.json"),
        ({"calls": (0,)}, "give each number once, from 1 to 50, not 0"),
        ({"calls": (2, 2)}, "give each number once"),
        ({"data": {"source": "digits"}}, "has no captions"),
        ({"data": {"source": "captioned_digits", "reference": 4000}}, "leave none to learn from"),
        ({"data": {"source": "captioned_digits", "extractor": "nowhere"}}, "data.extractor: 'nowhere'"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Distil(**changes).preflight()
    assert "\n" not in str(caught.value)


def test_other_sizes_and_families_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    from tests.models import build_tiny_pipeline

    Distil(path=str(tiny_pipeline)).preflight()
    with pytest.raises(ValueError, match="images are 16×16×3, and the pipeline draws 32×32×3"):
        Distil(path=str(build_tiny_pipeline(tmp_path / "large", image_size=32))).preflight()
    with pytest.raises(ModelFilesError, match="StableDiffusion3Pipeline"):
        Distiller(str(build_tiny_sd3(tmp_path / "sd3")))
