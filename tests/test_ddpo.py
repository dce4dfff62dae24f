"""The DDPO update on policies small enough to check by hand: no diffusion model takes part."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.rl.health import DegenerateBatch
from policies.rl.objectives.ddpo import importance_sampling_loss, score_function_loss
from policies.rl.ratio import RatioError
from policies.rl.rollouts import Objective
from policies.rl.settings import TrainingSettings
from policies.rl.update import PolicyLearner, UpdateStatistics

IMAGES, STEPS, SIGMA = 64, 6, 0.5


def settings(objective: str = "importance_sampling", **keys: Any) -> TrainingSettings:
    """One update on everything, without weight decay, gradient clipping or ratio clipping, unless told otherwise."""
    defaults = {"images_per_step": IMAGES, "updates_per_step": 1, "max_gradient_norm": 1e9}
    return TrainingSettings(objective=objective, **{**defaults, "clip_range": 0.9, **keys})  # type: ignore[arg-type]


class LinearPolicy:
    """Two parameters: the action of denoising step s is N(intercept + slope · s, σ²)."""

    def __init__(self, intercept: float = 0.3, slope: float = -0.2) -> None:
        self.intercept = nn.Parameter(torch.tensor(intercept, dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.parameters = [self.intercept, self.slope]
        self.actions = torch.empty(0)

    def draw(self) -> Tensor:
        """Store actions (images, steps) and return their log-probabilities."""
        with torch.no_grad():
            mean = self.intercept + self.slope * torch.arange(STEPS)
            self.actions = mean + SIGMA * torch.randn(IMAGES, STEPS, dtype=torch.float64)
            return self.log_prob(*self.everything()).view(IMAGES, STEPS)

    def log_prob(self, images: Tensor, steps: Tensor) -> Tensor:
        z = (self.actions[images, steps] - self.intercept - self.slope * steps) / SIGMA
        return -0.5 * z**2 - math.log(SIGMA) - 0.5 * math.log(2 * math.pi)

    @staticmethod
    def everything() -> tuple[Tensor, Tensor]:
        return torch.arange(IMAGES).repeat_interleave(STEPS), torch.arange(STEPS).repeat(IMAGES)


LogProb = Callable[[Tensor, Tensor], Tensor]


def objective_of(log_prob: LogProb, old: Tensor, advantage: Tensor, training: TrainingSettings) -> Objective:
    """The objectives of policies without a denoising schedule."""

    def objective(images: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        new = log_prob(images, steps)
        reference, weight = old[images, steps].to(new), advantage[images].to(new)
        if training.objective == "score_function":
            return score_function_loss(new, weight), (new - reference).detach()
        return importance_sampling_loss(new, reference, weight, training.clip_range), (new - reference).detach()

    return objective


def step(
    learner: PolicyLearner, log_prob: LogProb, old: Tensor, advantage: Tensor, steps: Tensor, generator: torch.Generator
) -> UpdateStatistics:
    objective = objective_of(log_prob, old, advantage, learner.settings)
    return learner.learn(objective, len(advantage), steps, generator)


def learn(
    policy: LinearPolicy,
    old: Tensor,
    advantage: Tensor,
    training: TrainingSettings,
    log_prob: LogProb | None = None,
    micro_batch: int = 64,
    steps: Tensor | None = None,
    seed: int = 0,
) -> PolicyLearner:
    learner = PolicyLearner(policy.parameters, training, micro_batch)
    steps = torch.arange(STEPS) if steps is None else steps
    step(learner, log_prob or policy.log_prob, old, advantage, steps, torch.Generator().manual_seed(seed))
    return learner


@pytest.mark.parametrize("objective", ["importance_sampling", "score_function"])
def test_gradient_is_that_of_the_summed_log_probability(objective: str) -> None:
    """At ratio 1 both objectives have the gradient −E[A Σ_t ∇ log p], up to the number of steps averaged over."""
    policy = LinearPolicy()
    old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
    per_image = policy.log_prob(*policy.everything()).view(IMAGES, STEPS).sum(dim=1)
    expected = torch.autograd.grad(-(advantage * per_image).mean() / STEPS, policy.parameters)
    learn(policy, old, advantage, settings(objective))
    for parameter, gradient in zip(policy.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
        assert gradient.abs() > 1e-3


def test_importance_weights_enter_the_gradient_once_the_policy_has_moved() -> None:
    policy = LinearPolicy()
    old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
    policy.intercept.data += 0.02
    new = policy.log_prob(*policy.everything()).view(IMAGES, STEPS)
    weight = (new.detach() - old).exp() * advantage[:, None]
    assert weight.div(advantage[:, None]).sub(1).abs().max() > 0.05
    expected = torch.autograd.grad(-(weight * new).mean(), policy.parameters)
    learn(policy, old, advantage, settings(ratio_tolerance=1.0))
    for parameter, gradient in zip(policy.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [
        (2.0, 1.3, 0.0),  # good and already likelier by more than the clip: no further
        (2.0, 0.7, -2.0 * 0.7),  # good but less likely: pulled back at full strength
        (-2.0, 0.7, 0.0),  # bad and already less likely by more than the clip: no further
        (-2.0, 1.3, 2.0 * 1.3),  # bad but likelier: pushed down at full strength
        (2.0, 1.05, -2.0 * 1.05),  # within the clip nothing is held back
        (-2.0, 0.95, 2.0 * 0.95),
    ],
)
def test_clipping_is_one_sided(advantage: float, ratio: float, expected: float) -> None:
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, weight = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    importance_sampling_loss(log_prob, old, weight, clip_range=0.1).sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.item() == pytest.approx(expected, abs=1e-12)


def test_a_tight_clip_holds_the_policy_near_the_one_that_drew() -> None:
    divergence, clipped = {}, {}
    for clip_range in (1e-3, 0.9):
        torch.manual_seed(0)
        policy = LinearPolicy()
        old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
        training = settings(clip_range=clip_range, ratio_tolerance=1e9, learning_rate=1e-3)
        learner, generator = PolicyLearner(policy.parameters, training, 1024), torch.Generator()
        for _ in range(30):
            statistics = step(learner, policy.log_prob, old, advantage, torch.arange(STEPS), generator)
        divergence[clip_range], clipped[clip_range] = statistics.approximate_kl, statistics.clip_fraction
    assert 0 < divergence[1e-3] < divergence[0.9] / 10
    assert clipped[1e-3] > 0.1
    assert clipped[0.9] < 0.01


@pytest.mark.parametrize(
    ("objective", "updates"), [("importance_sampling", 4), ("importance_sampling", 1), ("score_function", 1)]
)
def test_mean_moves_to_the_optimum(objective: str, updates: int) -> None:
    """x ~ N(θ, 1), reward −(x − 3)²: from θ = 0 to 3 within 0.1, averaged over the last 40 of 120 steps."""
    mean = nn.Parameter(torch.zeros((), dtype=torch.float64))
    rate = 0.1 / updates
    training = settings(objective, images_per_step=256, updates_per_step=updates, learning_rate=rate, clip_range=0.2)
    learner, generator = PolicyLearner([mean], training, micro_batch=256), torch.Generator().manual_seed(0)
    visited = []
    for _ in range(120):
        actions = mean.detach() + torch.randn(256, 1, generator=generator, dtype=torch.float64)

        def log_prob(images: Tensor, steps: Tensor, actions: Tensor = actions) -> Tensor:
            return -0.5 * (actions[images, steps] - mean) ** 2

        reward = -((actions[:, 0] - 3) ** 2)
        advantage = (reward - reward.mean()) / reward.std()
        with torch.no_grad():
            old = log_prob(torch.arange(256), torch.zeros(256, dtype=torch.int64))[:, None]
        step(learner, log_prob, old, advantage, torch.zeros(1, dtype=torch.int64), generator)
        visited.append(mean.item())
    assert sum(visited[-40:]) / 40 == pytest.approx(3.0, abs=0.1)
    assert max(visited) < 3.5


@pytest.mark.parametrize("micro_batch", [1, 7])
@pytest.mark.parametrize("objective", ["importance_sampling", "score_function"])
def test_micro_batches_do_not_change_the_update(objective: str, micro_batch: int) -> None:
    """The same gradients and weights to 1e-6, also where the last micro-batch is a part of one."""
    outcomes = []
    for size in (micro_batch, 64):
        torch.manual_seed(0)
        policy = LinearPolicy()
        old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
        updates = 1 if objective == "score_function" else 4
        training = settings(objective, timestep_fraction=0.5, learning_rate=1e-2, updates_per_step=updates)
        learn(policy, old, advantage, training, micro_batch=size)
        outcomes.append(torch.stack([value for p in policy.parameters for value in (p.detach(), p.grad)]))  # type: ignore[misc]
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-6)
    assert (outcomes[0][0] - 0.3).abs() > 1e-4


@pytest.mark.parametrize("offset", [1e-3, -1e-3, math.nan])
def test_a_policy_that_does_not_reproduce_its_images_is_refused(offset: float) -> None:
    policy = LinearPolicy()
    old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
    old[17, 4] += offset
    with pytest.raises(RatioError, match="denoising step 4"):
        learn(policy, old, advantage, settings())
    assert policy.intercept.item() == 0.3
    assert policy.slope.item() == -0.2


def test_only_the_first_update_must_reproduce_the_images() -> None:
    policy = LinearPolicy()
    old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
    learner = PolicyLearner(policy.parameters, settings(updates_per_step=4, learning_rate=0.1), 64)
    statistics = step(learner, policy.log_prob, old, advantage, torch.arange(STEPS), torch.Generator())
    assert statistics.first_update_error == {step: pytest.approx(0, abs=1e-12) for step in range(STEPS)}
    assert statistics.ratio_max > 1.01


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 3), (0.25, 2), (0.01, 1), (1.0, 6)])
def test_every_image_learns_from_its_own_share_of_steps(fraction: float, expected: int) -> None:
    """Each image gets exactly its share of stochastic steps, without repetition, and no step is forgotten."""
    policy, seen = LinearPolicy(), Counter[tuple[int, int]]()
    stochastic = torch.tensor([0, 1, 2, 3, 5, 7])

    def log_prob(images: Tensor, steps: Tensor) -> Tensor:
        seen.update(zip(images.tolist(), steps.tolist(), strict=True))
        return policy.intercept * torch.zeros(len(images))

    old, advantage, training = torch.zeros(IMAGES, 8), torch.randn(IMAGES), settings(timestep_fraction=fraction)
    learn(policy, old, advantage, training, log_prob, micro_batch=7, steps=stochastic)
    assert set(seen.values()) == {1}
    assert Counter(image for image, _ in seen) == dict.fromkeys(range(IMAGES), expected)
    assert {step for _, step in seen} == set(stochastic.tolist())


def test_updates_share_the_images() -> None:
    policy, calls = LinearPolicy(), []

    def log_prob(images: Tensor, steps: Tensor) -> Tensor:
        calls.append(sorted(set(images.tolist())))
        return policy.intercept * torch.zeros(len(images))

    training = settings(updates_per_step=4, inner_epochs=2)
    learn(policy, torch.zeros(IMAGES, STEPS), torch.randn(IMAGES), training, log_prob, micro_batch=10_000)
    assert [len(images) for images in calls] == [IMAGES // 4] * 8
    for epoch in (calls[:4], calls[4:]):
        assert sorted(image for images in epoch for image in images) == list(range(IMAGES))
    assert calls[:4] != calls[4:]


def test_the_generator_decides_everything_random() -> None:
    outcomes: list[list[float]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        policy = LinearPolicy()
        old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
        torch.manual_seed(len(outcomes))  # the global generator must have no say
        learn(policy, old, advantage, settings(updates_per_step=4, timestep_fraction=0.5), seed=seed)
        outcomes.append([parameter.item() for parameter in policy.parameters])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    policy = LinearPolicy()

    def log_prob(images: Tensor, steps: Tensor) -> Tensor:
        return torch.sqrt(policy.intercept * torch.zeros(len(images)))  # finite, but its derivative is 0 · ∞

    with pytest.raises(DegenerateBatch, match="gradient's norm is nan"):
        learn(policy, torch.zeros(IMAGES, STEPS), torch.ones(IMAGES), settings(), log_prob)
    assert policy.intercept.item() == 0.3


def test_gradients_are_clipped_to_the_norm() -> None:
    policy = LinearPolicy()
    old, advantage = policy.draw(), 100 * torch.randn(IMAGES, dtype=torch.float64)
    learner = PolicyLearner(policy.parameters, settings(max_gradient_norm=0.01), 64)
    statistics = step(learner, policy.log_prob, old, advantage, torch.arange(STEPS), torch.Generator())
    assert statistics.gradient_norm > 1  # the norm before clipping is what is reported
    assert math.hypot(*(float(p.grad) for p in policy.parameters)) == pytest.approx(0.01, rel=1e-3)  # type: ignore[arg-type]


def test_an_update_without_a_finite_gradient_may_be_left_out() -> None:
    policy = LinearPolicy()
    spoiled = iter([True, False])

    def log_prob(images: Tensor, steps: Tensor) -> Tensor:
        good = policy.log_prob(images, steps)
        return good + torch.sqrt(policy.intercept * torch.zeros(len(images))) if next(spoiled) else good

    old, advantage = policy.draw(), torch.randn(IMAGES, dtype=torch.float64)
    learner = PolicyLearner(policy.parameters, settings(updates_per_step=2, on_sick_numbers="skip"), IMAGES * STEPS)
    statistics = step(learner, log_prob, old, advantage, torch.arange(STEPS), torch.Generator().manual_seed(0))
    assert statistics.skipped_updates == 1
    assert policy.intercept.item() != 0.3  # the other one was made
    assert math.isfinite(policy.intercept.item())


@pytest.mark.parametrize("fitting", [1, 5, 20])
def test_micro_batches_are_halved_until_they_fit_into_memory(fitting: int) -> None:
    """The gradient is that of a learner that knew from the beginning."""
    outcomes, used = [], []
    for first in (64, fitting):
        torch.manual_seed(0)
        policy = LinearPolicy()

        def log_prob(images: Tensor, steps: Tensor, policy: LinearPolicy = policy) -> Tensor:
            if len(images) > fitting:
                raise torch.OutOfMemoryError
            return policy.log_prob(images, steps)

        old, advantage = policy.draw(), torch.linspace(-1, 1, IMAGES, dtype=torch.float64)
        learner = PolicyLearner(policy.parameters, settings(updates_per_step=2), first)
        statistics = step(learner, log_prob, old, advantage, torch.arange(STEPS), torch.Generator().manual_seed(0))
        outcomes.append([parameter.item() for parameter in policy.parameters])
        used.append(statistics.micro_batch)
        assert statistics.ratio_mean == pytest.approx(1, abs=0.1)
    assert used[0] <= fitting < 2 * used[0] + 1
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-12)


def test_a_transition_that_does_not_fit_into_memory_is_an_error() -> None:
    def log_prob(images: Tensor, steps: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    policy = LinearPolicy()
    with pytest.raises(torch.OutOfMemoryError):
        learn(policy, policy.draw(), torch.ones(IMAGES), settings(), log_prob)
