"""Claims over seeds: kept, missed or undecided, by small exact values."""

from math import nan, sqrt

import numpy as np
import pytest

from policies.common.claims import Claim, judge

T3 = 4.302652729749464  # Student's t of three values: 97.5 %, two degrees of freedom


def most(bound: float, **more: object) -> Claim:
    return Claim("it is small", "loss", "treated", "at most", bound, **more)  # type: ignore[arg-type]


def least(bound: float, **more: object) -> Claim:
    return Claim("it is large", "loss", "treated", "at least", bound, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bound", "small", "large"),
    [
        (4.49, "kept", "missed"),
        (4.48, "undecided", "undecided"),
        (-0.48, "undecided", "undecided"),
        (-0.49, "missed", "kept"),
    ],
)
def test_an_absolute_claim_is_held_against_students_interval(bound: float, small: str, large: str) -> None:
    values = {"treated": {"loss": [1.0, 2.0, 3.0]}}  # mean 2, ± 4.3027 / √3 = 2.484
    found = judge(most(bound), values)
    assert (found.outcome, judge(least(bound), values).outcome) == (small, large)
    assert (found.value, found.seeds) == (2.0, 3)
    np.testing.assert_allclose([found.low, found.high], [2 - T3 / sqrt(3), 2 + T3 / sqrt(3)])


def test_an_interval_that_holds_the_bound_decides_nothing() -> None:
    for claim in (most(2.0), least(2.0), most(4.4), least(-0.4)):
        found = judge(claim, {"treated": {"loss": [1.0, 2.0, 3.0]}})
        assert found.outcome == "undecided"
        assert "holds the bound" in found.reason


def test_a_bound_that_is_exactly_met_is_kept() -> None:
    values = {"treated": {"loss": [2.0, 2.0, 2.0]}}
    assert judge(most(2.0), values).outcome == judge(least(2.0), values).outcome == "kept"
    assert judge(most(np.nextafter(2.0, 0)), values).outcome == "missed"


def test_one_seed_decides_nothing_however_far_from_the_bound() -> None:
    for claim in (most(1e9), least(-1e9), most(1e9, control="base", kind="difference")):
        found = judge(claim, {"treated": {"loss": [1.0]}, "base": {"loss": [5.0]}})
        assert found.outcome == "undecided"
        assert "1 seed" in found.reason


@pytest.mark.parametrize("odd", [nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_decides_nothing(odd: float) -> None:
    values = {"treated": {"loss": [1.0, 1.1, 1.2]}, "base": {"loss": [1.0, odd, 1.0]}}
    found = judge(most(99, control="base", kind="difference"), values)
    assert (found.outcome, found.seeds) == ("undecided", 3)
    assert "no number" in found.reason
    assert judge(most(99), values).outcome == "kept"  # which does not look at that arm


def test_what_was_not_measured_decides_nothing() -> None:
    assert "no loss of arm treated" in judge(most(1), {}).reason
    assert "no loss of arm base" in judge(most(1, control="base", kind="ratio"), {"treated": {"loss": [1]}}).reason
    assert (
        "seeds"
        in judge(most(1, control="base", kind="ratio"), {"treated": {"loss": [1, 2]}, "base": {"loss": [1]}}).reason
    )


def test_differences_and_ratios_are_paired_over_seeds() -> None:
    """What seeds have in common is not held against the claim: apart, these arms overlap."""
    values = {"treated": {"loss": [1.0, 11.0, 101.0]}, "base": {"loss": [2.0, 12.1, 101.9]}}
    found = judge(most(-0.5, control="base", kind="difference"), values)
    assert found.outcome == "kept"
    np.testing.assert_allclose(
        [found.value, found.low, found.high], [-1, -1 - 0.1 * T3 / sqrt(3), -1 + 0.1 * T3 / sqrt(3)]
    )
    halves = {"treated": {"loss": [1.0, 10.0, 100.0]}, "base": {"loss": [2.0, 20.0, 200.0]}}
    ratio = judge(most(0.5, control="base", kind="ratio"), halves)
    assert ratio.outcome == "kept"
    np.testing.assert_allclose([ratio.value, ratio.low, ratio.high], 0.5)
    assert judge(least(0.6, control="base", kind="ratio"), halves).outcome == "missed"


def test_a_ratio_that_is_a_share_may_be_nothing_at_a_seed() -> None:
    left = {"treated": {"loss": [0.0, 0.1, 0.1]}, "base": {"loss": [0.8, 1.0, 0.8]}}
    found = judge(most(0.6, control="base", kind="ratio", scale="share"), left)
    angles = np.arcsin(np.sqrt([0, 0.1, 0.125]))
    half = T3 * angles.std(ddof=1) / sqrt(3)
    ends = np.sin(np.clip([angles.mean(), angles.mean() - half, angles.mean() + half], 0, np.pi / 2)) ** 2
    assert found.outcome == "kept"
    np.testing.assert_allclose([found.value, found.low, found.high], ends)
    assert judge(most(0.6, control="base", kind="ratio"), left).outcome == "undecided"  # its mean is geometric
    whole = judge(most(1, control="base", kind="ratio", scale="share"), left | {"treated": {"loss": [0.4, 1.0, 1.6]}})
    assert whole.value == pytest.approx(np.sin(np.arcsin(np.sqrt([0.5, 1, 1])).mean()) ** 2)  # at most all is left


def test_a_ratio_to_nothing_decides_nothing() -> None:
    values = {"treated": {"loss": [1.0, 2.0]}, "base": {"loss": [0.0, 0.0]}}
    assert judge(least(1, control="base", kind="ratio"), values).outcome == "undecided"
    assert judge(most(1, control="base", kind="ratio", scale="share"), values).outcome == "undecided"


def test_shares_that_seeds_agree_on_are_not_certain() -> None:
    def judged(arm: list[float], base: list[float], **more: object) -> str:
        claim = Claim("all are seen", "recall", "arm", "at least", 0.5, **more)  # type: ignore[arg-type]
        return judge(claim, {"arm": {"recall": arm}, "base": {"recall": base}}).outcome

    assert judged([1.0, 1.0, 1.0], []) == "undecided"
    assert judged([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], control="base", kind="difference") == "undecided"
    assert judged([1.0, 0.99, 1.0], [0.0, 0.0, 0.0], control="base", kind="difference") == "kept"
    assert judged([0.9, 0.95, 0.92], []) == "kept"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "difference"},
        {"control": "base"},
        {"direction": "below"},
        {"bound": nan},
    ],
)
def test_a_claim_that_says_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="claim 'it is small'"):
        Claim(**{"sentence": "it is small", "metric": "loss", "arm": "a", "direction": "at most", "bound": 1.0} | wrong)  # type: ignore[arg-type]


def test_intervals_are_as_wide_as_they_say() -> None:
    """At a bound that is the truth, a claim of either direction is kept in 2.5 % of the experiments."""
    dice, outcomes = np.random.default_rng(0), []
    for _ in range(2000):
        outcomes.append(judge(most(0.0), {"treated": {"loss": dice.normal(size=3)}}).outcome)
    assert 0.015 < outcomes.count("kept") / 2000 < 0.035
    assert 0.015 < outcomes.count("missed") / 2000 < 0.035
