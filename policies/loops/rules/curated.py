"""A curated loop: of several candidates the one that a reward prefers is likelier to be kept.

Ferbach et al. 2024 (2407.09499), the K-choose-1 model of human curation.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from policies.common.user_code import check_function, described, import_function, traced
from policies.loops.rules import Classifier, Drawing, Rule
from policies.loops.samples import Samples
from policies.rl.health import RewardError

BUILT_IN = ("confidence", "first_coordinate")


class Curated(Rule):
    """Real samples by the supply, beside samples of the previous generation curated by a reward."""

    names = ("curated",)
    supplied = True

    candidates: int = Field(4, ge=2, description="curated: draws of which one is kept; verified: most draws for one")
    reward: str | dict[str, dict[str, Any]] = Field(
        "confidence",
        description="curated: confidence, first_coordinate, file.py:function; text_to_image: any of docs/rewards.md, "
        "or {name: options}",
    )

    @property
    def named(self) -> tuple[str, dict[str, Any]]:
        """The reward's name and its options."""
        return (self.reward, {}) if isinstance(self.reward, str) else next(iter(self.reward.items()))

    def contradiction(self) -> str | None:
        """Several rewards, or none."""
        return "reward names one, with its options" if isinstance(self.reward, dict) and len(self.reward) != 1 else None

    @property
    def functions(self) -> list[str]:
        """The reward, if it is one's own."""
        return [self.named[0]] if ":" in self.named[0] else []

    def check_family(self, family: str, classified: bool) -> None:
        """Confidence is a classifier's; one's own reward can be called."""
        name, options = self.named
        if options:
            raise ValueError(f"reward {name}: options are of rewards of text_to_image; family {family} takes a name")
        if name not in BUILT_IN:
            check_function(name, "reward", ("values", "labels"), None, BUILT_IN)
        if name == "confidence" and not classified:
            raise ValueError(
                "reward confidence needs images with labels and data.extractor=classifier, whose it is: set reward"
                "=first_coordinate, or module:function"
            )

    def probe(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        """One's own reward has to answer."""
        score(self.named[0], values, labels)

    def worded_reward(self) -> dict[str, Any] | None:
        """Any that is not this rule's own."""
        name, options = self.named
        return None if name in BUILT_IN else {"name": name, "options": options}

    def selection(self) -> dict[str, Any]:
        """The reward and the number of candidates."""
        name, options = self.named
        found = {"rule": "curated", "candidates": self.candidates, "reward": name}
        return found | {"options": options} if options else found

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """Of the candidates for each sample keep one, by its reward."""
        count, kept, notes = drawing.size, [], []
        drawn = drawing.candidates(count, selection["candidates"])
        for universe, stream in enumerate(drawing.streams):
            labels = None if drawn.labels is None else drawn.labels[universe]
            if drawing.scorer is not None:
                scores = drawing.scorer(drawn)
            else:
                scores = score(selection["reward"], drawn.values[universe], labels, drawing.classifier)
            # Candidate j of sample i stands at j * count + i: those of one sample are asked for various labels, or,
            # where words ask for images, for the same.
            choice = curate(rivals := scores.reshape(-1, count).T, stream)
            kept.append(choice * count + np.arange(count))
            notes.append((rivals[np.arange(count), choice], np.sort(rivals, axis=1)))
        rewards, candidates = (np.stack(each) for each in zip(*notes, strict=True))
        found = drawn.take(np.stack(kept))
        return replace(found, notes={**found.notes, "reward": rewards, "candidates": candidates})


def curate(scores: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """Of each row of ``scores`` (n, K), the index (n,) of the one kept: i with probability ∝ exp(score_i), by the
    Gumbel-max trick."""
    return np.argmax(scores + stream.gumbel(size=scores.shape), axis=1)


def score(
    reward: str, values: np.ndarray, labels: np.ndarray | None, classifier: Classifier | None = None
) -> np.ndarray:
    """One finite reward a sample, float64 (n,). Raises ValueError, or RewardError if one's own function fails."""
    if reward == "first_coordinate":
        return values.reshape(len(values), -1)[:, 0].astype(np.float64)
    if reward == "confidence":
        assert classifier is not None  # as of all images
        probabilities = classifier.probabilities(values)
        sure = probabilities.max(axis=1) if labels is None else probabilities[np.arange(len(labels)), labels]
        return np.log(np.clip(sure, 1e-12, None))
    own = import_function(reward, "reward", BUILT_IN)
    try:
        scores = np.asarray(own(values, labels), np.float64)
    except (Exception, SystemExit) as error:
        raise traced(RewardError(f"reward {reward} failed: {described(error)}"), error) from error
    if scores.shape != (len(values),) or not np.isfinite(scores).all():
        raise ValueError(
            f"reward {reward} must return one finite number a sample, ({len(values)},), not {scores.shape}"
        )
    return scores
