"""One truth for the schedule: what a plan counts is what is drawn and learned from, and what a stock pipeline draws;
what means something else is refused by its name."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from pipelines.denoisers import denoising_steps, inspect, load_family
from pipelines.denoisers.ddim import DdimFamily, denoising_schedule
from pipelines.denoisers.schedulers import read_scheduler
from pipelines.denoisers.stable_diffusion_3 import StableDiffusion3
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from pipelines.storage.model_files import ModelFilesError
from policies.rl.health import DegenerateBatch
from policies.rl.settings import SamplingSettings
from tests.models import PROMPTS, build_tiny_pipeline, build_tiny_pixels, build_tiny_sd3, build_tiny_xl

FLOW = "StableDiffusion3Pipeline"
REFUSED = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"}
DISTILLED = {"LCMScheduler", "TCDScheduler"}
REFUSED |= {"SASolverScheduler", "DPMSolverSDEScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMInverseScheduler"}
CLASSES = sorted({each.name for each in KarrasDiffusionSchedulers} | REFUSED | DISTILLED | {"DDIMParallelScheduler"})
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1000, 77])
def test_a_plan_counts_what_is_drawn_for_every_number_of_steps(spacing: str, total: int) -> None:
    kinds = ("epsilon", 1), ("v_prediction", 0), ("sample", 0)
    for alpha_to_one, (kind, offset) in product([True, False], kinds):
        fields = {"timestep_spacing": spacing, "set_alpha_to_one": alpha_to_one, "prediction_type": kind}
        stock = diffusers.DDIMScheduler(**BETAS, **fields, num_train_timesteps=total, steps_offset=offset)
        planned = read_scheduler(dict(stock.config) | {"_class_name": "DDIMScheduler"}, "DDIMPipeline")
        for steps in range(1, 201):
            if steps > total or (offset and spacing == "leading" and total // steps * (steps - 1) + 1 >= total):
                with pytest.raises(ValueError, match=r"sampling\.steps"):
                    planned.steps(SamplingSettings(steps=steps))
                continue
            drawn = denoising_schedule(stock, SamplingSettings(steps=steps))
            stock.set_timesteps(steps)  # by their rounding one too many for some
            plan = planned.steps(SamplingSettings(steps=steps))
            assert drawn.timesteps.tolist() == stock.timesteps.tolist()[:steps] == plan.timesteps
            assert len(drawn.timesteps) == len(drawn.sigma) == steps
            assert drawn.stochastic_steps.tolist() == plan.stochastic
            if steps not in (1, 13, 61):
                continue
            # The levels of the scheduler's own step: σ of the closed form at its timesteps.
            variances = [stock._get_variance(int(t), int(t) - total // steps).item() for t in drawn.timesteps]
            np.testing.assert_allclose(drawn.sigma.numpy() ** 2, np.maximum(variances, 0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [61, 103, 121, 122, 201])
def test_rounding_adds_no_step(steps: int) -> None:
    stock = diffusers.DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(steps)
    assert (len(stock.timesteps), stock.timesteps[-1]) == (steps + 1, -1)
    schedule = denoising_schedule(stock, SamplingSettings(steps=steps))
    assert len(schedule.timesteps) == len(stock.timesteps) == steps
    assert schedule.timesteps.min() >= 0


@pytest.mark.parametrize(("shift", "terminal"), [(1.0, None), (3.0, None), (3.0, 0.02)])
def test_a_flow_has_as_many_steps_as_asked_for(shift: float, terminal: float | None, tmp_path: Path) -> None:
    class Flow(StableDiffusion3):
        def __init__(self) -> None:
            content = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "shift_terminal": terminal}
            config = read_scheduler(content, FLOW)
            self.files: Any = type("Files", (), {"scheduler": config})
            self.pipeline = type("Pipeline", (), {"scheduler": self.scheduler(config)})

    flow, stock = Flow(), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    for steps in range(2 if terminal else 1, 201):
        schedule = flow.schedule(SamplingSettings(steps=steps, eta=0.7))
        stock.set_timesteps(steps)
        torch.testing.assert_close(schedule.times, stock.sigmas.double(), rtol=0, atol=0)
        assert schedule.stochastic_steps.tolist() == list(range(steps - 1))
        assert len(schedule.timesteps) == steps
        assert (schedule.times.diff() < 0).all()


def with_scheduler(directory: Path, content: dict[str, Any]) -> Path:
    """``directory`` with another scheduler, as ``save_pretrained`` would have written it."""
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    index = json.loads((directory / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", content["_class_name"]]
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_class_draws_the_stock_images_or_is_refused(name: str, xl: Path) -> None:
    """The stock pipeline with the DDIM that diffusers makes of the scheduler's configuration, or, of what distilled
    models come with, with the scheduler itself."""
    kind = getattr(diffusers, name)
    given = {"beta_start": 0.001, "beta_end": 0.013, "beta_schedule": "scaled_linear"}
    try:
        own = kind(**{k: v for k, v in given.items() if k in kind.__init__.__code__.co_varnames})
        content = {**json.loads(own.to_json_string()), "_class_name": name}
    except ImportError:  # of a package that is not there
        content = {**given, "_class_name": name}
    path = with_scheduler(xl, content)
    if name in REFUSED:
        with pytest.raises(ModelFilesError, match=f"scheduler_config.json: scheduler: a {name} means"):
            inspect(path)
        return
    sampling = SamplingSettings(steps=4, guidance_scale=3.0)
    policy = DiffusionPolicy(ModelSettings(path=str(path)), sampling)
    ours, trajectory = policy.rollout([*PROMPTS[:2]], [1, 2])
    drawn = np.isfinite(trajectory.log_probs[0])
    assert np.flatnonzero(drawn).tolist() == denoising_steps(str(path), sampling).stochastic
    stock = policy.family.pipeline
    clips = {} if "DDIM" in name or "DDPM" in name else {"clip_sample": False}  # as these classes do not
    stock.scheduler = own if name in DISTILLED else diffusers.DDIMScheduler.from_config(content, **clips)
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "np", "generator": noise}
    difference = np.abs(np.round(stock([*PROMPTS[:2]], **options).images * 255) - ours.astype(float))
    assert difference.max() <= 1
    assert ours.std() > 5


MEANS_ELSE = {
    "thresholding": ({"thresholding": True}, "thresholding"),
    "zero terminal SNR of an ε": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    "Karras": ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
    "flow in DPM": ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    "a flow's output": ({"prediction_type": "flow_prediction"}, "prediction_type"),
    "continuous times": ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
    "learned variance": ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type"),
    "β of another kind": ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule"),
    "unsaid β": ({"_class_name": "HeunDiscreteScheduler"}, "beta_start"),
    "a field of tomorrow": ({"use_new_sigmas": True}, "use_new_sigmas"),
    "a class of nobody": ({"_class_name": "MyScheduler"}, "MyScheduler"),
    "no class": ({"_class_name": None}, "None"),
    "β that are none": ({"beta_end": 1.5}, "beta_end"),
    "β that leave no image": ({"beta_schedule": "linear", "beta_end": 0.99}, "betas"),
    "too few β": ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    "β that fall": ({"trained_betas": [0.1] * 999 + [-0.1]}, "betas"),
    "a negative offset": ({"steps_offset": -3}, "steps_offset"),
    "more steps than timesteps": ({"num_train_timesteps": 3}, "more than the model's 3 timesteps"),
    "words for a number": ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
}


def drawn_by(config: Any) -> Any:
    return denoising_schedule(DdimFamily.scheduler(config), SamplingSettings(steps=4))


@pytest.mark.parametrize("case", MEANS_ELSE)
def test_fields_that_mean_something_else_are_refused(case: str) -> None:
    content, expected = MEANS_ELSE[case]
    with pytest.raises(ValueError, match=expected):
        drawn_by(read_scheduler({"_class_name": "DDIMScheduler", **content}, "StableDiffusionXLPipeline"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "has to be above base_image_seq_len"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift": 0}, "shift"),
        ({"shift_terminal": 1.0}, "shift_terminal"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    ],
)
def test_flows_that_mean_something_else_are_refused(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", **content}, FLOW)


@pytest.mark.parametrize("path", ["sd3", "sd", "pixels"])
def test_a_plan_reads_the_same_scheduler_as_the_stock_pipeline(path: str, tmp_path: Path) -> None:
    builder = {"sd3": build_tiny_sd3, "sd": build_tiny_pipeline, "pixels": build_tiny_pixels}[path]
    directory = builder(tmp_path)
    if path == "sd":  # which StableDiffusionPipeline corrects
        file = directory / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0, "clip_sample": True}))
    family = load_family(str(directory), torch.float32)
    schedule = family.schedule(SamplingSettings(steps=7))
    stock = diffusers.DiffusionPipeline.from_pretrained(directory, **dict.fromkeys(family.files.absent))
    stock.scheduler.set_timesteps(7)
    assert schedule.timesteps.tolist() == stock.scheduler.timesteps.tolist()
    assert schedule.stochastic_steps.tolist() == denoising_steps(str(directory), SamplingSettings(steps=7)).stochastic
    if path != "sd3":
        assert family.pipeline.scheduler.config.clip_sample == stock.scheduler.config.clip_sample
    if path == "pixels":  # which clips, and so does the policy's mean
        assert schedule.clip == 1  # type: ignore[attr-defined]


def test_numbers_that_are_not_finite_are_no_image(tmp_path: Path) -> None:
    model = ModelSettings(path=str(build_tiny_pipeline(tmp_path)))
    policy = DiffusionPolicy(model, SamplingSettings(steps=3))
    with torch.no_grad():
        policy.network.conv_out.bias[0] = torch.nan
    with pytest.raises(
        DegenerateBatch, match=r"'a red seven.*', seed 5, is NaN or infinite after 1 of 3 denoising steps"
    ):
        policy.rollout([PROMPTS[0]], [5])
    with torch.no_grad():
        policy.network.conv_out.bias[0] = 0
        policy.family.pipeline.vae.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(DegenerateBatch, match="autoencoder makes 1 of 1 images NaN or infinite"):
        policy.rollout([PROMPTS[0]], [5])


@pytest.mark.parametrize(
    ("field", "value"), [("time_cond_proj_dim", 16), ("class_embed_type", "timestep"), ("sample_size", None)]
)
def test_a_network_that_wants_more_than_its_prompt_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    file = build_tiny_pipeline(tmp_path) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelFilesError, match=f"unet/config.json: .*{field}"):
        inspect(tmp_path)


def test_scales_that_the_stock_pipeline_does_not_read_change_nothing(tmp_path: Path) -> None:
    """Another family's autoencoder may bring a shift, or means, that Stable Diffusion's own pipeline passes by."""
    file = build_tiny_pipeline(tmp_path) / "vae/config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    more = {"shift_factor": 0.5, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
    file.write_text(json.dumps(told | more), encoding="utf-8")
    vae, latents = (family := load_family(str(tmp_path), torch.float32)).pipeline.vae, torch.randn(1, 4, 8, 8)
    expected = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(family.decode(latents), expected, rtol=0, atol=0)
