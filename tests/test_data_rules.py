"""Data rules: who is trained on what, the ledger of real data, and manifests that name the same samples every time."""

import json
from typing import Any

import numpy as np
import pytest

from policies.loops import rules
from policies.loops.rules import FreshSchedule, Rule
from policies.loops.training_sets import REAL, LedgerExhausted, Manifest, largest_remainder, training_sets

POOL = 1000


def loop(rule: str, **settings: Any) -> Rule:
    made = rules.RULES.find(rule)(**settings)
    made.check()
    return made


def parts(manifest: Manifest) -> list[tuple[str, int, int, int]]:
    return [(part.role, part.generation, part.start, part.stop) for part in manifest.parts]


RULES: dict[str, tuple[dict[str, Any], list[tuple[str, int, int, int]]]] = {
    # settings, and what generation 4 is trained on
    "real_only": ({"n_ini": 50}, [("real-fixed", 0, 0, 50)]),
    "fully_synthetic": ({"n_synthetic": 50}, [("synthetic", 3, 0, 50)]),
    "augmentation": ({"n_real": 50, "n_synthetic": 30}, [("real-fixed", 0, 0, 50), ("synthetic", 3, 0, 30)]),
    "fresh": (
        {"n_ini": 100, "n_real": 20, "n_synthetic": 30},
        [("real-fresh", 0, 140, 160), ("synthetic", 3, 0, 30)],
    ),
    "accumulate": (
        {"n_ini": 50},
        [("real-fixed", 0, 0, 50), ("synthetic", 1, 0, 50), ("synthetic", 2, 0, 50), ("synthetic", 3, 0, 50)],
    ),
    "iterative_retraining": ({"n_real": 50, "n_synthetic": 25}, [("real-fixed", 0, 0, 50), ("synthetic", 3, 0, 25)]),
    "curated": ({"n_real": 10, "n_synthetic": 40}, [("real-fixed", 0, 0, 10), ("synthetic", 3, 0, 40)]),
    "corrected": ({"n_real": 0, "n_synthetic": 40}, [("synthetic", 3, 0, 40)]),
    "verified": ({"n_real": 0, "n_synthetic": 40}, [("synthetic", 3, 0, 40)]),
    "relabelled": ({"n_real": 0, "n_synthetic": 40}, [("synthetic", 3, 0, 40)]),
    "memory": (
        {"n_real": 5, "n_synthetic": 21, "memory": 2},
        [("real-fixed", 0, 0, 5), ("synthetic", 2, 11, 21), ("synthetic", 3, 0, 11)],
    ),
    "weighted_mixture": (
        {"n_ini": 100, "shares": {"real_fixed": 0.2, "real_fresh": 0.1, "previous": 0.4, "earlier": 0.3}},
        [
            ("real-fixed", 0, 0, 20),
            ("real-fresh", 0, 120, 130),
            ("synthetic", 1, 100, 115),
            ("synthetic", 2, 40, 55),
            ("synthetic", 3, 0, 40),
        ],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_generation_4_is_trained_on(rule: str) -> None:
    settings, expected = RULES[rule]
    manifests = training_sets(loop(rule, **settings), 4, POOL)
    assert parts(manifests[3]) == expected
    assert [part.generation for part in manifests[0].parts] == [REAL]
    assert all(part.generation < manifest.generation for manifest in manifests for part in manifest.parts)


@pytest.mark.parametrize("rule", [*RULES, "accumulate_subsample"])
def test_a_sample_is_read_twice_only_where_that_is_the_rule(rule: str) -> None:
    settings = RULES[rule][0] if rule in RULES else {"n_ini": 40}
    read: list[tuple[int, int]] = []
    manifests = training_sets(loop(rule, **settings), 9, POOL)
    for part in (part for manifest in manifests for part in manifest.parts if part.role != "real-fixed"):
        read += [(part.generation, row) for row in range(part.start, part.stop)]
    assert (len(read) > len(set(read))) == (rule in ("accumulate", "accumulate_subsample"))
    if rule == "memory":
        assert {g for g, _ in read} == set(range(1, 9))
        assert len(read) == 8 * 21


@pytest.mark.parametrize("rule", [*RULES, "accumulate_subsample"])
def test_more_generations_change_no_earlier_one(rule: str) -> None:
    settings = loop(rule, **(RULES[rule][0] if rule in RULES else {"n_ini": 40}))
    assert training_sets(settings, 9, POOL)[:5] == training_sets(settings, 5, POOL)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "accumulate", "n_ini": 50, "n_synthetic": 0}, [("real-fixed", 0, 0, 50)]),
        ({"rule": "accumulate", "n_ini": 50, "n_real": 0}, [("synthetic", g, 0, 50) for g in (1, 2)]),
        ({"rule": "accumulate_subsample", "n_ini": 50, "n_real": 0}, [("synthetic", g, 0, 50) for g in (1, 2)]),
        ({"rule": "fresh", "n_ini": 50, "n_real": 9, "n_synthetic": 0}, [("real-fresh", 0, 59, 68)]),
        ({"rule": "memory", "n_ini": 50, "n_real": 9, "n_synthetic": 0}, [("real-fixed", 0, 0, 9)]),
    ],
)
def test_nothing_is_nothing(settings: dict[str, Any], expected: list[tuple[str, int, int, int]]) -> None:
    assert parts(training_sets(loop(**settings), 3, POOL)[2]) == expected


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.1, [(10, 90)] * 3),
        ((0.5, 0.25, 0.0), [(50, 50), (25, 75), (0, 100)]),
        (FreshSchedule(first=0.4, last=0.2), [(40, 60), (30, 70), (20, 80)]),
    ],
)
def test_fresh_fraction(fraction: Any, expected: list[tuple[int, int]]) -> None:
    fresh = loop("fresh", n_ini=100, fresh_fraction=fraction)
    assert [fresh.sizes(generation, 4) for generation in (2, 3, 4)] == expected
    assert [manifest.size for manifest in training_sets(fresh, 4, POOL)] == [100] * 4


def test_fresh_samples_are_never_seen_twice_and_replacement_repeats() -> None:
    settings = {"n_ini": 100, "n_real": 50, "n_synthetic": 50}
    seen: list[int] = []
    for manifest in training_sets(loop("fresh", **settings), 8, POOL):
        seen += manifest.rows(7)[0].tolist()
    assert len(seen) == len(set(seen)) == 100 + 7 * 50
    again = training_sets(loop("fresh", real_supply="fresh_with_replacement", **settings), 40, 120)
    draws = [manifest.rows(7)[0] for manifest in again[1:]]
    assert max(draw.max() for draw in draws) < 120
    assert not np.array_equal(draws[0], draws[1])
    assert len(np.unique(np.concatenate(draws))) == 120


def test_the_ledger_stops_before_real_data_repeats() -> None:
    settings = {"n_ini": 100, "n_real": 50, "n_synthetic": 50}
    assert len(training_sets(loop("fresh", **settings), 5, 300)) == 5
    with pytest.raises(LedgerExhausted, match=r"generation 5: 50 more real samples are needed, but 49 of 299 are left"):
        training_sets(loop("fresh", **settings), 5, 299)
    with pytest.raises(LedgerExhausted, match="generation 1: 100 more"):
        training_sets(loop("real_only", n_ini=100), 2, 99)
    assert len(training_sets(loop("fresh", **settings), 100, None)) == 100


def test_subsampling_is_uniform_without_replacement_and_each_seed_has_its_own() -> None:
    manifest = training_sets(loop("accumulate_subsample", n_ini=40), 4, POOL)[3]
    counts = np.zeros((4, 40))
    for seed in range(400):
        rows = manifest.rows(seed)
        assert sum(map(len, rows)) == manifest.size == 40
        for part, row in enumerate(rows):
            assert len(set(row.tolist())) == len(row)
            counts[part, row] += 1
    assert counts.sum(axis=1) == pytest.approx([4000] * 4, rel=0.05)
    assert counts.min() > 60  # of 100 expected
    assert any(not np.array_equal(a, b) for a, b in zip(manifest.rows(0), manifest.rows(1), strict=True))


@pytest.mark.parametrize("rule", [*RULES, "accumulate_subsample"])
def test_a_manifest_survives_json_and_names_the_same_samples(rule: str) -> None:
    settings = RULES[rule][0] if rule in RULES else {"n_ini": 40}
    for manifest in training_sets(loop(rule, **settings), 4, POOL):
        again = Manifest.from_json(json.loads(json.dumps(manifest.as_json())))
        assert again == manifest
        for mine, theirs in zip(manifest.rows(3), again.rows(3), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_real_weight_is_on_real_parts_only() -> None:
    manifest = training_sets(loop("augmentation", n_real=10, n_synthetic=20, real_weight=3.0), 2, POOL)[1]
    assert [(part.role, part.weight) for part in manifest.parts] == [("real-fixed", 3.0), ("synthetic", 1.0)]


def test_largest_remainder() -> None:
    assert largest_remainder(10, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 4, "b": 3, "c": 3}
    assert largest_remainder(7, {"a": 0.5, "b": 0.5}) == {"a": 4, "b": 3}
    assert largest_remainder(5, {"a": 1.0, "b": 0.0}) == {"a": 5, "b": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "fresh", "n_ini": 10, "fresh_fraction": 0.1, "n_real": 5}, "both ways: fresh_fraction with n_real"),
        ({"rule": "fresh", "n_ini": 10}, "rule fresh needs n_real and n_synthetic, or n_total and fresh_fraction"),
        ({"rule": "fresh", "n_real": 5}, "needs n_real and n_synthetic"),
        ({"rule": "fully_synthetic"}, "needs n_synthetic or n_ini"),
        ({"rule": "fully_synthetic", "n_ini": 10, "n_real": 5}, "no real data after generation 1"),
        ({"rule": "augmentation", "n_ini": 10, "fresh_fraction": 0.1}, "same real set every time"),
        ({"rule": "weighted_mixture", "n_ini": 10}, "needs shares that sum to 1"),
        ({"rule": "weighted_mixture", "n_ini": 10, "shares": {"previous": 0.5}}, "needs shares that sum to 1"),
        ({"rule": "fresh", "n_ini": 10, "fresh_fraction": 0.5, "real_supply": "fixed"}, "rule=augmentation"),
        ({"rule": "accumulate", "n_ini": 10, "real_supply": "fresh"}, "uses one fixed real set"),
        (
            {"rule": "fresh", "n_total": 9, "n_real": 5, "n_synthetic": 5},
            r"n_total is 9, but n_real \+ n_synthetic is 10",
        ),
        ({"rule": "fully_synthetic", "n_total": 9, "n_synthetic": 5}, "n_total is 9, but n_synthetic is 5"),
    ],
)
def test_impossible_loops_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**settings)


def test_a_list_of_fractions_must_fit_the_generations() -> None:
    fresh = loop("fresh", n_ini=10, fresh_fraction=(0.1, 0.2))
    with pytest.raises(ValueError, match="lists 2 values, but 5 generations need 4"):
        training_sets(fresh, 5, POOL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "fresh", "n_ini": 10, "n_real": 0, "n_synthetic": 0}, "generation 2 would be trained on 0 samples"),
        ({"rule": "fully_synthetic", "n_ini": 10, "n_synthetic": 0}, "generation 2 would be trained on 0 samples"),
        ({"rule": "fully_synthetic", "n_synthetic": 0}, "generation 1 would be trained on 0 samples"),
        ({"rule": "augmentation", "n_real": 1, "n_synthetic": 9}, "generation 1 would be trained on 1 samples"),
        ({"rule": "accumulate_subsample", "n_ini": 20, "n_total": 41}, "41 samples cannot be drawn from a pool of 40"),
        ({"rule": "fresh", "n_ini": 120, "fresh_fraction": 0.001}, "0.001 of 120 samples rounds to none of them real"),
        ({"rule": "fresh", "n_ini": 120, "fresh_fraction": 0.999}, "0.999 of 120 samples rounds to all of them real"),
        ({"rule": "fresh", "n_ini": 120, "fresh_fraction": (0.5, 0.001)}, "generation 3: fresh_fraction 0.001"),
        (
            {"rule": "weighted_mixture", "n_ini": 120, "shares": {"real_fresh": 0.001, "previous": 0.999}},
            "shares.real_fresh of 120 samples rounds to none",
        ),
        ({"rule": "memory", "n_real": 9, "n_synthetic": 1, "memory": 2}, "1 synthetic samples are too few for 2 gen"),
    ],
)
def test_training_sets_that_cannot_be_drawn_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_sets(loop(**settings), 3, POOL)


def test_a_schedule_may_pass_through_what_rounds_to_nothing() -> None:
    fresh = loop("fresh", n_ini=100, fresh_fraction=FreshSchedule(first=0.01, last=0.0))
    assert [fresh.sizes(generation, 6)[0] for generation in range(2, 7)] == [1, 1, 0, 0, 0]
