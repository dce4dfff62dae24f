"""Drawing what the next generations may be trained on: plainly, or selected as the data rule says."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipelines.generators import Generator
from policies.common.seeding import derive_seed, streams
from policies.loops.rules import RULES, Classifier, Drawing
from policies.loops.samples import Samples


def draw(
    model: Generator,
    count: int,
    seeds: Sequence[int],
    generation: int,
    bias: float,
    selection: Mapping[str, Any] | None = None,
    classifier: Classifier | None = None,
    start: int = 0,
    truth: Callable[[Sequence[int], int], Samples] | None = None,
    scorer: Callable[[Samples], np.ndarray] | None = None,
    real: Callable[[int], Samples] | None = None,
) -> Samples:
    """``count`` samples a universe of the model of ``generation``, from the ``start``-th on: a function of these
    arguments and nothing else. ``selection`` is :meth:`policies.loops.rules.Rule.selection`; ``truth`` gives samples of
    the truth by the universes' seeds and their number, ``scorer`` rewards (n,) of one universe's samples,
    ``real`` the first real samples of generation 1.

    Raises ValueError if a reward fails or the verifier accepts too few.
    """

    def plainly(number: int, first: int = start) -> Samples:
        return model.sample(number, [derive_seed(seed, "sampling", generation, first) for seed in seeds], bias)

    def candidates(number: int, each: int) -> Samples:
        own = [derive_seed(seed, "sampling", generation, start) for seed in seeds]
        return model.candidates(number, each, own, bias)

    if selection is None:
        return plainly(count)
    apart = [derive_seed(seed, "correction", generation, start) for seed in seeds]
    known = None if truth is None else partial(truth, apart)
    drawing = Drawing(
        plainly, candidates, count, streams(seeds, "curation", generation), classifier, known, scorer, real
    )
    return RULES.find(selection["rule"]).select(selection, drawing)
