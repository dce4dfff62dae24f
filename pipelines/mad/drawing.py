"""Drawing what the next generations may be trained on: plainly, curated by a reward, or verified by a classifier."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.generators import Generator, Samples
from pipelines.rewards import RewardError, import_function
from pipelines.user_code import described
from policies.common.seeding import derive_seed
from policies.loops.selection import curate, verify

if TYPE_CHECKING:
    from pipelines.measures.features import Extractor

BUILT_IN = ("confidence", "first_coordinate")
Selection = Mapping[str, Any]  # rule, candidates, and reward or acceptance


def draw(
    model: Generator,
    count: int,
    seeds: Sequence[int],
    generation: int,
    bias: float,
    selection: Selection | None = None,
    extractor: "Extractor | None" = None,
    start: int = 0,
) -> Samples:
    """``count`` samples a universe of the model of ``generation``, from the ``start``-th on: a function of these
    arguments and nothing else.

    Raises ValueError if a reward fails or the verifier accepts too few.
    """

    def plainly(number: int, first: int = start) -> Samples:
        return model.sample(number, [derive_seed(seed, "sampling", generation, first) for seed in seeds], bias)

    if selection is None:
        return plainly(count)
    if selection["rule"] == "curated":
        drawn = plainly(count * selection["candidates"])
        streams = [np.random.default_rng(derive_seed(seed, "curation", generation)) for seed in seeds]
        return _curated(drawn, count, streams, selection, extractor)
    return _verified(plainly, count, selection, extractor)


def _curated(
    drawn: Samples, count: int, streams: list[np.random.Generator], selection: Selection, extractor: "Extractor | None"
) -> Samples:
    """Of the candidates for each sample keep one, by its reward."""
    kept = []
    for universe, stream in enumerate(streams):
        labels = None if drawn.labels is None else drawn.labels[universe]
        scores = score(selection["reward"], drawn.values[universe], labels, extractor)
        # Candidate j of sample i stands at j * count + i, so that those of one sample are asked for different labels.
        choice = curate(scores.reshape(-1, count).T, stream)
        kept.append(choice * count + np.arange(count))
    return _take(drawn, np.stack(kept))


def _verified(
    plainly: Callable[[int, int], Samples], count: int, selection: Selection, extractor: "Extractor | None"
) -> Samples:
    """Draw until the classifier has accepted enough, at most ``candidates`` times as many."""
    assert extractor is not None  # as of all images
    accepted: list[Samples] = []
    found = 0
    for attempt in range(selection["candidates"]):
        drawn = plainly(count, attempt * count)
        labels = None if drawn.labels is None else drawn.labels[0]
        good = verify(extractor.probabilities(drawn.values[0]), labels, selection["acceptance"])
        accepted.append(_take(drawn, np.flatnonzero(good)[None]))
        found += int(good.sum())
        if found >= count:
            return _take(_joined(accepted), np.arange(count)[None])
    raise ValueError(
        f"the verifier accepted {found} of {count * selection['candidates']} samples and {count} are needed: "
        "raise candidates or lower acceptance"
    )


def score(
    reward: str, values: np.ndarray, labels: np.ndarray | None, extractor: "Extractor | None" = None
) -> np.ndarray:
    """One finite reward a sample, float64 (n,). Raises ValueError."""
    if reward == "first_coordinate":
        return values.reshape(len(values), -1)[:, 0].astype(np.float64)
    if reward == "confidence":
        assert extractor is not None  # as of all images
        probabilities = extractor.probabilities(values)
        sure = probabilities.max(axis=1) if labels is None else probabilities[np.arange(len(labels)), labels]
        return np.log(np.clip(sure, 1e-12, None))
    own = import_function(reward, "reward", BUILT_IN)
    try:
        scores = np.asarray(own(values, labels), np.float64)
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {reward} failed: {described(error)}") from error
    if scores.shape != (len(values),) or not np.isfinite(scores).all():
        raise ValueError(
            f"reward {reward} must return one finite number a sample, ({len(values)},), not {scores.shape}"
        )
    return scores


def _take(samples: Samples, rows: np.ndarray) -> Samples:
    """Of each universe the samples at ``rows`` (universes, n)."""
    values = np.stack([each[row] for each, row in zip(samples.values, rows, strict=True)])
    return Samples(values, None if samples.labels is None else np.take_along_axis(samples.labels, rows, axis=1))


def _joined(parts: list[Samples]) -> Samples:
    values = np.concatenate([part.values for part in parts], axis=1)
    labels = [part.labels for part in parts if part.labels is not None]
    return Samples(values, np.concatenate(labels, axis=1) if labels else None)
