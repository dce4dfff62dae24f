"""How far generated images are from real ones: quality, diversity and copying, each by its published definition.

Every figure here is biased by the number of samples, so generated and reference samples must be equally many.
Fréchet distance, precision and the like are taken between features; memorisation between pixels, because a
classifier's features forget what tells two images of a class apart.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.measures.features import Extractor

_MOMENT_WEIGHTS, _MOMENTS_ALIKE = (0.4, 0.3, 0.2, 0.1), 1e-6
_CHANCE = 0.05  # of fresh real samples count as memorised


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features ``a`` (n, D) and ``b`` (m, D): FID's formula
    (Heusel et al., 1706.08500). Covariances may be singular, as they are of fewer samples than features.

    Raises:
        ValueError: if a feature is not finite, or there are fewer than two samples.
    """
    for features in (a, b):
        _check(features, 2)
    # With Σ = RᵀR, tr (Σ_a Σ_b)^½ is the sum of the singular values of R_a R_bᵀ: no root of a singular matrix is taken.
    means = a.mean(axis=0) - b.mean(axis=0)
    roots = [np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1))[1] for x in (a, b)]
    common = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(means @ means + sum(np.sum(root**2) for root in roots) - 2 * common))


def precision_recall_density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> dict[str, float]:
    """Quality and diversity apart, from features ``real`` (n, D) and ``generated`` (n, D).

    The *ball* of a sample reaches to its k-th nearest neighbour among the others of its own set, and holds its edge: of
    a sample with k equal ones it is a point, and holds what is equal. ``precision`` is the share of generated samples
    in some real ball, ``recall`` the share of real samples in some generated ball (Kynkäänniemi et al., 1904.06991);
    ``density`` is the mean number of real balls a generated sample is in, over k, and ``coverage`` the share of real
    balls that hold a generated sample (Naeem et al., 2002.09797).

    Raises:
        ValueError: if a feature is not finite, a set has no k neighbours, or they are not equally many.
    """
    from scipy.spatial.distance import cdist

    for features in (real, generated):
        _check(features, k + 1)
    _check_equally_many(real, generated)
    # Differences are taken before they are squared: equal samples are at distance 0, and ties are ties.
    real_radius, generated_radius = (np.partition(cdist(x, x), k, axis=1)[:, k] for x in (real, generated))
    distance = cdist(real, generated)
    in_real_ball = distance <= real_radius[:, None]
    in_generated_ball = distance <= generated_radius[None, :]
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float(in_generated_ball.any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / k),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def memorisation(generated: np.ndarray, training: np.ndarray, reference: np.ndarray) -> float:
    """Share of ``generated`` (n, D) that is nearer to its nearest ``training`` sample than chance allows.

    Chance is what ``reference`` samples show, which no model was trained on (Meehan et al., 2004.05675, compare the
    same distances). A sample counts by the probability that its smoothed rank among theirs, where ties fall at random,
    is in the lowest 5 % (a conformal p-value: Vovk et al. 2005, Algorithmic Learning in a Random World, 2.2); an exact
    copy counts whole. So copies score 1, whatever the reference holds, and fresh real samples .05 in expectation,
    however many distances are equal; or, where more than that of the reference are copies themselves, as many as these.
    """
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(training)

    def distances(samples: np.ndarray) -> np.ndarray:
        closest = training[nearest.kneighbors(samples, return_distance=False)[:, 0]]
        return np.linalg.norm(samples - closest, axis=1)  # those of the search are rounded, and not 0 for a copy

    own, others = distances(generated), np.sort(distances(reference))
    nearer, up_to = (np.searchsorted(others, own, side) for side in ("left", "right"))
    chance = (_CHANCE * (len(others) + 1) - nearer) / (up_to - nearer + 1)
    return float(np.where(own == 0, 1, chance.clip(0, 1)).mean())


def moments_nearness(a: np.ndarray, b: np.ndarray) -> float:
    """How near two sets of images, uint8 of any shapes, are in the first four moments of their intensities in [0, 1],
    all pixels of a set together: mean, variance, skewness, excess kurtosis. −Σ w ln |Δ|, w = .4, .3, .2, .1: the more,
    the nearer, and of what is equal to within 10⁻⁶ no more. MAVEN (1906.06430) reports such a figure of histograms of
    intensities. It sees no shapes, and chance moments that agree raise it: a FID belongs beside it.

    Raises ValueError if the pixels of a set are all alike, which have no skewness.
    """
    from scipy.stats import kurtosis, skew

    found = []
    for images in (a, b):
        shades = images.ravel() / 255
        if not np.ptp(shades):
            raise ValueError("images of one shade have no moments to compare")
        found.append([shades.mean(), shades.var(), skew(shades), kurtosis(shades)])
    apart = np.abs(np.subtract(found[0], found[1])).clip(_MOMENTS_ALIKE)
    return float(-np.log(apart) @ _MOMENT_WEIGHTS)


def measure_images(
    generated: np.ndarray,
    labels: np.ndarray | None,
    reference: np.ndarray,
    reference_features: np.ndarray,
    training: np.ndarray,
    extractor: "Extractor",
    classes: int,
) -> tuple[dict[str, float], list[float] | None]:
    """Every figure of a generation's images, all uint8 (n, height, width, channels), and the share of each class.

    ``labels`` (n,) are what the ``generated`` images were asked to show; ``reference`` are as many real images that no
    generator trained on, with their features (n, 32), so that these are taken once a run; ``training`` (any number) are
    those that may have been copied. ``class_entropy`` is that of the classes that the extractor sees, ln(classes) at
    most. What needs classes is left out, and the shares are None, where there are 0, as the extractor is no classifier.

    Raises:
        ValueError: if ``generated`` and ``reference`` are not equally many.
    """
    from scipy.stats import entropy

    _check_equally_many(reference, generated)
    features = extractor.features(generated)
    pixels = (images.reshape(len(images), -1).astype(np.float64) for images in (generated, training, reference))
    figures = {
        "fid": frechet_distance(features, reference_features),
        **precision_recall_density_coverage(reference_features, features),
        "memorisation": memorisation(*pixels),
    }
    if not classes:
        return figures, None
    seen = extractor.classify(features).argmax(axis=1)
    shares: list[float] = (np.bincount(seen, minlength=classes) / len(seen)).tolist()
    figures["class_entropy"] = float(entropy(shares))
    if labels is not None:
        figures["label_accuracy"] = float((seen == labels).mean())
    return figures, shares


def _check_equally_many(real: np.ndarray, generated: np.ndarray) -> None:
    if len(generated) != len(real):
        raise ValueError(
            f"{len(generated)} generated samples cannot be compared with {len(real)} real ones: "
            "these figures depend on the number of samples, so give equally many"
        )


def _check(features: np.ndarray, fewest: int) -> None:
    if len(features) < fewest:
        raise ValueError(f"{len(features)} samples are too few for this figure: give {fewest} or more")
    if bad := np.count_nonzero(~np.isfinite(features).all(axis=1)):
        raise ValueError(f"{bad} of {len(features)} samples have features that are no finite numbers")
