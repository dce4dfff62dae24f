"""The Gaussian family: closed form, thousands of universes at once, and an exact theory (policies/loops/laws).

The truth is N(0, I). A sampling bias λ draws with covariance λΣ (Alemohammad et al. 2307.01850, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pipelines.generators import Arrays, Samples
from pipelines.generators.settings import GaussianSettings
from policies.common.seeding import derive_seed
from policies.loops.effective_samples import wasserstein_squared


@dataclass(frozen=True)
class GaussianGenerator(Arrays):
    """``mean`` (universes, d) and ``covariance`` (universes, d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def truth(settings: GaussianSettings, seeds: Sequence[int], start: int, count: int) -> Samples:
        """``count`` real samples a universe, from the ``start``-th on, of N(0, I)."""
        streams = [np.random.default_rng(derive_seed(seed, "real", start)) for seed in seeds]
        return Samples(np.stack([stream.standard_normal((count, settings.dimension)) for stream in streams]))

    @classmethod
    def fit(cls, settings: GaussianSettings, data: Samples, seeds: Sequence[int], **_: Any) -> Self:
        """Mean and covariance of the data. A closed form has one optimum: nothing else changes it."""
        universes, count, dimension = data.values.shape
        weights = np.full(count, 1 / count) if data.weights is None else data.weights / data.weights.sum()
        mean = np.einsum("n,und->ud", weights, data.values)
        at = mean if data.origin is None else data.origin + mean
        if settings.covariance == "known":
            return cls(at, np.tile(np.eye(dimension), (universes, 1, 1)))
        scaled = (data.values - mean[:, None]) * np.sqrt(weights)[:, None]
        covariance = np.swapaxes(scaled, 1, 2) @ scaled
        if settings.covariance == "unbiased":
            covariance /= 1 - np.sum(weights**2)  # for equal weights: N / (N − 1)
        return cls(at, covariance)

    def centred(self) -> tuple[Self, np.ndarray]:
        """The same spread around 0, and the mean (universes, d) that it was around."""
        return replace(self, mean=np.zeros_like(self.mean)), self.mean

    def sample(self, count: int, seeds: Sequence[int], bias: float) -> Samples:
        """Draw from N(μ, λΣ)."""
        noise = np.stack([np.random.default_rng(seed).standard_normal((count, self.mean.shape[1])) for seed in seeds])
        values = noise @ np.swapaxes(_square_root(bias * self.covariance), 1, 2)
        return Samples(values + self.mean[:, None])

    def measure(self) -> dict[str, np.ndarray]:
        """Distance to the truth and what the exact laws speak of; each (universes,). A singular Σ has no log det."""
        dimension = self.mean.shape[1]
        eigenvalues = np.linalg.eigvalsh(self.covariance)
        singular = eigenvalues[:, 0] <= dimension * np.finfo(np.float64).eps * eigenvalues[:, -1]
        return {
            "w2_squared": wasserstein_squared(self.mean, self.covariance, eigenvalues),
            "variance": np.trace(self.covariance, axis1=1, axis2=2) / dimension,
            "mean_square": np.mean(self.mean**2, axis=1),
            "log_det": np.where(singular, np.nan, np.log(np.where(eigenvalues > 0, eigenvalues, 1)).sum(axis=1)),
        }


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = Σ, for each universe on its own, so that one singular matrix changes no other universe's draws."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        if len(covariance) > 1:
            return np.concatenate([_square_root(each[None]) for each in covariance])
        values, vectors = np.linalg.eigh(covariance)  # fewer samples than dimensions, or a variance that has vanished
        return vectors * np.sqrt(np.clip(values, 0, None))[:, None]
