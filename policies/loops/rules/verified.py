"""A verified loop: samples are drawn until a classifier has accepted enough (Feng et al. 2024, 2406.07515)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from policies.loops.rules import Drawing, Rule
from policies.loops.samples import Samples


class Verified(Rule):
    """Real samples by the supply, beside samples of the previous generation that a classifier accepts."""

    names = ("verified",)
    supplied = True

    candidates: int = Field(4, ge=2, description="curated: draws of which one is kept; verified: most draws for one")
    acceptance: float = Field(0.8, gt=0, lt=1, description="verified: least probability of the label by the classifier")

    def check_family(self, family: str, classified: bool) -> None:
        """The verifier is the classifier."""
        if not classified:
            raise ValueError("rule verified needs images with labels, and data.extractor=classifier, which verifies")

    def selection(self) -> dict[str, Any]:
        """The threshold and the number of draws."""
        return {"rule": "verified", "candidates": self.candidates, "acceptance": self.acceptance}

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """Draw until enough are accepted, at most ``candidates`` times as many. Raises ValueError."""
        draw, count, classifier = drawing.draw, drawing.size, drawing.classifier
        assert classifier is not None  # as of all images
        accepted: list[Samples] = []
        found = 0
        for attempt in range(selection["candidates"]):
            drawn = draw(count, attempt * count)
            labels = None if drawn.labels is None else drawn.labels[0]
            good = verify(classifier.probabilities(drawn.values[0]), labels, selection["acceptance"])
            accepted.append(drawn.take(np.flatnonzero(good)[None]))
            found += int(good.sum())
            if found >= count:
                return Samples.joined(accepted).take(np.arange(count)[None])
        raise ValueError(
            f"the verifier accepted {found} of {count * selection['candidates']} samples and {count} are needed: "
            "raise candidates or lower acceptance"
        )


def verify(probabilities: np.ndarray, labels: np.ndarray | None, threshold: float) -> np.ndarray:
    """Which samples (n,) a classifier accepts: it gives the label asked for at least ``threshold``.

    ``probabilities`` (n, classes). Without labels, the most likely class counts.
    """
    certainty = probabilities.max(axis=1) if labels is None else probabilities[np.arange(len(labels)), labels]
    return certainty >= threshold
