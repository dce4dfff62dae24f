"""Consistency models of pixels: the maths is the stock scheduler's and the papers', stock products, the study."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestration.experiments.consistency import Consistency
from pipelines.data.digits import DIGITS, tint
from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.measures.evaluator import load_evaluator
from pipelines.storage.atomic import Files
from pipelines.studies.consistency import as_judged, distil, learn_teacher, measure, train_alone
from pipelines.studies.distil import learn_features
from policies.edm import (
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    Denoise,
    denoised,
    denoising_weight,
    intervals,
    karras,
    lognormal_shares,
    lognormal_sigmas,
    solve,
    step,
)

DATA = DataSettings(source="digits", reference=12, limit=40).model_dump()
COMMON = {"data": DATA, "seed": 3}
FIT = {**COMMON, "channels": 8, "levels": 2, "batch": 8, "points": 6, "updates": 2, "learning_rate": 1e-3}


def gaussian(variance: float) -> Denoise:
    """The perfect denoiser of N(0, variance)."""
    return lambda noisy, sigma: noisy * variance / (variance + sigma**2)


@pytest.mark.parametrize("points", [18, 41])
def test_what_is_trained_is_what_the_stock_scheduler_draws_with(points: int) -> None:
    """Grid, input, time, boundary scalings: those of ``CMStochasticIterativeScheduler`` at each σ of its own."""
    from diffusers import CMStochasticIterativeScheduler

    stock = CMStochasticIterativeScheduler(points, clip_denoised=False)
    stock.set_timesteps(points)
    sigmas = karras(points).flip(0)
    assert torch.allclose(stock.sigmas[:-1].double(), sigmas, rtol=1e-5)
    noisy, seen = torch.randn(1, 1, 4, 4), list[tuple[Tensor, Tensor]]()

    def call(inputs: Tensor, times: Tensor) -> Tensor:
        seen.append((inputs, times))
        return inputs.sin() + times / 1000

    for sigma, time in zip(sigmas, stock.timesteps, strict=True):
        found = denoised(call, noisy, sigma.float().view(1, 1, 1, 1), SIGMA_MIN)
        inputs = stock.scale_model_input(noisy, time)
        assert torch.allclose(seen[-1][0], inputs)
        assert seen[-1][1].item() == pytest.approx(time.item(), rel=1e-6)
        at = stock.step_index
        skip, out = stock.get_scalings_for_boundary_condition(stock.sigmas[at])
        expected = skip * noisy + out * call(inputs, time.float()[None])
        assert torch.allclose(found, expected, atol=1e-5)
        noise = torch.Generator().manual_seed(0)
        drawn = stock.step(call(inputs, time.float()[None]), time, noisy, generator=noise).prev_sample
        spread = (max(stock.sigmas[at + 1].item(), SIGMA_MIN) ** 2 - SIGMA_MIN**2) ** 0.5
        noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(drawn, found + spread * noise, atol=1e-4)  # algorithm 1
    lowest = torch.full((1, 1, 1, 1), SIGMA_MIN)
    assert torch.equal(denoised(call, noisy, lowest, SIGMA_MIN), noisy)  # the boundary condition


def test_denoiser_weighs_the_networks_own_error_alike() -> None:
    """λ c_out² = 1, and a network that says nothing is the denoiser of data of spread .5."""
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    out = denoised(lambda inputs, times: torch.ones_like(inputs), torch.zeros(4), sigma)
    assert torch.allclose(denoising_weight(sigma) * out**2, torch.ones(4))
    noisy = torch.randn(4)
    silent = denoised(lambda inputs, times: torch.zeros_like(inputs), noisy, sigma)
    assert torch.allclose(silent, gaussian(SIGMA_DATA**2)(noisy, sigma))
    drawn = lognormal_sigmas(20_000, torch.Generator().manual_seed(0))[0].log()
    assert (drawn.mean().item(), drawn.std().item()) == (pytest.approx(-1.2, abs=0.03), pytest.approx(1.2, abs=0.03))


def test_a_step_follows_the_trajectory_to_its_order() -> None:
    """Of a Gaussian it is known: x(σ) ∝ √(v + σ²). Halving all steps makes Heun's error a quarter or less."""
    denoise, noise = gaussian(0.25), torch.randn(5, dtype=torch.float64)

    def error(steps: int, heun: bool) -> float:
        exact = noise * SIGMA_MAX * ((0.25 + SIGMA_MIN**2) / (0.25 + SIGMA_MAX**2)) ** 0.5
        return (solve(denoise, noise, steps, heun) - exact).abs().max().item()

    assert error(64, True) < 0.3 * error(32, True) < 0.1 * error(32, False)
    assert error(64, False) < 0.6 * error(32, False)
    calls = list[float]()

    def counted(noisy: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma.item())
        return denoise(noisy, sigma)

    once = solve(counted, noise, 1, heun=False)
    assert calls == [SIGMA_MAX]
    assert torch.allclose(once, denoise(noise * SIGMA_MAX, torch.tensor(SIGMA_MAX)), atol=0.01)  # as one call of f
    step(counted, noise, torch.tensor(2.0), torch.tensor(1.0))
    assert calls[1:] == [2.0, 1.0]


def test_the_grid_doubles_and_small_noise_is_seen_most() -> None:
    course = [intervals(update, 400, 10, 80) for update in range(400)]
    assert [course.count(each) for each in (10, 20, 40, 80)] == [100] * 4
    assert course == sorted(course)
    assert {intervals(update, 10, 10, 25) for update in range(10)} == {10, 20, 25}
    assert {intervals(update, 10, 7, 7) for update in range(10)} == {7}
    sigmas = karras(11)
    shares = lognormal_shares(sigmas)
    normal = torch.distributions.Normal(-1.1, 2.0)
    expected = torch.stack([normal.cdf(high.log()) - normal.cdf(low.log()) for low, high in pairwise(sigmas)])
    assert torch.allclose(shares, expected / expected.sum())
    assert shares.sum().item() == pytest.approx(1)


def stored(files: Files, directory: Path) -> Path:
    """The only product's directory."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    (only,) = (directory / "product").iterdir()
    return only


def test_products_are_stock_and_a_repeat_gives_the_same_bytes(tmp_path: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    taught = learn_teacher(FIT, [], "cpu")
    alone = {**FIT, "intervals": [2, 5]}
    made = {
        "teacher": taught,
        "distilled": distil({**FIT, "decay": 0.5}, [taught], "cpu"),
        "trained": train_alone(alone, [], "cpu"),
    }
    assert taught == learn_teacher(FIT, [], "cpu")
    assert made["distilled"] == distil({**FIT, "decay": 0.5}, [taught], "cpu")
    assert made["trained"] == train_alone(alone, [], "cpu")
    assert made["distilled"] != distil({**FIT, "decay": 0.0}, [taught], "cpu")
    for name, files in made.items():
        directory = stored(files, tmp_path / name)
        assert directory.name == name
        assert json.loads((directory / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
        stock = ConsistencyModelPipeline.from_pretrained(directory)
        assert isinstance(stock.scheduler, CMStochasticIterativeScheduler)
        assert stock.scheduler.config.num_train_timesteps == 6
        for calls in (1, 2):
            random = torch.Generator().manual_seed(0)
            how = {"class_labels": [3, 9], "num_inference_steps": calls, "generator": random}
            assert stock(2, **how, output_type="np").images.shape == (2, 8, 8, 1)

    eye = learn_features(COMMON, [], "cpu")
    job = {**COMMON, "sampler": "consistency", "calls": [1, 2], "steps": None, "evaluator": "models/digits/evaluator"}
    numbers = json.loads(measure(job, [eye, made["distilled"]], "cpu")["metrics.json"])
    assert numbers.keys() >= {"fid/of_1", "recall/of_2", "evaluator/digit/of_1"}
    assert numbers["second_call/fid"] == pytest.approx(numbers["fid/of_2"] / numbers["fid/of_1"])
    teacher = {**job, "sampler": "heun", "steps": 3, "evaluator": None}
    numbers = json.loads(measure(teacher, [eye, taught], "cpu")["metrics.json"])
    assert numbers["fid/of_1"] == numbers["fid/of_2"]
    assert "evaluator/digit/of_1" not in numbers


def test_images_without_labels_will_do(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "own").mkdir()
    for number in range(16):
        grey = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(grey).save(tmp_path / "own" / f"{number}.png")
    data = DataSettings(source=str(tmp_path / "own"), reference=8).model_dump()
    files = train_alone({**FIT, "data": data, "intervals": [2, 2]}, [], "cpu")
    eye = learn_features({**COMMON, "data": data}, [], "cpu")
    job = {**COMMON, "data": data, "calls": [1], "steps": None, "evaluator": None}
    for sampler in ("consistency", "euler"):
        found = measure({**job, "sampler": sampler}, [eye, files], "cpu")
        assert json.loads(found["metrics.json"])["fid/of_1"] > 0


def test_evaluator_knows_the_small_digits() -> None:
    data = load_real_data(DataSettings(source="digits", limit=300))
    assert data.labels is not None
    judge = load_evaluator("models/digits/evaluator")
    words = [DIGITS[label] for label in data.labels]
    assert judge.judge(as_judged(data.images), words)["digit"].mean() > 0.97
    large = tint(np.zeros((1, 16, 16)), ["red"], ["gray"])
    assert as_judged(large) is large


def test_training_lowers_the_loss_of_each() -> None:
    """The teacher denoises, and f that is trained alone; f that is distilled goes where the teacher's ODE ends."""
    from diffusers import ConsistencyModelPipeline

    from pipelines.measures.evaluator import to_network_input
    from pipelines.storage.atomic import unpacked
    from pipelines.studies import products
    from pipelines.studies.consistency import of_network

    data = load_real_data(DataSettings(source="digits", limit=60))
    assert data.labels is not None
    clean, labels = to_network_input(data.images), torch.from_numpy(data.labels)
    random, sigma = torch.Generator().manual_seed(0), torch.full((60, 1, 1, 1), 0.6)
    noisy = clean + sigma * torch.randn(clean.shape, generator=random)

    def network_of(files: Files) -> Any:
        (made,) = products(files).values()
        return unpacked(made, ConsistencyModelPipeline.from_pretrained).unet

    def error(files: Files, smallest: float) -> float:
        with torch.no_grad():
            return float((of_network(network_of(files), labels, smallest)(noisy, sigma) - clean).square().mean())

    longer: dict[str, Any] = {**FIT, "updates": 60, "batch": 32, "learning_rate": 8e-3}
    taught, brief = learn_teacher(longer, [], "cpu"), learn_teacher(FIT, [], "cpu")
    assert error(taught, 0.0) < 0.7 * error(brief, 0.0)
    alone = {"intervals": [4, 4]}
    assert error(train_alone(longer | alone, [], "cpu"), SIGMA_MIN) < 0.7 * error(
        train_alone(FIT | alone, [], "cpu"), SIGMA_MIN
    )
    pupil = distil({**longer, "decay": 0.9, "updates": 100}, [taught], "cpu")
    networks, ends = [network_of(each) for each in (taught, pupil)], []
    noise = torch.randn(clean.shape, generator=random)
    with torch.no_grad():
        end = solve(of_network(networks[0], labels), noise, 17, heun=True)
        for network in networks:
            ends.append(of_network(network, labels, SIGMA_MIN)(noise * SIGMA_MAX, torch.full((60, 1, 1, 1), SIGMA_MAX)))
    apart = [(each - end).square().mean().item() for each in ends]
    assert apart[1] < 0.9 * apart[0], apart  # one call is nearer to where the teacher's ODE ends


def test_study_plans_arms_with_their_controls() -> None:
    study = Consistency(evaluator=None)
    plan = {arm: study.tasks(arm, 0) for arm in study.arms}
    teacher = plan["teacher"][0]
    assert [each.key for each in plan["distilled"][0].inputs] == [teacher.key]
    assert plan["trained"][0].inputs == ()
    assert plan["trained"][0].parameters["points"] == 41
    judged = {arm: tasks[-1] for arm, tasks in plan.items()}
    assert {arm: (each.parameters["sampler"], each.parameters["steps"]) for arm, each in judged.items()} == {
        "distilled": ("consistency", None),
        "trained": ("consistency", None),
        "undistilled": ("consistency", None),
        "euler": ("euler", None),
        "teacher": ("heun", 17),
    }
    assert {arm for arm, each in judged.items() if each.inputs[1].key == teacher.key} == {
        "undistilled",
        "euler",
        "teacher",
    }
    assert len({study.tasks(arm, seed)[-1].inputs[0].key for arm in study.arms for seed in (0, 1)}) == 1
    claims = Consistency().claimed()
    assert {each.arm for each in claims} == {"distilled", "trained", "undistilled", "euler"}
    assert len(claims) > len(study.claimed())
    assert {each.arm for each in Consistency(arms=("teacher", "euler")).claimed()} == {"euler"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"levels": 5}, "images are 8×8, and must be squares with sides that are multiples of 16"),
        ({"data": {"source": "digits", "reference": 1797}}, "leave none to learn from"),
        ({"data": {"source": "digits", "extractor": "nowhere"}}, "data.extractor: 'nowhere'"),
        ({"intervals": (20, 10)}, "intervals: give two numbers from 2 to 10000, in order, not 20 and 10"),
        ({"calls": (1, 1)}, "calls: give each number once, from 1 to 17, not 1"),
        ({"calls": (18,)}, "from 1 to 17, not 18"),
        ({"evaluator": "models/digits/captioner"}, "evaluator"),
    ],
)
def test_what_cannot_be_trained_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Consistency(**changes).preflight()
    assert "\n" not in str(caught.value)
