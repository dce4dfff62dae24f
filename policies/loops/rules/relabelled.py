"""A relabelled loop: a classifier of real images says what each sample shows, whatever it was asked to show.

Pseudo-labels (Xie et al. 2019, 1911.04252) where ``verified`` has a filter: labels that a generator gets wrong are
repaired, not left out, so no sample is drawn in vain, and what the classifier misreads stays in the loop.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from policies.loops.rules import Drawing, Rule
from policies.loops.samples import Samples


class Relabelled(Rule):
    """Real samples by the supply, beside samples of the previous generation with the labels that a classifier gives."""

    names = ("relabelled",)
    supplied = relabels = True

    def check_family(self, family: str, classified: bool) -> None:
        """The labels are the classifier's."""
        if not classified:
            raise ValueError("rule relabelled needs images with labels, and data.extractor=classifier, which relabels")

    def selection(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"rule": "relabelled"}

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """As many as are asked for, with the classifier's most likely class; the label that a sample was drawn for is
        noted as ``asked``."""
        drawn = drawing.draw(drawing.size)
        assert drawing.classifier is not None  # as of all images
        assert drawn.labels is not None  # as of all families that the rule can be applied to
        labels = drawing.classifier.probabilities(drawn.values[0]).argmax(axis=1).astype(np.int64)
        return replace(drawn, labels=labels[None], notes={**drawn.notes, "asked": drawn.labels})
