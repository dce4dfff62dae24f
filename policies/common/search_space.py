"""Search spaces: which values a setting may take, and the points a sweep tries. Points are plain ``{key: value}``.

A dimension is a list of values, or one of ``{uniform: [low, high]}``, ``{log_uniform: [low, high]}`` and
``{integers: [low, high]}`` (both ends included).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

Point = dict[str, Any]
Kind = Literal["values", "uniform", "log_uniform", "integers"]
MOST_POINTS = 10_000
FRESH_SEEDS = 1000  # seeds from here on take no part in a search
_RANGES: dict[str, Callable[[np.random.Generator, Any, Any], Any]] = {
    "uniform": lambda random, low, high: float(random.uniform(low, high)),
    "log_uniform": lambda random, low, high: float(np.exp(random.uniform(np.log(low), np.log(high)))),
    "integers": lambda random, low, high: int(random.integers(low, high + 1)),
}


@dataclass(frozen=True)
class Dimension:
    """The values one setting may take: a list of them, or the two ends of a range."""

    kind: Kind
    values: tuple[Any, ...]

    @classmethod
    def read(cls, key: str, content: Any) -> "Dimension":
        """The dimension that a configuration describes. Raises ValueError naming ``key``."""
        if isinstance(content, list | tuple):
            if not content:
                raise ValueError(f"space.{key} is an empty list: give the values to try")
            return cls("values", tuple(json.loads(json.dumps(content))))  # lists in lists, as records keep them
        if not isinstance(content, Mapping) or len(content) != 1 or next(iter(content)) not in _RANGES:
            raise ValueError(f"space.{key} is neither a list of values nor one of {', '.join(_RANGES)}: [low, high]")
        kind, ends = next(iter(content.items()))
        numbers = isinstance(ends, list | tuple) and all(type(end) in (int, float) for end in ends)
        if not numbers or len(ends) != 2 or not ends[0] < ends[1]:
            raise ValueError(f"space.{key}.{kind} is {ends!r}: give two numbers, the lower first")
        if kind == "log_uniform" and ends[0] <= 0:
            raise ValueError(f"space.{key}.log_uniform starts at {ends[0]}: a logarithm needs more than 0")
        if kind == "integers" and not all(isinstance(end, int) for end in ends):
            raise ValueError(f"space.{key}.integers is {list(ends)}: give whole numbers")
        try:
            _RANGES[kind](np.random.default_rng(0), *ends)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"space.{key}.{kind} is {list(ends)}, too wide to draw from: {error}") from error
        return cls(kind, tuple(ends))

    def draw(self, random: np.random.Generator) -> Any:
        """One value, as plain Python."""
        if self.kind == "values":
            return self.values[int(random.integers(len(self.values)))]
        return _RANGES[self.kind](random, *self.values)

    def clipped(self, value: Any) -> Any:
        """``value``, or the nearer end of the range if it lies outside."""
        return value if self.kind == "values" else min(max(value, self.values[0]), self.values[1])


@dataclass(frozen=True)
class PointResult:
    """A point over its seeds: their mean on the metric's scale and its 95 % interval, nan where it has none."""

    point: Point
    complete: bool  # every seed has finished, with a value
    values: list[float]
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


def read_space(content: Mapping[str, Any]) -> dict[str, Dimension]:
    """Every dimension of a space. Raises ValueError if one cannot be read, or there is none."""
    if not content:
        raise ValueError("space is empty: name at least one key and its values")
    return {key: Dimension.read(key, values) for key, values in content.items()}


def grid_points(space: Mapping[str, Dimension]) -> list[Point]:
    """Every combination of the listed values. Raises ValueError for a range."""
    for key, dimension in space.items():
        if dimension.kind != "values":
            raise ValueError(f"space.{key} is a range, and a grid takes lists: list its values, or set search=random")
    count = math.prod(len(dimension.values) for dimension in space.values())
    if count > MOST_POINTS:
        raise ValueError(f"space: the grid has {count:,} points, {MOST_POINTS:,} at most; shorten it or draw from it")
    combinations = product(*(dimension.values for dimension in space.values()))
    return [dict(zip(space, values, strict=True)) for values in combinations]


def random_points(space: Mapping[str, Dimension], count: int, seed: int) -> list[Point]:
    """``count`` independent draws. The first of them do not depend on how many are asked for."""
    random = np.random.default_rng(seed)
    return [{key: dimension.draw(random) for key, dimension in space.items()} for _ in range(count)]


def corner_points(space: Mapping[str, Dimension]) -> list[Point]:
    """Every listed value and both ends of every range, each with the others at their first."""
    first = {key: dimension.values[0] for key, dimension in space.items()}
    return [{**first, key: value} for key, dimension in space.items() for value in dimension.values]


def short(value: Any) -> str:
    """A value of a point, for people."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:28]}…{text[-11:]}"


def exact(value: Any) -> str:
    """A point, or a value of one, as text that is no other's: 1, 1.0 and true are three values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def common_points(points: Sequence[Point]) -> list[Point]:
    """The different points, in the order they first appear."""
    return list({exact(point): point for point in points}.values())
