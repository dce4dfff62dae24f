"""A corrected loop: synthetic samples are moved towards the real distribution (Gillman et al. 2024, 2407.02087)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from policies.loops.laws import How, Laws, corrected, corrected_categorical
from policies.loops.rules import Drawing, Rule
from policies.loops.samples import Samples

_TRIES = 4  # draws of which a classifier takes the one that it is surest of


class Corrected(Rule):
    """Real samples by the supply, beside samples of the previous generation p under a corrector.

    The ideal one makes them samples of (p + γp*)/(1 + γ), p* the truth. To draw from that mixture is to replace each
    sample by a real one with probability γ/(1 + γ). So what correction gains is at most what so much fresh data gains.
    Real correctors, which know no truth, replace as many: by the nearest of the centres that k-means finds in the real
    data of generation 1, or by what a classifier is surest of among several draws.
    """

    names = ("corrected",)
    supplied = True

    correction: float = Field(1.0, ge=0, le=1e6, description="corrected: γ; 0 corrects nothing")
    corrector: Literal["ideal", "classifier"] | Annotated[int, Field(ge=2, le=10_000)] = Field(
        "ideal", description="corrected: ideal, which needs a truth; classifier; or how many centres of real data"
    )

    @property
    def needs_truth(self) -> bool:
        """Of the ideal corrector."""
        return self.corrector == "ideal"

    @property
    def renews(self) -> bool:
        """With the ideal corrector, unless it corrects nothing."""
        return self.needs_truth and self.correction > 0

    @property
    def kept(self) -> float:
        """The share 1/(1 + γ) of samples that stay as the model drew them."""
        return 1 / (1 + self.correction)

    def contradiction(self) -> str | None:
        """More centres than samples."""
        if isinstance(self.corrector, int) and self.corrector > self.initial():
            given = f"of the {self.initial()} real samples of generation 1"
            return f"corrector is {self.corrector} centres, {given}: give fewer"
        return None

    def check_family(self, family: str, classified: bool) -> None:
        """Centres are of points or images, and a classifier is of labels."""
        if self.corrector == "classifier" and not classified:
            raise ValueError("corrector classifier needs images with labels, and data.extractor=classifier")
        if isinstance(self.corrector, int) and family == "categorical":
            raise ValueError(f"corrector {self.corrector}: categories have no centres, which points and images have")

    def selection(self) -> dict[str, Any]:
        """The share that is kept, and by what the rest is replaced."""
        found: dict[str, Any] = {"rule": "corrected", "kept": self.kept}
        if isinstance(self.corrector, int):
            return found | {"corrector": "anchors", "anchors": self.corrector, "real": self.initial()}
        return found if self.corrector == "ideal" else found | {"corrector": self.corrector}

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """In place of each sample, with the probability that is left, what the corrector says."""
        drawn = drawing.draw(drawing.size)
        kept = np.stack([stream.random(drawing.size) < selection["kept"] for stream in drawing.streams])
        corrector = selection.get("corrector", "ideal")
        if corrector == "classifier":
            return _surest(drawn, kept, drawing)
        if corrector == "ideal":
            assert drawing.truth is not None  # as of all families that the rule can be applied to
            other = drawing.truth(drawing.size).values
        else:
            assert drawing.real is not None
            other = _nearest(drawn.values, drawing.real(selection["real"]).values, selection["anchors"])
        where = kept.reshape(*kept.shape, *[1] * (drawn.values.ndim - 2))
        return replace(drawn, values=np.where(where, drawn.values, other))

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """Of new real samples at every generation, or none."""
        sizes = self._law_sizes(generations) if self.needs_truth else {}
        return corrected(**how, n_ini=self.initial(), kept=self.kept, **sizes) if sizes else {}

    def categorical_law(self, generations: int, probabilities: Sequence[float]) -> Laws:
        """The same, without a bias."""
        sizes = self._law_sizes(generations)
        if not sizes or self.sampling_bias != 1:
            return {}
        how: dict[str, Any] = {"generations": generations, "probabilities": probabilities}
        return corrected_categorical(**how, n_ini=self.initial(), kept=self.kept, **sizes)

    def _law_sizes(self, generations: int) -> dict[str, Any]:
        counts = self.later_counts(generations)
        return {} if self.supply == "fixed" and any(counts["n_real"]) else counts


def _nearest(values: np.ndarray, real: np.ndarray, anchors: int) -> np.ndarray:
    """For each of ``values`` (universes, n, …) the nearest of the k-means centres of ``real`` (universes, m, …)."""
    from sklearn.cluster import KMeans

    found = np.empty_like(values)
    for universe, (own, known) in enumerate(zip(values, real, strict=True)):
        points = known.reshape(len(known), -1).astype(np.float64)
        clusters = KMeans(anchors, n_init=1, random_state=0).fit(points)
        nearest = clusters.cluster_centers_[clusters.predict(own.reshape(len(own), -1).astype(np.float64))]
        whole = np.rint(nearest) if values.dtype == np.uint8 else nearest
        found[universe] = whole.reshape(own.shape).astype(values.dtype)
    return found


def _surest(drawn: Samples, kept: np.ndarray, drawing: Drawing) -> Samples:
    """Images of one universe, those that are not ``kept`` replaced by what the classifier is surest of among more."""
    assert drawing.classifier is not None  # as of all images
    size = drawing.size
    more = drawing.draw(size * _TRIES, size)
    labels = None if more.labels is None else more.labels[0]
    probabilities = drawing.classifier.probabilities(more.values[0])
    sure = probabilities.max(axis=1) if labels is None else probabilities[np.arange(len(labels)), labels]
    best = sure.reshape(_TRIES, size).argmax(axis=0) * size + np.arange(size)
    rows = np.where(kept[0], np.arange(size), size + best)
    return Samples.joined([drawn, more]).take(rows[None])
