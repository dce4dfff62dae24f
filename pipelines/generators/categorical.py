"""The categorical family: fitted by its frequencies. Its loop is the Wright–Fisher model of genetic drift.

A sampling bias λ sharpens: it draws with probabilities ∝ p^(1/λ).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import Field

from pipelines.generators import ClosedForm, Seeds
from policies.common.seeding import streams
from policies.loops.laws import Laws
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.rl.settings import Settings


class CategoricalSettings(Settings):
    """A categorical distribution fitted by its frequencies; the truth is uniform."""

    categories: int = Field(10, ge=2, le=1_000_000, description="categorical: how many")


@dataclass(frozen=True)
class CategoricalGenerator(ClosedForm):
    """``probabilities`` (universes, categories) float64. Samples are category numbers, values (universes, n)."""

    names = ("categorical",)
    schema = CategoricalSettings
    flat = many_universes = True
    metrics = ("total_variation", "heterozygosity", "entropy", "categories_left")

    probabilities: np.ndarray

    @classmethod
    def truth(cls, settings: CategoricalSettings, seeds: Seeds, start: int, count: int) -> Samples:
        """``count`` real samples a universe, from the ``start``-th on, uniform over the categories."""
        real = streams(seeds, "real", start)
        return Samples(np.stack([stream.integers(0, settings.categories, count) for stream in real]))

    @classmethod
    def fit(
        cls, settings: CategoricalSettings, data: Samples, seeds: Seeds, start: Any = None, device: str = "cpu"
    ) -> Self:
        """The (weighted) frequency of each category; nothing else changes it."""
        universes, count = data.values.shape
        weights = np.ones(count) if data.weights is None else data.weights
        cell, cells = data.values + settings.categories * np.arange(universes)[:, None], universes * settings.categories
        totals = np.bincount(cell.ravel(), np.broadcast_to(weights, cell.shape).ravel(), minlength=cells)
        return cls(totals.reshape(universes, -1) / weights.sum())

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """Draw from p^(1/λ), normalised, by inverting the cumulative distribution."""
        with np.errstate(divide="ignore", over="ignore"):
            logs = np.log(self.probabilities)
            sharpened = np.exp((logs - logs.max(axis=1, keepdims=True)) / bias)  # 1 for the likeliest, however small λ
        edges = np.cumsum(sharpened, axis=1)
        uniform = [np.random.default_rng(seed).random(count) for seed in seeds]
        draws = [np.searchsorted(edge, u * edge[-1], side="right") for edge, u in zip(edges, uniform, strict=True)]
        last = np.argmax(edges, axis=1)[:, None]  # a number just below 1 is rounded to beyond it
        return Samples(np.minimum(np.stack(draws), last))

    @classmethod
    def numbers(cls, settings: CategoricalSettings, size: int, image: int = 1) -> int:
        """Samples, or frequencies."""
        return max(size, settings.categories)

    @classmethod
    def laws(cls, settings: CategoricalSettings, loop: Rule, generations: int) -> Laws:
        """Genetic drift."""
        return loop.categorical_law(generations, [1 / settings.categories] * settings.categories)

    def measure(self) -> dict[str, np.ndarray]:
        """Distance to the truth, heterozygosity 1 − Σp², entropy in nats, categories left; each (universes,)."""
        p = self.probabilities
        return {
            "total_variation": np.abs(p - 1 / p.shape[1]).sum(axis=1) / 2,
            "heterozygosity": 1 - np.sum(p**2, axis=1),
            "entropy": -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1),
            "categories_left": np.count_nonzero(p, axis=1).astype(np.float64),
        }
