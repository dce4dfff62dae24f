"""Every objective on a flow whose network has one parameter, so that what it should do is known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.diffusion.flow import FlowSchedule
from policies.rl.objectives import ALGORITHMS
from policies.rl.rollouts import Rollouts
from policies.rl.settings import TrainingSettings
from policies.rl.update import PolicyLearner

IMAGES, STEPS, DEVIATION, GOAL = 192, 10, 0.5, 1.0
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
SCHEDULE = FlowSchedule(1000 * TIMES[:-1], TIMES, eta=0.7)


def settings(objective: str | dict[str, float], **keys: Any) -> TrainingSettings:
    defaults = {"images_per_step": IMAGES, "updates_per_step": 1, "max_gradient_norm": 1e9}
    return TrainingSettings(objective=objective, **{**defaults, "clip_range": 0.2, **keys})  # type: ignore[arg-type]


class NormalModel:
    """The velocity of data N(m, s²): a perfect network for its own samples, whatever m it has learned."""

    def __init__(self, mean: float = 0.0) -> None:
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def __call__(self, latents: Tensor, steps: Tensor, images: Tensor, mean: Tensor | None = None) -> Tensor:
        m, t = self.mean if mean is None else mean, TIMES[steps].view(-1, 1, 1, 1)
        centred, variance = latents - (1 - t) * m, (1 - t) ** 2 * DEVIATION**2 + t**2
        return centred * (t - (1 - t) * DEVIATION**2) / variance - m

    @torch.no_grad()
    def rollouts(self, advantage: Callable[[Tensor], Tensor], seed: int = 0) -> Rollouts:
        """Images of one pixel, drawn by this model."""
        x, everyone = torch.randn(IMAGES, 1, 1, 1, dtype=torch.float64), torch.arange(IMAGES)
        path, densities = [x], []
        for step in range(STEPS):
            index = torch.full((IMAGES,), step)
            output = self(x, index, everyone)
            following = SCHEDULE.mean(x, output, index) + SCHEDULE.sigma[step] * torch.randn_like(x)
            densities.append(SCHEDULE.log_prob(x, following, output, index) if step < STEPS - 1 else 0 * x.flatten())
            path.append(x := following)
        drawn_by = self.mean.detach().clone()
        tables = SCHEDULE, torch.stack(path, dim=1), torch.stack(densities, dim=1), advantage(x.flatten())
        return Rollouts(*tables, self, self.frozen(torch.zeros_like(drawn_by)), self.frozen(drawn_by), seed)

    def frozen(self, mean: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda latents, steps, images: self(latents, steps, images, mean).detach()


def near_the_goal(x: Tensor) -> Tensor:
    reward = -((x - GOAL) ** 2)
    return (reward - reward.mean()) / reward.std()


def everything() -> tuple[Tensor, Tensor]:
    return torch.arange(IMAGES).repeat_interleave(STEPS - 1), torch.arange(STEPS - 1).repeat(IMAGES)


@pytest.mark.parametrize("objective", sorted(ALGORITHMS.built_in))
def test_every_objective_moves_the_model_to_the_reward(objective: str) -> None:
    model, training = NormalModel(), settings(objective, learning_rate=0.1)
    learner = PolicyLearner([model.mean], training, micro_batch=4096)
    steps = torch.tensor(training.learnable_steps(STEPS, range(STEPS - 1)))
    visited = []
    for number in range(36):
        rollouts = model.rollouts(near_the_goal, seed=number)
        generator = torch.Generator().manual_seed(number)
        learner.learn(ALGORITHMS.find(objective).objective(rollouts, training), IMAGES, steps, generator)
        visited.append(model.mean.item())
    assert sum(visited[-12:]) / 12 == pytest.approx(GOAL, abs=0.15)
    assert visited[0] < 0.15


def test_the_ratio_is_one_before_anything_is_learned() -> None:
    model = NormalModel(0.3)
    loss, difference = ALGORITHMS.find("importance_sampling").objective(
        model.rollouts(near_the_goal), settings("importance_sampling")
    )(*everything())
    assert difference is not None
    assert difference.abs().max() < 1e-9
    assert loss.shape == (IMAGES * (STEPS - 1),)


def gradient(model: NormalModel, rollouts: Rollouts, training: TrainingSettings) -> float:
    loss, _ = training.algorithm.objective(rollouts, training)(*everything())
    return torch.autograd.grad(loss.mean(), [model.mean])[0].item()


def test_reward_weights_are_exponential_and_have_mean_one() -> None:
    model = NormalModel()
    rollouts = model.rollouts(near_the_goal)
    images, steps = everything()
    clean, noise, mixed = rollouts.noised(images, steps)
    error = ((model(mixed, steps, images) - (noise - clean)) ** 2).flatten()
    weight = torch.softmax(2.0 * rollouts.advantage, dim=0) * IMAGES
    (expected,) = torch.autograd.grad((weight[images] * error).mean(), [model.mean])
    found = gradient(model, rollouts, settings({"reward_weighted": 2.0}))
    assert found == pytest.approx(expected.item(), rel=1e-9)
    assert abs(found) > 1e-3


def test_noise_follows_from_seed_image_and_step() -> None:
    rollouts = NormalModel().rollouts(near_the_goal)
    images, steps = torch.tensor([3, 9, 3]), torch.tensor([1, 1, 4])
    _, together, _ = rollouts.noised(images, steps)
    _, alone, _ = rollouts.noised(images[2:], steps[2:])
    assert torch.equal(together[2:], alone)
    assert len({round(value, 9) for value in together.flatten().tolist()}) == 3
    assert not torch.equal(replace(rollouts, seed=1).noised(images, steps)[1], together)


@pytest.mark.parametrize("objective", ["reward_weighted", "negative_aware"])
def test_every_pass_over_the_images_has_noise_of_its_own(objective: str) -> None:
    def noises(epochs: int) -> list[Tensor]:
        model, training, seen = NormalModel(), settings(objective, inner_epochs=epochs), list[Tensor]()
        learner = PolicyLearner([model.mean], training, micro_batch=4096)
        rollouts = replace(model.rollouts(near_the_goal), epoch=lambda: learner.epoch)

        def network(latents: Tensor, steps: Tensor, images: Tensor) -> Tensor:
            order = torch.argsort(images * STEPS + steps)
            seen.append((latents - rollouts.schedule.diffuse(rollouts.latents[images, -1], 0 * latents, steps))[order])
            return model(latents, steps, images)

        told = ALGORITHMS.find(objective).objective(replace(rollouts, network=network), training)
        learner.learn(told, IMAGES, torch.arange(1, STEPS - 1), torch.Generator().manual_seed(0))
        return seen

    torch.manual_seed(3)
    first, second, third = noises(3)
    torch.manual_seed(3)
    assert torch.equal(noises(1)[0], first)  # one pass is what it was
    distance = (first - second).abs().mean()
    assert distance > 0.5 * first.abs().mean()
    assert not torch.equal(second, third)


@pytest.mark.parametrize(("advantage", "share"), [(1.0, 1.0), (5.0, 1.0), (0.0, 0.0), (-1.0, -1.0), (0.5, 0.5)])
def test_negative_aware_pulls_and_pushes_by_its_optimality(advantage: float, share: float) -> None:
    """At θ_old both branches err alike, so the gradient is (2r − 1) times that of r = 1."""
    model = NormalModel(0.4)
    rollouts = model.rollouts(lambda x: torch.ones_like(x))
    rollouts = replace(rollouts, latents=rollouts.latents + 0.3)  # data that the model has not learned yet
    training = settings({"negative_aware": 0.7})
    full = gradient(model, rollouts, training)
    found = gradient(model, replace(rollouts, advantage=torch.full((IMAGES,), advantage)), training)
    assert abs(full) > 1e-2
    assert found == pytest.approx(share * full, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objective", ["importance_sampling", "score_function"])
def test_the_divergence_pulls_back_to_the_first_model(objective: str) -> None:
    """Without advantages it alone remains: no force at the reference, and one towards it elsewhere."""
    training = settings(objective, kl_weight=2.0, ratio_tolerance=1.0)
    for mean, sign in ((0.0, 0), (0.5, 1), (-0.5, -1)):
        model = NormalModel(mean)
        found = gradient(model, model.rollouts(torch.zeros_like), training)
        assert found == pytest.approx(0, abs=1e-12) if sign == 0 else found * sign > 1e-2
        assert gradient(model, model.rollouts(torch.zeros_like), settings(objective)) == pytest.approx(0, abs=1e-12)


def test_the_divergence_weighs_as_much_as_it_says() -> None:
    model = NormalModel(0.5)
    rollouts = model.rollouts(torch.zeros_like)
    images, steps = everything()
    before = rollouts.latents[images, steps]
    apart = SCHEDULE.divergence(before, model(before, steps, images), rollouts.reference(before, steps, images), steps)
    loss, _ = ALGORITHMS.find("importance_sampling").objective(
        rollouts, settings("importance_sampling", kl_weight=3.0)
    )(images, steps)
    torch.testing.assert_close(loss, 3.0 * apart)
    assert apart.min() > 0


@pytest.mark.parametrize(
    ("window", "objective", "expected"),
    [
        ((0.0, 1.0), "importance_sampling", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((0.0, 1.0), "negative_aware", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((0.0, 0.5), "importance_sampling", [0, 1, 2, 3, 4]),
        ((0.5, 1.0), "score_function", [5, 6, 7, 8]),
        ((0.5, 1.0), "reward_weighted", [5, 6, 7, 8, 9]),
    ],
)
def test_a_window_is_what_may_be_learned_from(window: tuple[float, float], objective: str, expected: list[int]) -> None:
    training = settings(objective, timestep_window=window)
    assert training.learnable_steps(10, range(9)) == expected
