"""Rewards become advantages prompt by prompt, over all images of a step."""

from math import isclose

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from policies.rl.advantages import PromptStatistics, advantages, weighted_sum
from policies.rl.health import DegenerateBatch
from policies.rl.settings import AdvantageSettings

PROMPTS = ["cat", "dog", "cat", "dog", "cat", "dog"]
REWARDS = np.array([1.0, 10.0, 2.0, 20.0, 6.0, 60.0])


def compute(
    rewards: np.ndarray, prompts: list[str], history: PromptStatistics | None = None, **keys: object
) -> np.ndarray:
    settings = AdvantageSettings(**keys)  # type: ignore[arg-type]
    history = history or PromptStatistics(settings.history_size)
    return advantages(rewards, prompts, settings, history)


def test_group_baseline_normalises_each_prompt_by_itself() -> None:
    result = compute(REWARDS, PROMPTS)
    cat = (np.array([1.0, 2.0, 6.0]) - 3) / np.sqrt(14 / 3)
    np.testing.assert_allclose(result[0::2], cat, atol=1e-5)
    np.testing.assert_allclose(result[1::2], cat, atol=1e-5)  # a scale of rewards has no effect
    assert result.dtype == np.float64


def test_order_of_images_does_not_matter() -> None:
    """Images arrive in whatever order samplers finish."""
    order = np.random.default_rng(0).permutation(len(REWARDS))
    shuffled = compute(REWARDS[order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(shuffled, compute(REWARDS, PROMPTS)[order], rtol=1e-12)


def test_batch_baseline_normalises_over_all_images() -> None:
    result = compute(REWARDS, PROMPTS, baseline="batch")
    np.testing.assert_allclose(result, (REWARDS - 16.5) / np.sqrt(np.mean((REWARDS - 16.5) ** 2)), atol=1e-5)


@pytest.mark.parametrize("baseline", ["group", {"history": 4}])
@given(size=st.integers(2, 33), value=st.floats(-1e12, 1e12), other=st.floats(-1e12, 1e12), steps=st.integers(1, 3))
def test_equal_rewards_of_a_prompt_teach_exactly_nothing(
    baseline: str, size: int, value: float, other: float, steps: int
) -> None:
    """However many they are: the mean of three times 0.1 is not 0.1 in floating point."""
    assume(not isclose(value, other))
    history = PromptStatistics(4)  # each step gives at least half as many
    for _ in range(steps):
        rewards = np.array([value] * size + [other] * size)
        found = compute(
            rewards,
            ["cat"] * size + ["dog"] * size,
            history,
            baseline=baseline,
        )
        assert not found.any()


@pytest.mark.parametrize("baseline", ["group", {"history": 4}])
def test_equal_sums_of_several_rewards_teach_exactly_nothing(baseline: object) -> None:
    """In whatever order they come to be the same: 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point."""
    scores = {"a": np.array([0.1, 0.3, 1, 1]), "b": np.array([0.2, 0.2, 1, 1]), "c": np.array([0.3, 0.1, 1, 1])}
    rewards = weighted_sum(scores, dict.fromkeys(scores, 1.0))
    assert rewards[0] != rewards[1]
    prompts = ["cat", "cat", "dog", "dog"]
    assert not compute(rewards, prompts, PromptStatistics(4), baseline=baseline).any()


def test_rewards_too_large_to_be_squared_are_sick() -> None:
    with pytest.raises(DegenerateBatch, match="scale the reward down"):
        compute(np.array([1e200, -1e200, 1, 2, 3, 4]), PROMPTS)


def test_a_reward_that_says_the_same_of_all_is_sick() -> None:
    with pytest.raises(DegenerateBatch, match=r"all 6 rewards are 0\.7"):
        compute(np.full(6, 0.7), PROMPTS)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, -2.0, 1.0)])
def test_sums_that_differ_by_rounding_alone_are_sick(weights: tuple[float, ...]) -> None:
    """Also where they cancel: of what is left of 0.1 − 2 · 0.2 + 0.3 every digit is rounding."""
    scores = {"a": np.array([0.1, 0.3] * 3), "b": np.full(6, 0.2), "c": np.array([0.3, 0.1] * 3)}
    terms = np.array([weight * scores[name] for name, weight in zip("abc", weights, strict=True)])
    assert len(set(terms.sum(axis=0))) == 2
    with pytest.raises(DegenerateBatch, match="all 6 rewards are"):
        compute(weighted_sum(scores, dict(zip("abc", weights, strict=True))), PROMPTS)


def test_advantages_are_clipped() -> None:
    rewards = np.array([0.0] * 99 + [1.0])
    unclipped = compute(rewards, ["cat"] * 100, clip=100.0)
    assert unclipped.max() > 9
    clipped = compute(rewards, ["cat"] * 100, clip=2.0)
    assert clipped.max() == 2
    np.testing.assert_array_equal(clipped[:99], unclipped[:99])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named_and_forgotten(bad: float) -> None:
    history = PromptStatistics(32)
    rewards = REWARDS.copy()
    rewards[3] = bad
    with pytest.raises(DegenerateBatch, match=r"image 3 \('dog'\)"):
        compute(rewards, PROMPTS, history)
    assert history.state() == {}


def test_history_baseline_falls_back_to_the_step_until_enough_is_known() -> None:
    history = PromptStatistics(size=8)
    keys = {"baseline": {"history": 8}}
    first = compute(REWARDS, PROMPTS, history, **keys)
    np.testing.assert_allclose(first, compute(REWARDS, PROMPTS, baseline="batch"))
    second = compute(np.array([4.0]), ["cat"], history, **keys)
    remembered = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(second, [(4 - remembered.mean()) / remembered.std()], atol=1e-5)


def test_history_forgets_the_oldest_and_keeps_fractions() -> None:
    history = PromptStatistics(size=3)
    history.update(["cat"], np.array([1]))  # an integer first must not make later rewards integers
    history.update(["cat"] * 3, np.array([0.25, 0.5, 0.75]))
    assert history.state() == {"cat": [0.25, 0.5, 0.75]}
    assert history.mean_and_std("cat") == pytest.approx((0.5, np.sqrt(1 / 24)))
    assert history.mean_and_std("dog") is None


def test_history_goes_on_after_a_restore() -> None:
    history = PromptStatistics(size=4)
    history.update(PROMPTS, REWARDS)
    resumed = PromptStatistics(size=4)
    resumed.restore(history.state())
    for statistics in (history, resumed):
        statistics.update(["cat", "cat", "bird"], np.array([7.0, 8.0, 9.0]))
    assert resumed.state() == history.state()
    assert resumed.state()["cat"] == [2.0, 6.0, 7.0, 8.0]
