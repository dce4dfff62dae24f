"""The denoising step against the DDIM paper's formulas, written here a second time, and against diffusers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import norm

from pipelines.denoisers.ddim import denoising_schedule
from policies.diffusion.ddim import DenoisingSchedule, ddim_deviation
from policies.rl.settings import SamplingSettings

STEPS = 10
SHAPE = (4, 3, 6, 5)


def make_scheduler(prediction_type: str, spacing: str, alpha_to_one: bool) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=alpha_to_one,
        clip_sample=False,
    )


def paper_moments(
    scheduler: DDIMScheduler, step: int, eta: float, x_t: np.ndarray, output: np.ndarray
) -> tuple[np.ndarray, float]:
    """Mean and standard deviation of one step in float64, from equations 12 and 16 of the DDIM paper.

    x_0 and ε are found by solving the two linear equations that x_t and the network's output are.
    """
    path = [*scheduler.timesteps.tolist(), None]
    alphas = scheduler.alphas_cumprod.numpy().astype(np.float64)
    now = alphas[path[step]]
    end = 1.0 if scheduler.config.set_alpha_to_one else alphas[0]
    before = end if path[step + 1] is None else alphas[path[step + 1]]
    signal, noise = np.sqrt(now), np.sqrt(1 - now)
    rows = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-noise, signal)}
    row = rows[scheduler.config.prediction_type]
    known = np.stack([x_t.ravel(), output.ravel()]).astype(np.float64)
    x_0, epsilon = np.linalg.solve(np.array([(signal, noise), row]), known).reshape(2, *x_t.shape)
    sigma = eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
    # At η = 1 the radicand of the last step is zero and may come out as −1e-17.
    mean = np.sqrt(before) * x_0 + np.sqrt(np.maximum(1 - before - sigma**2, 0)) * epsilon
    return mean, float(sigma)


def one_step(scheduler: DDIMScheduler, step: int, eta: float) -> tuple[torch.Tensor, ...]:
    """x_t, the network's output and x_{t−1} in float32, as a sampler would store them."""
    x_t, output, noise = torch.randn(3, *SHAPE)
    timestep = int(scheduler.timesteps[step])
    return x_t, output, scheduler.step(output, timestep, x_t, eta=eta, variance_noise=noise).prev_sample


@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.01])
def test_log_probability_is_the_closed_form(eta: float, prediction_type: str, spacing: str, alpha_to_one: bool) -> None:
    scheduler = make_scheduler(prediction_type, spacing, alpha_to_one)
    schedule = denoising_schedule(scheduler, SamplingSettings(steps=STEPS, eta=eta))
    stochastic = schedule.stochastic_steps.tolist()
    for step in (stochastic[0], stochastic[-1]):
        x_t, output, x_next = one_step(scheduler, step, eta)
        mean, sigma = paper_moments(scheduler, step, eta, x_t.numpy(), output.numpy())
        density = norm.logpdf(x_next.numpy().astype(np.float64), mean, sigma).reshape(len(x_t), -1)
        index = torch.full((len(x_t),), step)
        averaged = schedule.log_prob(x_t, x_next, output, index)
        summed = schedule.log_prob(x_t, x_next, output, index, "sum")
        assert averaged.dtype == torch.float64
        np.testing.assert_allclose(averaged.numpy(), density.mean(axis=1), rtol=0, atol=1e-5)
        np.testing.assert_allclose(summed.numpy(), density.sum(axis=1), rtol=0, atol=1e-5 * density.shape[1])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_step_that_lands_on_the_image_has_no_density(spacing: str) -> None:
    lands = denoising_schedule(make_scheduler("epsilon", spacing, True), SamplingSettings(steps=STEPS))
    assert lands.sigma[-1] == 0
    assert lands.stochastic_steps.tolist() == list(range(STEPS - 1))


def test_last_step_keeps_a_density_where_alpha_stays_below_one() -> None:
    # The last step starts from timestep 99 if steps are trailing, and from 1 in Stable Diffusion; both end at ᾱ_0.
    trailing = make_scheduler("epsilon", "trailing", False)
    stable_diffusion = DDIMScheduler.from_config(make_scheduler("epsilon", "leading", False).config, steps_offset=1)
    for scheduler in (trailing, stable_diffusion):
        schedule = denoising_schedule(scheduler, SamplingSettings(steps=STEPS))
        assert schedule.stochastic_steps.tolist() == list(range(STEPS))
    # Without the offset the last step would start and end at ᾱ_0.
    still = denoising_schedule(make_scheduler("epsilon", "leading", False), SamplingSettings(steps=STEPS))
    assert still.stochastic_steps.tolist() == list(range(STEPS - 1))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_step_starts_where_the_one_before_ended(spacing: str) -> None:
    schedule = denoising_schedule(make_scheduler("epsilon", spacing, True), SamplingSettings(steps=STEPS))
    assert schedule.alpha_previous[-1] == 1
    for step, following in pairwise(range(STEPS)):
        assert schedule.alpha_previous[step] == schedule.alpha[following]


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_mean_and_deviation_are_those_of_diffusers(prediction_type: str, spacing: str, steps: int) -> None:
    scheduler = make_scheduler(prediction_type, spacing, True)
    schedule = denoising_schedule(scheduler, SamplingSettings(steps=steps, eta=0.7))
    for step in {0, steps // 2, steps - 1}:
        x_t, output, noise = torch.randn(3, *SHAPE, dtype=torch.float64)
        timestep = int(scheduler.timesteps[step])
        theirs = scheduler.step(output, timestep, x_t, eta=0.7, variance_noise=noise).prev_sample
        ours = schedule.mean(x_t, output, torch.full((len(x_t),), step)) + schedule.sigma[step] * noise
        # diffusers keeps ᾱ in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_steps_may_differ_within_a_batch() -> None:
    schedule = denoising_schedule(make_scheduler("v_prediction", "trailing", True), SamplingSettings(steps=STEPS))
    x_t, output, x_next = torch.randn(3, *SHAPE)
    steps = torch.tensor([0, 3, 8, 3])
    together = schedule.log_prob(x_t, x_next, output, steps)
    members = zip(x_t.split(1), x_next.split(1), output.split(1), steps.split(1), strict=True)
    alone = torch.cat([schedule.log_prob(*member) for member in members])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_gradient_with_respect_to_the_network(prediction_type: str) -> None:
    scheduler = make_scheduler(prediction_type, "trailing", True)
    schedule = denoising_schedule(scheduler, SamplingSettings(steps=STEPS, eta=0.5))
    x_t, output, x_next = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64)
    output.requires_grad_(True)
    steps = torch.tensor([0, 8])
    assert torch.autograd.gradcheck(lambda predicted: schedule.log_prob(x_t, x_next, predicted, steps), (output,))
    (gradient,) = torch.autograd.grad(schedule.log_prob(x_t, x_next, output, steps).sum(), output)
    assert (gradient.abs() > 0).all()


def test_density_at_the_mean_is_the_peak_of_a_normal() -> None:
    alpha, alpha_previous = torch.tensor([[0.5], [0.8]], dtype=torch.float64)
    schedule = DenoisingSchedule(
        torch.tensor([500]), alpha, alpha_previous, ddim_deviation(alpha, alpha_previous, 1.0), "epsilon"
    )
    x_t, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    steps = torch.zeros(len(x_t), dtype=torch.int64)
    peak = schedule.log_prob(x_t, schedule.mean(x_t, output, steps), output, steps)
    sigma = np.sqrt(0.2 / 0.5 * (1 - 0.5 / 0.8))
    np.testing.assert_allclose(peak.numpy(), norm.logpdf(0.0, 0.0, sigma), rtol=1e-12)
