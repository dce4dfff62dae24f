"""Best weights and over-optimisation, from what evaluations said."""

import numpy as np
import pytest

from policies.rl.over_optimisation import EvaluationPoint as Point
from policies.rl.over_optimisation import best_point, is_lower, over_optimised, point_to_keep


def points(*curve: tuple[int, float, float], size: int = 200, flips: float = 0.1) -> list[Point]:
    """Evaluations (step, accuracy, reward) of ``size`` images, of which ``flips`` change by chance each time."""
    rng = np.random.default_rng(0)
    difficulty, found = rng.random(size), []
    for step, accuracy, reward in curve:
        drawn = np.where(rng.random(size) < flips, rng.random(size), difficulty)
        found.append(Point(step, (drawn < accuracy).astype(float), reward))
    return found


def test_the_best_is_the_highest_and_of_equals_the_earliest() -> None:
    right = np.array([1.0, 1.0, 0.0, 1.0])
    assert best_point([]) is None
    best = best_point([Point(0, right[:2] * 0, 0), Point(5, right, 1), Point(10, right[::-1], 2)])
    assert best is not None
    assert best.step == 5


def test_the_last_is_kept_unless_the_best_was_better_by_more_than_chance() -> None:
    assert point_to_keep([]) is None
    kept = [
        point_to_keep(points((0, 0.5, 0.8), (10, best, 0.9), (20, last, 0.95)))
        for best, last in ((0.9, 0.5), (0.9, 0.89))
    ]
    assert [point and point.step for point in kept] == [10, 20]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_reward_that_rises_as_the_measure_falls_is_over_optimised(patience: int) -> None:
    run = points((0, 0.5, 0.8), (10, 0.9, 0.9), (20, 0.7, 0.95), (30, 0.6, 0.96), (40, 0.5, 0.97))
    for known in range(1, 6):
        reason = over_optimised(run[:known], patience)
        assert (reason is not None) == (known >= 2 + patience)
    assert reason is not None
    assert reason.startswith("over-optimisation: the held-out measure fell from")
    assert "after step 10" in reason
    assert over_optimised(run, 0) is None


def test_a_reward_that_falls_too_is_a_collapse() -> None:
    run = points((0, 0.5, 0.8), (10, 0.9, 0.9), (20, 0.6, 0.7), (30, 0.3, 0.5))
    reason = over_optimised(run, 2)
    assert reason is not None
    assert reason.startswith("collapse")


def test_a_dip_is_forgiven_and_a_new_best_begins_anew() -> None:
    dip = points((0, 0.5, 0.8), (10, 0.8, 0.9), (20, 0.6, 0.91), (30, 0.9, 0.95), (40, 0.7, 0.97))
    assert all(over_optimised(dip[:known], 2) is None for known in range(6))


def test_chance_alone_is_no_fall() -> None:
    """Of runs that stay as good as they were, hardly any is stopped; a fall by a tenth is seen in nearly all."""
    rng, stopped, seen = np.random.default_rng(1), 0, 0
    for _ in range(200):
        same = [Point(step, (rng.random(180) < 0.9).astype(float), 1.0) for step in range(0, 80, 10)]
        worse = [
            Point(step, (rng.random(180) < level).astype(float), 1.0)
            for step, level in ((0, 0.9), (10, 0.78), (20, 0.78))
        ]
        stopped += any(over_optimised(same[:known], 2) is not None for known in range(9))
        seen += over_optimised(worse, 2) is not None
    assert stopped <= 20
    assert seen >= 140


def test_looks_of_different_sizes_are_compared_on_what_both_have() -> None:
    long, short = (
        Point(10, np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 1),
        Point(20, np.array([1.0, 1.0, 1.0]), 1),
    )
    assert not is_lower(short, long)
    assert not is_lower(long, short)
