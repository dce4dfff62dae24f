"""Which of a model's samples are kept: curation by a reward, and verification. Pure functions of scores."""

import numpy as np


def curate(scores: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """Of each row of ``scores`` (n, K), the index (n,) of the one kept: i with probability ∝ exp(score_i).

    Ferbach et al. 2024 (2407.09499), the K-choose-1 model of human curation; drawn by the Gumbel-max trick.
    """
    return np.argmax(scores + stream.gumbel(size=scores.shape), axis=1)


def verify(probabilities: np.ndarray, labels: np.ndarray | None, threshold: float) -> np.ndarray:
    """Which samples (n,) a classifier accepts: it gives the label asked for at least ``threshold``.

    ``probabilities`` (n, classes). Without labels, the most likely class counts (Feng et al. 2024, 2406.07515).
    """
    certainty = probabilities.max(axis=1) if labels is None else probabilities[np.arange(len(labels)), labels]
    return certainty >= threshold
