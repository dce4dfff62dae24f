"""What may be claimed from a few seeds: verdicts, and how long n_ini is remembered."""

import json
from math import log, sqrt

import numpy as np
import pytest
from scipy import stats

from policies.loops.verdicts import (
    FEWEST_SEEDS,
    MOST_SEEDS,
    Verdict,
    forgetting_time,
    judge,
    mad_verdict,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def seeds_with(changes: list[float], first: float, better: str) -> np.ndarray:
    """Values (seeds, 3) whose paired changes are ``changes``; the middle generation means nothing."""
    starts = first * np.linspace(0.9, 1.1, len(changes))
    ends = starts * np.exp(changes) if better == "lower" else starts + changes
    return np.stack([starts, np.full(len(changes), 7.0), ends], axis=1)


@pytest.mark.parametrize(
    ("changes", "better", "verdict"),
    [
        ([0.9, 1.0, 1.1], "lower", "degrades"),
        ([-0.9, -1.0, -1.1], "lower", "improves"),
        ([0.01, 0.0, -0.01], "lower", "holds"),
        ([0.1, 0.11, 0.12], "lower", "holds"),  # surely a change, and surely within the margin
        ([-2.0, 3.0, 1.0], "lower", "undecided"),
        ([0.15, 0.18, 0.21], "lower", "undecided"),  # surely a change, not surely within the margin
        ([-0.3, -0.31, -0.32], "higher", "degrades"),
        ([0.3, 0.31, 0.32], "higher", "improves"),
        ([0.09, 0.1, 0.11], "higher", "undecided"),  # the margin is a fifth of the first share, here .1
        ([0.05, 0.06, 0.05], "higher", "holds"),
        ([-0.3, 0.3, 0.0], "higher", "undecided"),
    ],
)
def test_judge(changes: list[float], better: str, verdict: str) -> None:
    result = judge(seeds_with(changes, 0.5, better), better)  # type: ignore[arg-type]
    assert result.verdict == verdict
    assert result.change == pytest.approx(np.mean(changes))
    half = stats.t.ppf(0.975, len(changes) - 1) * np.std(changes, ddof=1) / sqrt(len(changes))
    assert (result.low, result.high) == pytest.approx((result.change - half, result.change + half))
    assert result.first == pytest.approx(0.5)
    assert (result.seeds_needed is None) == (verdict != "undecided")


def test_margin_of_a_distance_is_a_factor_both_ways() -> None:
    for better_by in (log(1.5), -log(1.5)):
        values = seeds_with([better_by] * 3, 2.0, "lower")
        assert judge(values, "lower", margin=0.51).verdict == "holds"
        assert judge(values, "lower", margin=0.49).verdict != "holds"


def test_judge_pairs_by_seed() -> None:
    """Seeds that differ tenfold hide nothing when each is compared with itself."""
    starts = np.array([1.0, 10.0, 100.0])
    assert judge(np.stack([starts, 2 * starts], axis=1), "lower").verdict == "degrades"


@pytest.mark.parametrize("changes", [[0.1, 0.9, 0.4], [0.3, -0.2, 0.05], [0.5, -0.1, 0.3, 0.2]])
def test_seeds_needed_decide_at_this_spread_and_no_fewer_would(changes: list[float]) -> None:
    needed = judge(seeds_with(changes, 0.5, "lower"), "lower").seeds_needed
    assert needed is not None
    assert needed > len(changes)

    def verdict(seeds: int) -> str:
        spread = np.linspace(-1, 1, seeds)
        spread *= np.std(changes, ddof=1) / np.std(spread, ddof=1)
        return judge(seeds_with(list(np.mean(changes) + spread), 0.5, "lower"), "lower").verdict

    assert verdict(needed) != "undecided"
    assert verdict(needed - 1) == "undecided"


def test_seeds_needed_has_bounds() -> None:
    assert judge(np.array([[1.0, 2.0]]), "lower").seeds_needed == FEWEST_SEEDS
    on_the_margin = seeds_with([log(1.2) - 0.1, log(1.2) + 0.1], 1.0, "lower")
    assert judge(on_the_margin, "lower").seeds_needed == MOST_SEEDS


def test_a_share_that_begins_at_zero_can_be_judged() -> None:
    assert judge(np.zeros((3, 4)), "higher").verdict == "holds"
    assert judge(np.array([[0, 0.2], [0, 0.21], [0, 0.22]]), "higher").verdict == "improves"


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("values", [[[1.0, 0.0], [1.0, 1.0]], [[1.0, np.inf], [1.0, 2.0]], [[np.nan, 1.0], [1.0, 1.0]]])
def test_what_has_no_finite_change_is_undecided(values: list[list[float]]) -> None:
    assert judge(np.array(values), "lower").verdict == "undecided"


def judged(kind: str, needed: int | None = None) -> Verdict:
    return Verdict(0.4, 2.0, 1.6, 1.2, 2.0, kind, needed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("distance", "answer"), [("degrades", "yes"), ("holds", "no"), ("improves", "no"), ("undecided", "undecided")]
)
def test_a_loop_goes_mad_when_its_distance_grows(distance: str, answer: str) -> None:
    """Quality and diversity have no say in it."""
    content = mad_verdict(judged(distance, 9), judged("improves"), judged("degrades"), seeds=5)
    assert content["goes_mad"] == answer
    assert (content["quality"]["verdict"], content["diversity"]["verdict"]) == ("improves", "degrades")
    assert content["warnings"] == (
        ["Distance is undecided after 5 seeds: with this spread it takes about 9."] * (distance == "undecided")
    )


def test_too_few_seeds_are_warned_of_and_the_answer_is_json() -> None:
    single = judge(np.array([[1.0, 3.0]]), "lower")
    content = json.loads(json.dumps(mad_verdict(single, None, None, seeds=1), allow_nan=False))
    assert content["distance"]["low"] is None
    assert content["quality"] is None
    assert content["warnings"][0] == f"1 seed cannot carry a claim: run at least {FEWEST_SEEDS}."
    assert "undecided after 1 seed:" in content["warnings"][1]
    assert mad_verdict(judged("holds"), None, None, seeds=3)["warnings"] == []
    assert len(mad_verdict(judged("holds"), None, None, seeds=2)["warnings"]) == 1


def test_forgetting_time() -> None:
    large = np.ones((2, 6))
    difference = np.array([10, 0.5, 2, -0.9, 0.8, 0])
    noise = np.array([[5.0], [-5.0]]) * np.ones(6)
    assert forgetting_time(large + difference + noise, large) == 4
    assert forgetting_time(large + difference + noise, large, share=0.3) == 2
    assert forgetting_time(large, large + difference) == 4
    assert forgetting_time(large + 1, large) is None
    difference[-1] = 1.0
    assert forgetting_time(large + difference, large) is None
