"""Samplers of few steps, and of noise in some: their steps in closed form, beside diffusers, replayed and learned."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import norm

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from pipelines.denoisers import denoising_steps, inspect
from pipelines.denoisers.ddim import denoising_schedule
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.diffusion.flow import FlowSchedule, PreservingSchedule
from policies.diffusion.schedule import Schedule
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS, build_tiny_pipeline, build_tiny_sd3, build_tiny_xl

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WAYS: dict[str, dict[str, Any]] = {
    "consistency": {"method": "consistency", "steps": 4},
    "tcd": {"method": "tcd", "steps": 4, "eta": 0.3},
    "noise at first": {"steps": 6, "eta": (0.8, 0.0, 0.5)},
    "noise in the middle": {"steps": 6, "eta": (1.0, 0.34, 0.67)},
    "tcd, noise at first": {"method": "tcd", "steps": 6, "eta": (0.4, 0.0, 0.4)},
    "coarser behind the noise": {"steps": (9, 3), "eta": (1.0, 0.0, 0.34)},
    "sliding": {"steps": (6, 2), "eta": {"sliding": (1.0, 0.34, 1)}},
    "random": {"steps": 6, "eta": {"random": (0.8, 0.5, 1)}},
    "cached": {"steps": 5, "cache": (2, 0)},
    "cached above the first two": {"steps": 6, "cache": (3, 1)},
}
OF_FLOWS: dict[str, dict[str, Any]] = {
    "cps": {"method": "cps", "steps": 4, "eta": 0.7},
    "cps, noise at first": {"method": "cps", "steps": 6, "eta": (0.5, 0.0, 0.5)},
    "cps, coarser behind the noise": {"method": "cps", "steps": (9, 3), "eta": (0.5, 0.0, 0.34)},
    "sde, sliding": {"method": "sde", "steps": (6, 2), "eta": {"sliding": (0.7, 0.34, 1)}},
    "sde, noise at first": {"method": "sde", "steps": 6, "eta": (0.7, 0.0, 0.5)},
}
TRAINING = TrainingSettings(
    images_per_step=6, images_per_prompt=2, updates_per_step=2, learning_rate=1e-3, ratio_tolerance=1e-5
)
BATCH = [prompt for prompt in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize(("method", "gamma"), [("consistency", 1.0), ("tcd", 0.3), ("tcd", 1.0)])
def test_a_step_is_that_of_diffusers(kind: str, steps: int, method: Any, gamma: float) -> None:
    """Its mean and deviation, found by steps with two noises that differ by one."""
    name = "LCMScheduler" if method == "consistency" else "TCDScheduler"
    stock = getattr(diffusers, name)(**BETAS, prediction_type=kind)
    schedule = denoising_schedule(stock, SamplingSettings(method=method, steps=steps, eta=gamma))
    stock.set_timesteps(steps)
    assert schedule.timesteps.tolist() == stock.timesteps.tolist()
    assert schedule.stochastic_steps.tolist() == list(range(steps - 1))
    x_t, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, time in enumerate(stock.timesteps):
        random = torch.Generator().manual_seed(5)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5)).double()
        eta = {} if method == "consistency" else {"eta": gamma}
        expected = stock.step(output, time, x_t, generator=random, return_dict=False, **eta)[0]
        mean = schedule.mean(x_t, output, torch.tensor([step]))
        torch.testing.assert_close(mean + schedule.sigma[step] * noise, expected.double(), rtol=1e-4, atol=2e-4)


def test_the_density_of_a_consistency_step_in_closed_form() -> None:
    schedule = denoising_schedule(
        diffusers.LCMScheduler(**BETAS, prediction_type="sample"), SamplingSettings(method="consistency", steps=3)
    )
    alphas = diffusers.LCMScheduler(**BETAS).alphas_cumprod.double()
    assert schedule.timesteps.tolist() == [999, 679, 339]
    x_0, following = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0, 1])
    found = schedule.log_prob(torch.zeros(2, 1, 2, 2), following, x_0, steps, "sum")
    for row, reached in enumerate((679, 339)):
        deviation = math.sqrt(1 - alphas[reached])
        expected = norm.logpdf(following[row], alphas[reached].sqrt() * x_0[row], deviation).sum()
        assert found[row].item() == pytest.approx(expected, rel=1e-8)


def test_coefficients_of_a_flow_are_preserved() -> None:
    """Of a network that knows x_0 and ε, what is left at t′ is (1 − t′) x_0 and noise of deviation t′, whatever η."""
    times = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    x_0, epsilon = torch.randn(2, 3, 1, 50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(3)
    for eta in (0.0, 0.3, 1.0):
        schedule = PreservingSchedule(times[:-1], times, torch.full((3,), eta, dtype=torch.float64))
        start = times[:-1].view(3, 1, 1, 1)
        mean = schedule.mean((1 - start) * x_0 + start * epsilon, epsilon - x_0, steps)
        noise = mean - (1 - times[1:].view(3, 1, 1, 1)) * x_0
        spread = torch.sqrt((noise**2).mean(dim=(1, 2, 3)) + schedule.sigma**2)
        torch.testing.assert_close(spread, times[1:], rtol=0.05, atol=1e-12)
        assert (schedule.sigma[:-1] > 0).all() == (eta > 0)
        assert schedule.sigma[-1] == 0
    euler = FlowSchedule(times[:-1], times, torch.zeros(3, dtype=torch.float64))
    still = PreservingSchedule(times[:-1], times, torch.zeros(3, dtype=torch.float64))
    x_t = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(euler.mean(x_t, 2 * x_t, steps), still.mean(x_t, 2 * x_t, steps))  # both follow the flow


def multistep(schedule: Schedule, latents: torch.Tensor, network: Any, first: int) -> torch.Tensor:
    """Where the steps from ``first`` on lead, of second order from the next one on."""
    before = None
    for step in range(first, len(schedule.timesteps)):
        index = torch.full((len(latents),), step)
        output = network(latents, schedule.timesteps[step])
        denoised = schedule.denoised(latents, output, index)
        output = output if before is None else schedule.second_order(latents, output, step, before)
        latents, before = schedule.mean(latents, output, index), denoised
    return latents


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_coarser_steps_behind_the_noise_are_dpm_solvers(kind: str) -> None:
    betas = {**BETAS, "prediction_type": kind}
    ddim = diffusers.DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
    schedule = denoising_schedule(ddim, SamplingSettings(steps=(9, 4), eta=(1.0, 0.0, 0.34)))
    whole = denoising_schedule(ddim, SamplingSettings(steps=9, eta=(1.0, 0.0, 0.34)))
    assert schedule.timesteps.tolist() == whole.timesteps[[0, 1, 2, 3, 4, 6, 7]].tolist()
    assert schedule.alpha_previous.tolist() == whole.alpha_previous[[0, 1, 2, 3, 5, 6, 8]].tolist()
    assert schedule.stochastic_steps.tolist() == [0, 1, 2]
    assert torch.equal(schedule.sigma[:3], whole.sigma[:3])
    stock = diffusers.DPMSolverMultistepScheduler(**betas, solver_order=2)
    stock.set_timesteps(timesteps=schedule.timesteps[3:].tolist())
    start = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return latents.double().tanh() * (0.5 + time / 2000)

    expected = start
    for time in stock.timesteps:
        expected = stock.step(network(expected, time), time, expected, return_dict=False)[0].double()
    found = multistep(schedule, start, network, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    first_order = [schedule.mean(start, network(start, schedule.timesteps[3]), torch.full((2,), 3))]
    for step in (4, 5, 6):
        last = first_order[-1]
        first_order.append(schedule.mean(last, network(last, schedule.timesteps[step]), torch.full((2,), step)))
    assert (first_order[-1] - expected).abs().max() > 2e-3  # which tells it from DDIM


def test_second_order_is_nearer_to_the_flow_of_known_data() -> None:
    """Data of deviation s: x̂_0 = (1 − t) s² x_t / ((1 − t)² s² + t²), and the flow only rescales x_t."""
    spread, start = 0.4, torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.9, 0.0, 11, dtype=torch.float64)
    schedule = FlowSchedule(times[:-1], times, torch.zeros(10, dtype=torch.float64))

    def velocity(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        clean = (1 - time) * spread**2 / ((1 - time) ** 2 * spread**2 + time**2) * latents
        return (latents - clean) / time

    exact = start * spread / math.sqrt(0.1**2 * spread**2 + 0.9**2)
    euler = start
    for step, time in enumerate(times[:-1]):
        euler = schedule.mean(euler, velocity(euler, time), torch.full((4,), step))
    second, first = ((each - exact).abs().max() for each in (multistep(schedule, start, velocity, 0), euler))
    assert second < first / 3


def test_where_the_noise_is_follows_from_the_version_of_the_weights() -> None:
    sliding = SamplingSettings(steps=5, eta={"sliding": (0.7, 0.4, 3)})
    parts = [list(sliding.at(version).noisy) for version in range(16)]
    assert parts[::3] == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 1], [1, 2]]
    assert parts[0] == parts[1] == parts[2]
    assert list(sliding.noisy) == [0, 1]
    assert {sliding.at(version).noise for version in range(16)} == {0.7}
    random = SamplingSettings(steps=(5, 1), eta={"random": (0.7, 0.4, 1)})
    drawn = [random.at(version) for version in range(200)]
    counts = [sum(list(each.noisy) == part for each in drawn) for part in ([0, 1], [1, 2], [2, 3], [3, 4])]
    assert sum(counts) == 200
    assert min(counts) > 30
    assert {len(each.kept) for each in drawn} == {3, 4, 5}
    assert random.calls == 5
    assert SamplingSettings(steps=(10, 3), eta=(1.0, 0.0, 0.3)).kept == [0, 1, 2, 3, 5, 7]
    assert SamplingSettings(steps=(4, 3), eta=(1.0, 0.0, 0.5)).kept == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("few")
    builders = {"sd": build_tiny_pipeline, "xl": build_tiny_xl, "sd3": build_tiny_sd3}
    return {name: str(build(place / name)) for name, build in builders.items()}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("model", "way"),
    [
        *(("sd", way) for way in WAYS),
        *(("xl", way) for way in ("consistency", "tcd", "cached")),
        *(("sd3", way) for way in OF_FLOWS),
    ],
)
def test_what_is_drawn_is_replayed_and_learned(
    model: str, way: str, guidance_scale: float, models: dict[str, str]
) -> None:
    sampling = SamplingSettings(**(WAYS | OF_FLOWS)[way], guidance_scale=guidance_scale)
    settings = ModelSettings(path=models[model])
    policy, learner = DiffusionPolicy(settings, sampling), DiffusionLearner(settings, sampling, TRAINING, seed=0)
    _, trajectory = policy.rollout(BATCH, list(range(6)))
    stochastic = denoising_steps(models[model], sampling).stochastic
    assert np.flatnonzero(np.isfinite(trajectory.log_probs[0])).tolist() == stochastic
    assert 0 < len(stochastic) < trajectory.log_probs.shape[1] + bool(sampling.cache)
    assert trajectory.log_probs.shape[1] == len(sampling.at(0).kept) <= sampling.calls
    learned_from = []
    for number in range(2):
        advantage = np.array([1.0, -1.0] * 3)
        trajectory = policy.by(sampling.at(number)).rollout(BATCH, [*range(6)], number)[1]
        statistics, changed = learner.learn(trajectory, advantage, seed=number)
        learned_from.append(sorted(statistics.first_update_error))
        assert max(statistics.first_update_error.values()) < 1e-5
        assert changed > 10
        policy.load(learner.weights())
    assert (learned_from[0] == learned_from[1]) == (list(sampling.at(0).noisy) == list(sampling.at(1).noisy))
    some, whole = (policy.rollout(BATCH[part], [*range(6)][part])[1] for part in (slice(1, 3), slice(6)))
    np.testing.assert_allclose(some.latents, whole.latents[1:3], atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_features_of_every_step_change_nothing_and_those_of_others_little(
    guidance_scale: float, models: dict[str, str]
) -> None:
    drawn, apart = {}, {}
    for cache in (None, (1, 0), (2, 0), (3, 0)):
        sampling = SamplingSettings(steps=6, guidance_scale=guidance_scale, cache=cache)
        policy = DiffusionPolicy(ModelSettings(path=models["sd"]), sampling)
        drawn[cache] = policy.rollout(BATCH, list(range(6)))[1]
        # KL of the weights to themselves: what is replayed is what was drawn with, from the same features.
        policy.load({name: each.detach() * 1.0 for name, each in policy.network.named_parameters()})
        apart[cache] = policy.divergence(drawn[cache])
    np.testing.assert_array_equal(drawn[1, 0].latents, drawn[None].latents)
    errors = [np.abs(drawn[cache].latents - drawn[None].latents).max() for cache in ((2, 0), (3, 0))]
    assert min(errors) > 1e-4
    assert all(each.max() == 0 for each in apart.values())


def test_a_cached_sampler_may_draw_what_is_learned_from_without_a_density(models: dict[str, str]) -> None:
    """By the network alone, which needs no features."""
    settings, sampling = ModelSettings(path=models["sd"]), SamplingSettings(steps=5, cache=(2, 0), guidance_scale=2.0)
    training = TRAINING.model_copy(update={"objective": "negative_aware"})
    trajectory = DiffusionPolicy(settings, sampling).rollout(BATCH, list(range(6)))[1]
    ends = []
    for how in (sampling, sampling.model_copy(update={"cache": None})):
        learner = DiffusionLearner(settings, how, training, seed=0)
        learner.learn(trajectory, np.array([1.0, -1.0] * 3), seed=0)
        ends.append(learner.weights())
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_distilled_model_goes_by_its_scheduler_and_stays_what_it_is(name: str, tmp_path: Path) -> None:
    directory = build_tiny_pipeline(tmp_path / "model")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
    pipeline.scheduler = getattr(diffusers, name)(**BETAS)
    pipeline.save_pretrained(tmp_path / "distilled")
    path, sampling = str(tmp_path / "distilled"), SamplingSettings(steps=4, eta=0.3)
    policy = DiffusionPolicy(ModelSettings(path=path), sampling)
    images, trajectory = policy.rollout(BATCH, list(range(6)))
    assert np.isfinite(trajectory.log_probs).sum(axis=1).tolist() == [3] * 6
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    stock = diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 0.3, "output_type": "np"}
    drawn = np.round(stock(BATCH, generator=generators, **options).images * 255)
    assert np.abs(drawn - images.astype(float)).max() <= 1
    by_ddim = DiffusionPolicy(ModelSettings(path=path), SamplingSettings(method="ddim", steps=4))
    assert by_ddim.schedule.timesteps.tolist() == [751, 501, 251, 1] != policy.schedule.timesteps.tolist()
    assert by_ddim.rollout(BATCH, list(range(6)))[0].std() > 5
    learner = DiffusionLearner(ModelSettings(path=path), sampling, TRAINING, seed=0)
    learner.save(tmp_path / "learned")
    saved = json.loads((tmp_path / "learned/scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    assert inspect(tmp_path / "learned").scheduler == inspect(Path(path)).scheduler


def test_what_cannot_be_sampled_so_is_refused(models: dict[str, str]) -> None:
    wrong = [
        ("sd", {"method": "sde"}, "sde is for flows"),
        ("sd3", {"method": "tcd"}, "tcd is for UNets"),
        ("sd", {"method": "consistency", "steps": 51}, "50 at most"),
        ("sd", {"method": "consistency", "steps": 4, "eta": (1.0, 0.0, 0.5)}, "all of them"),
        ("sd", {"method": "tcd", "steps": (4, 1), "eta": (1.0, 0.0, 0.5)}, "they are one number"),
    ]
    for model, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            denoising_steps(models[model], SamplingSettings(**given))
    for given, message in (
        ({"steps": (4, 2)}, r"for noise in a part of them: give eta one, as in \[1, 0, 0.3\]"),
        ({"eta": {"sliding": (1.0, 0.5, 1), "random": (1.0, 0.5, 1)}}, "name one way"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingSettings(**given)
    with pytest.raises(ValueError, match="of 4 steps none is in this part"):
        SamplingSettings(steps=4, eta=(1.0, 0.5, 0.5))


@pytest.mark.parametrize(
    "how",
    [
        ("sampling.method=consistency", "sampling.steps=3"),
        ("sampling.method=tcd", "sampling.eta=0.3", "sampling.steps=3", "training.depth=1"),
        ("sampling.eta={sliding: [1.0, 0.5, 1]}", "sampling.steps=[4, 1]", "training.depth=1"),
        ("sampling.eta=[1.0,0,0.5]", "sampling.cache=[2,0]", "sampling.guidance_scale=2"),
        ("sampling.method=cps", "sampling.eta={random: [0.7, 0.5, 1]}", "sampling.steps=[4, 1]"),
    ],
)
def test_neither_the_number_of_samplers_nor_a_resume_changes_a_bit(
    how: tuple[str, ...], models: dict[str, str], ray_session: None, tmp_path: Path
) -> None:
    from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo

    (tmp_path / "prompts.txt").write_text("\n".join(dict.fromkeys(BATCH)))
    given = [
        *(
            f"prompts={tmp_path / 'prompts.txt'}",
            f"model.path={models['sd3' if 'cps' in how[0] else 'sd']}",
            "captioner.path=null",
        ),
        *("reward.function=tests.rewards:redness", "evaluation.evaluator=null", "evaluation.images=4"),
        *("evaluation.interim_images=4", "evaluation.every=0", "sampling.steps=4", "training.steps=3"),
        *("training.images_per_step=12", "training.images_per_prompt=6", "training.learning_rate=1e-3"),
        *("checkpoint.every=1", "actors.images_per_call=5", "actors.threads.learner=1"),
        *(f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", "tracking.system_metrics=false", *how),
    ]

    def stop(run: Any) -> None:
        if run.step == 2:
            raise KeyboardInterrupt

    ends = []
    for samplers in (1, 3):
        where = [f"output_dir={tmp_path / str(samplers)}", f"actors.samplers={samplers}"]
        config = load_config(DdpoConfig, None, [*given, *where])
        if samplers == 3:
            with pytest.raises(KeyboardInterrupt):
                run_ddpo(config, stop)
            summary = resume_ddpo(tmp_path / "3")
        else:
            summary = run_ddpo(config)
        ends.append(json.loads(summary.read_text()))
    assert ends[0]["weights_sha256"] == ends[1]["weights_sha256"]
    if how[0] in ("sampling.method=consistency", "sampling.method=tcd"):  # of three calls; what two of them make
        assert ends[0]["served"] == ends[1]["served"]
        assert ends[0]["served"]["steps"] == 2
        assert ends[0]["served"]["reward"] not in (None, ends[0]["reward_after"])
    else:
        assert "served" not in ends[0]
