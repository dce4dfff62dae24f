"""Points of a sweep: complete grids, draws that lie where they should, and errors that name the key."""

from typing import Any

import numpy as np
import pytest

from policies.common.search_space import (
    Dimension,
    common_points,
    corner_points,
    exact,
    grid_points,
    random_points,
    read_space,
)


def test_a_grid_is_every_combination_once() -> None:
    points = grid_points(read_space({"a": [1, 2, 3], "b.c": ["x", "y"]}))
    assert len(points) == 6
    assert {(point["a"], point["b.c"]) for point in points} == {(a, b) for a in (1, 2, 3) for b in "xy"}


def test_a_grid_refuses_a_range() -> None:
    with pytest.raises(ValueError, match=r"space\.rate is a range.*search=random"):
        grid_points(read_space({"a": [1], "rate": {"uniform": [0, 1]}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "empty list"),
        ({"between": [1, 2]}, "neither a list"),
        ({"uniform": [1, 2], "integers": [1, 2]}, "neither a list"),
        ({"uniform": [2, 1]}, "the lower first"),
        ({"uniform": [1]}, "two numbers"),
        ({"uniform": ["a", "b"]}, "two numbers"),
        ({"log_uniform": [0, 1]}, "more than 0"),
        ({"integers": [0.5, 2]}, "whole numbers"),
        (3, "neither a list"),
        ({"uniform": [False, True]}, "two numbers"),
        ({"integers": [0, 2**64]}, "too wide to draw from"),
        ({"uniform": [-1.7e308, 1.7e308]}, "too wide to draw from"),
    ],
)
def test_a_dimension_that_cannot_be_read_is_named(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"space\.lr.*{message}"):
        Dimension.read("lr", content)


def test_a_grid_that_nobody_can_wait_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the grid has 10,000,000,000 points, 10,000 at most"):
        grid_points(read_space({f"key{number}": [*range(10)] for number in range(10)}))


def test_equal_numbers_of_other_kinds_are_other_points() -> None:
    points = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": 1}, {"a": [1, 2]}, {"a": [1, 2]}]
    assert [exact(point) for point in common_points(points)] == [
        '{"a": 1}',
        '{"a": 1.0}',
        '{"a": true}',
        '{"a": [1, 2]}',
    ]


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ValueError, match="space is empty"):
        read_space({})


def test_draws_follow_their_distributions() -> None:
    space = read_space(
        {"u": {"uniform": [2.0, 4.0]}, "l": {"log_uniform": [1e-5, 1e-1]}, "i": {"integers": [1, 3]}, "v": ["a", "b"]}
    )
    points = random_points(space, 4000, seed=0)
    uniform, exponents = np.array([p["u"] for p in points]), np.log10([p["l"] for p in points])
    assert uniform.min() >= 2
    assert uniform.max() <= 4
    assert abs(uniform.mean() - 3) < 4 * (2 / np.sqrt(12)) / np.sqrt(4000)
    assert exponents.min() >= -5
    assert exponents.max() <= -1
    assert abs(exponents.mean() + 3) < 4 * (4 / np.sqrt(12)) / np.sqrt(4000)
    shares = np.bincount([p["i"] for p in points], minlength=4) / 4000
    assert shares[0] == 0
    assert np.abs(shares[1:] - 1 / 3).max() < 0.04
    assert abs(np.mean([p["v"] == "a" for p in points]) - 0.5) < 0.04


def test_more_points_begin_with_the_same() -> None:
    space = read_space({"l": {"log_uniform": [1e-5, 1e-1]}, "v": ["a", "b", "c"]})
    assert random_points(space, 9, seed=3)[:4] == random_points(space, 4, seed=3)
    assert random_points(space, 4, seed=3) != random_points(space, 4, seed=4)


def test_corners_show_every_end_and_value() -> None:
    points = corner_points(read_space({"l": {"log_uniform": [0.1, 1.0]}, "v": ["a", "b"]}))
    assert points == [{"l": 0.1, "v": "a"}, {"l": 1.0, "v": "a"}, {"l": 0.1, "v": "a"}, {"l": 0.1, "v": "b"}]
    assert len(common_points(points)) == 3


def test_a_value_beyond_a_range_is_brought_to_its_end() -> None:
    ranged, listed = Dimension.read("r", {"uniform": [0.5, 2.0]}), Dimension.read("v", [1, 2])
    assert [ranged.clipped(value) for value in (0.1, 1.0, 3.0)] == [0.5, 1.0, 2.0]
    assert listed.clipped(7) == 7
