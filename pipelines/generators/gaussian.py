"""The Gaussian family: closed form, thousands of universes at once, and an exact theory (policies/loops/laws).

The truth is N(0, I). A sampling bias λ draws with covariance λΣ (Alemohammad et al. 2307.01850, section 3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from pydantic import Field

from pipelines.generators import ClosedForm, Seeds
from policies.common.seeding import streams
from policies.loops.effective_samples import wasserstein_squared
from policies.loops.laws import Covariance, How, Laws, real_only
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.loops.training_sets import REAL, Manifest
from policies.rl.settings import Settings

MOST_DIMENSIONS = 500  # of simulations for n_e
MOST_BISECTED, MOST_BIAS = 50, 0.99  # dimensions and bias of those for the largest admissible n_s: minutes, not hours


class GaussianSettings(Settings):
    """A Gaussian fitted by its mean and covariance; the truth is N(0, I)."""

    dimension: int = Field(1, ge=1, description="gaussian: d")
    covariance: Covariance = Field(
        "unbiased", description="gaussian: divide by N − 1 or by N (mle), or fit the mean only (known)"
    )


@dataclass(frozen=True)
class GaussianGenerator(ClosedForm):
    """``mean`` (universes, d) and ``covariance`` (universes, d, d), float64."""

    names = ("gaussian",)
    schema = GaussianSettings
    flat = many_universes = extrapolates = True
    metrics = ("w2_squared", "variance", "mean_square", "log_det")

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def truth(cls, settings: GaussianSettings, seeds: Seeds, start: int, count: int) -> Samples:
        """``count`` real samples a universe, from the ``start``-th on, of N(0, I)."""
        real = streams(seeds, "real", start)
        return Samples(np.stack([stream.standard_normal((count, settings.dimension)) for stream in real]))

    @classmethod
    def fit(
        cls, settings: GaussianSettings, data: Samples, seeds: Seeds, start: Any = None, device: str = "cpu"
    ) -> Self:
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

    def fitted(self) -> dict[str, np.ndarray]:
        """Mean and covariance."""
        return dict(vars(self))

    def holding(self, weights: Mapping[str, Any]) -> Self:
        """Of any mean, and a covariance that is one."""
        least = float(np.linalg.eigvalsh(weights["covariance"]).min())
        if not least > 0:
            raise ValueError(
                f"a covariance with the eigenvalue {least:.3g} is none: choose a smaller weight, or more samples"
            )
        return replace(self, **weights)

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
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

    @classmethod
    def numbers(cls, settings: GaussianSettings, size: int, image: int = 1) -> int:
        """Samples, or a covariance."""
        return settings.dimension * max(size, settings.dimension)

    @classmethod
    def check_sets(cls, settings: GaussianSettings, loop: Rule, manifests: Sequence[Manifest]) -> None:
        """A variance has to be a number that can be held."""
        from scipy.special import digamma, polygamma

        if settings.covariance == "known" or loop.accumulates or loop.renews:
            return
        # Of each generation, the log variance: mean and variance over universes. Real samples set it anew.
        levels: dict[int, tuple[float, float]] = {}
        # A selection's samples are not counted from their mean, so that a spread far below it would be rounded away.
        least = math.log(1e-300 if loop.selection() is None else 1e-28)
        for manifest in manifests:
            number, size = manifest.generation, manifest.size
            levels[number] = 0.0, 0.0
            parts = {part.generation: part.size for part in manifest.parts}
            if REAL in parts:
                continue
            level, doubt = max((levels[g][0] + math.log(count / size), levels[g][1]) for g, count in parts.items())
            level += math.log(loop.sampling_bias) + digamma((size - 1) / 2) - math.log(size / 2)
            doubt += polygamma(1, (size - 1) / 2)
            levels[number] = level, doubt
            if level - 6 * math.sqrt(doubt) < least:
                raise ValueError(
                    f"generation {number}: its variance, about 1e{level / math.log(10):.0f}, is too small for a number "
                    "to hold: use fewer generations, more samples or a larger sampling_bias"
                )

    @classmethod
    def laws(cls, settings: GaussianSettings, loop: Rule, generations: int) -> Laws:
        """The loop's own; with one generation, that of real data."""
        if loop.real_weight != 1:
            return {}
        how: How = {"generations": generations, "sampling_bias": loop.sampling_bias, "covariance": settings.covariance}
        dimension = settings.dimension
        first = real_only(**how, n_ini=loop.initial(), dimension=dimension) if generations == 1 else None
        found = loop.gaussian_law(generations, dimension, how) if first is None else first
        if settings.covariance == "known" and found:  # nothing but the mean is away from the truth
            found |= {"w2_squared": dimension * found["mean_square"], "log_det": np.zeros(generations)}
        return found

    @classmethod
    def underivable(cls, settings: GaussianSettings, loop: Rule, generations: int, largest: bool) -> str | None:
        """New real samples, as many each time, and a simulation of minutes."""
        if not loop.effective or loop.supply == "fixed":
            return super().underivable(settings, loop, generations, largest)
        sizes = set(loop.later_sizes(generations))
        n_real = sizes.pop()[0] if len(sizes) == 1 else 0
        if n_real < 1:
            return "as many new real samples (1 or more) at every generation from 2 on"
        if settings.dimension > MOST_DIMENSIONS and settings.covariance != "known":
            return f"a dimension of {MOST_DIMENSIONS} at most, or covariance=known"
        simulated = loop.simulated and settings.covariance == "unbiased" and loop.real_weight == 1 and n_real > 1
        bisected = settings.dimension <= MOST_BISECTED and loop.sampling_bias <= MOST_BIAS
        if largest and not (simulated and (loop.sampling_bias == 1 or bisected)):
            least = "rule=fresh, covariance=unbiased, real_weight=1, n_real of 2 or more, and a dimension of "
            return least + f"{MOST_BISECTED} and a sampling_bias of {MOST_BIAS} at most (or 1: every n_s is admissible)"
        return None


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = Σ, for each universe on its own, so that one singular matrix changes no other universe's draws."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        if len(covariance) > 1:
            return np.concatenate([_square_root(each[None]) for each in covariance])
        values, vectors = np.linalg.eigh(covariance)  # fewer samples than dimensions, or a variance that has vanished
        return vectors * np.sqrt(np.clip(values, 0, None))[:, None]
