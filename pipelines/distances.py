"""How far generated images are from real ones: quality, diversity and copying, each by its published definition.

Every figure here is biased by the number of samples, so generated and reference samples must be equally many.
Fréchet distance, precision and the like are taken between features; memorisation between pixels, because a
classifier's features forget what tells two images of a class apart.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.features import Extractor


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features ``a`` (n, D) and ``b`` (n, D): FID's formula
    (Heusel et al., 1706.08500)."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = torch.nn.Identity()
    features.num_features = a.shape[1]  # where torchmetrics looks for D
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=False)
    metric.update(torch.from_numpy(b), real=True)
    return float(metric.compute())


def precision_recall_density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> dict[str, float]:
    """Quality and diversity apart, from features ``real`` (n, D) and ``generated`` (n, D).

    The *ball* of a sample reaches to its k-th nearest neighbour in its own set. ``precision`` is the share of generated
    samples in some real ball, ``recall`` the share of real samples in some generated ball (Kynkäänniemi et al.,
    1904.06991); ``density`` is the mean number of real balls a generated sample is in, over k, and ``coverage`` the
    share of real balls that hold a generated sample (Naeem et al., 2002.09797).
    """
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors

    real_radius, generated_radius = (
        NearestNeighbors(n_neighbors=k).fit(samples).kneighbors()[0][:, -1] for samples in (real, generated)
    )
    distance = pairwise_distances(real, generated)
    in_real_ball = distance <= real_radius[:, None]
    in_generated_ball = distance <= generated_radius[None, :]
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float(in_generated_ball.any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / k),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def memorisation(generated: np.ndarray, training: np.ndarray, reference: np.ndarray) -> float:
    """Share of ``generated`` (n, D) nearer to their nearest ``training`` sample than 95 % of ``reference`` samples,
    which nobody trained on, are to theirs. A generator that draws from the real distribution itself scores .05."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(training)
    threshold = np.quantile(nearest.kneighbors(reference)[0], 0.05)
    return float((nearest.kneighbors(generated)[0] < threshold).mean())


def measure_images(
    generated: np.ndarray,
    labels: np.ndarray | None,
    reference: np.ndarray,
    reference_features: np.ndarray,
    training: np.ndarray,
    extractor: "Extractor",
    classes: int,
) -> tuple[dict[str, float], list[float]]:
    """Every figure of a generation's images, all uint8 (n, height, width, channels), and the share of each class.

    ``labels`` (n,) are what the ``generated`` images were asked to show; ``reference`` are as many real images that no
    generator trained on, with their features (n, 32), so that these are taken once a run; ``training`` (any number) are
    those that may have been copied. ``class_entropy`` is that of the classes that the extractor sees, ln(classes) at
    most.

    Raises:
        ValueError: if ``generated`` and ``reference`` are not equally many.
    """
    from scipy.stats import entropy

    if len(generated) != len(reference):
        raise ValueError(
            f"{len(generated)} generated samples cannot be compared with {len(reference)} real ones: "
            "these figures depend on the number of samples, so give equally many"
        )
    features = extractor.features(generated)
    seen = extractor.classify(features).argmax(axis=1)
    shares: list[float] = (np.bincount(seen, minlength=classes) / len(seen)).tolist()
    pixels = (images.reshape(len(images), -1).astype(np.float64) for images in (generated, training, reference))
    figures = {
        "fid": frechet_distance(features, reference_features),
        **precision_recall_density_coverage(reference_features, features),
        "class_entropy": float(entropy(shares)),
        "memorisation": memorisation(*pixels),
    }
    if labels is not None:
        figures["label_accuracy"] = float((seen == labels).mean())
    return figures, shares
