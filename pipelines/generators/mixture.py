"""The 2-D mixture family: the truth has 25 modes on a square grid, the estimator is expectation–maximisation.

The estimator is scikit-learn's ``GaussianMixture`` with spherical components, started by k-means++ from the
generation's own seed and run to convergence or 50 iterations. A sampling bias λ draws with covariances λΣ_k.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import Field

from pipelines.generators import NEIGHBOURS, ClosedForm, Seeds
from policies.common.seeding import derive_seed, streams
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.loops.training_sets import Manifest
from policies.rl.settings import Settings

SPACING, SPREAD = 1.0, 0.1  # between neighbouring modes; standard deviation of a mode
NEAR = 3.0  # standard deviations within which a sample belongs to a mode
_ITERATIONS, _TOLERANCE, _LEAST_VARIANCE = 50, 1e-3, 1e-9


class MixtureSettings(Settings):
    """A two-dimensional Gaussian mixture fitted by expectation–maximisation; the truth has modes on a square grid."""

    modes: int = Field(25, ge=4, le=10_000, description="mixture: of the truth and of the fit; a square number")


@dataclass(frozen=True)
class MixtureGenerator(ClosedForm):
    """``weights`` (universes, k), ``means`` (universes, k, 2), ``variances`` (universes, k); the truth's ``modes``."""

    names = ("mixture",)
    schema = MixtureSettings
    flat = True
    metrics = ("frechet", *NEIGHBOURS, "modes_covered", "mode_entropy", "in_mode")

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    modes: np.ndarray

    @classmethod
    def truth(cls, settings: MixtureSettings, seeds: Seeds, start: int, count: int) -> Samples:
        """``count`` real samples a universe, from the ``start``-th on: a uniform mode, a Gaussian around it."""
        centres = mode_centres(settings.modes)
        # Two streams, so that the first samples are the same however many are asked for.
        both = zip(streams(seeds, "real mode", start), streams(seeds, "real point", start), strict=True)
        drawn = [(mode.integers(0, len(centres), count), point.standard_normal((count, 2))) for mode, point in both]
        return Samples(np.stack([centres[mode] + SPREAD * point for mode, point in drawn]))

    @classmethod
    def fit(
        cls, settings: MixtureSettings, data: Samples, seeds: Seeds, start: Any = None, device: str = "cpu"
    ) -> Self:
        """Maximise the likelihood by EM from k-means++; weighted samples are resampled by their weights."""
        universes = zip(data.values, seeds, strict=True)
        fitted = [_fit_one(settings, points, data.weights, seed) for points, seed in universes]
        weights, means, variances = (np.stack(each) for each in zip(*fitted, strict=True))
        return cls(weights, means, variances, mode_centres(settings.modes))

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """Choose components by weight, then draw with covariance λΣ_k."""
        drawn = []
        for weights, means, variances, seed in zip(self.weights, self.means, self.variances, seeds, strict=True):
            stream = np.random.default_rng(seed)
            chosen = stream.choice(len(weights), count, p=weights / weights.sum())
            spread = np.sqrt(bias * variances[chosen])[:, None]
            drawn.append(means[chosen] + spread * stream.standard_normal((count, 2)))
        return Samples(np.stack(drawn))

    @classmethod
    def compare(cls, settings: MixtureSettings, generated: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """See :func:`measure_points`."""
        return measure_points(generated, reference, mode_centres(settings.modes))

    @classmethod
    def numbers(cls, settings: MixtureSettings, size: int, image: int = 1) -> int:
        """Points in two dimensions."""
        return size * 2

    @classmethod
    def check(cls, settings: MixtureSettings, loop: Rule) -> None:
        """Modes are a square."""
        mode_centres(settings.modes)

    @classmethod
    def check_sets(cls, settings: MixtureSettings, loop: Rule, manifests: Sequence[Manifest]) -> None:
        """A component needs a sample."""
        for each in manifests:
            if each.size < settings.modes:
                raise ValueError(f"generation {each.generation} has {each.size} samples for {settings.modes} modes")


def _fit_one(
    settings: MixtureSettings, points: np.ndarray, weights: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.mixture import GaussianMixture

    if weights is not None:
        stream = np.random.default_rng(derive_seed(seed, "resampling"))
        points = points[stream.choice(len(points), len(points), p=weights / weights.sum())]
    mixture = GaussianMixture(
        settings.modes,
        covariance_type="spherical",
        init_params="k-means++",
        max_iter=_ITERATIONS,
        tol=_TOLERANCE,
        reg_covar=_LEAST_VARIANCE,
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 50 iterations, or fewer distinct points than components
        mixture.fit(points)
    return mixture.weights_, mixture.means_, mixture.covariances_


def mode_centres(modes: int) -> np.ndarray:
    """The truth's modes (modes, 2) on a square grid around the origin. Raises ValueError if it is not a square."""
    side = round(modes**0.5)
    if side * side != modes:
        raise ValueError(f"mixture.modes is {modes}: modes stand on a square grid, so give 4, 9, 16, 25, …")
    line = SPACING * (np.arange(side) - (side - 1) / 2)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def measure_points(generated: np.ndarray, reference: np.ndarray, modes: np.ndarray) -> dict[str, float]:
    """Of points (n, 2) against as many real ones: modes covered, precision, recall, mode entropy, in-mode share.

    A mode is covered if a sample lies within 3 of its standard deviations.
    """
    from scipy.spatial import KDTree
    from scipy.stats import entropy

    from pipelines.measures.distances import frechet_distance, precision_recall_density_coverage

    distance, mode = KDTree(modes).query(generated)
    near = distance <= NEAR * SPREAD
    counts = np.bincount(mode[near], minlength=len(modes))
    return {
        "frechet": frechet_distance(reference, generated),
        **precision_recall_density_coverage(reference, generated),
        "modes_covered": float(np.count_nonzero(counts)),
        "mode_entropy": float(entropy(counts)),
        "in_mode": float(near.mean()),
    }
