"""What arms of an experiment say together: only of those that are equal in all else."""

import json
from typing import Any

import numpy as np

from orchestration.experiments.mad.analysis import comparisons, verdict
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import load_config
from policies.loops.training_sets import training_sets


def compared(*overrides: str, metric: str = "w2_squared") -> dict[str, Any]:
    config = load_config(MadConfig, None, ["generations=4", "seeds=3", *overrides])
    manifests = {name: training_sets(arm.loop, 4, None) for name, arm in config.resolved_arms.items()}
    rng = np.random.default_rng(0)
    values = {name: {metric: rng.lognormal(size=(3, 4))} for name in manifests}
    return comparisons(config, values, manifests)


def test_arms_that_differ_in_n_ini_only_are_compared() -> None:
    sizes = "n_real: 50, n_synthetic: 50"
    (found,) = compared(f"arms.a={{rule: fresh, n_ini: 20, {sizes}}}", f"arms.b={{rule: fresh, n_ini: 90, {sizes}}}")[
        "n_ini"
    ]
    assert found["arms"] == ["a", "b"]
    assert found["final_ratio"]["low"] < found["final_ratio"]["mean"] < found["final_ratio"]["high"]


def test_arms_whose_later_sizes_follow_n_ini_are_not() -> None:
    for rule in ("rule: fully_synthetic", "rule: fresh, fresh_fraction: 0.5", "rule: accumulate, n_synthetic: 50"):
        assert "n_ini" not in compared(f"arms.a={{{rule}, n_ini: 20}}", f"arms.b={{{rule}, n_ini: 90}}")
    same = "rule: fresh, n_real: 50, n_synthetic: 50"
    other = compared(f"arms.a={{{same}, n_ini: 20}}", f"arms.b={{{same}, n_ini: 90, dimension: 3}}")
    assert "n_ini" not in other


def test_fractions_are_compared_at_one_size_and_in_one_family() -> None:
    arms = [f"arms.f{share}={{rule: fresh, fresh_fraction: 0.{share}, n_ini: 100}}" for share in (1, 2, 4)]
    arms.append("arms.none={rule: fully_synthetic, n_ini: 100}")
    found = compared(*arms)["fresh_fraction"]
    assert found["fractions"] == [0, 0.1, 0.2, 0.4]
    assert np.isnan(found["rank_correlation"]["low"])
    arms[1:3] = [each.replace("n_ini: 100", "n_ini: 200") for each in arms[1:3]]
    assert "fresh_fraction" not in compared(*arms)
    arms[1:3] = [each.replace("n_ini: 200", "n_ini: 100, dimension: 3") for each in arms[1:3]]
    assert "fresh_fraction" not in compared(*arms)


def test_each_arm_is_held_against_the_one_with_the_most_real_data() -> None:
    arms = ["arms.none={rule: fully_synthetic, n_ini: 60}", "arms.fresh={rule: fresh, n_ini: 60, fresh_fraction: 0.5}"]
    arms.append("arms.some={rule: augmentation, n_real: 60, n_synthetic: 240}")
    found = {tuple(pair["arms"]): pair for pair in compared(*arms)["control"]}
    assert list(found) == [("none", "fresh"), ("some", "fresh")]
    ends = found["none", "fresh"]["final_ratio"]
    assert ends["low"] < ends["mean"] < ends["high"]
    apart = compared(arms[0], "arms.other={rule: real_only, n_ini: 60, family: categorical}")
    assert "control" not in apart
    assert "control" not in compared(arms[0], "arms.same={rule: fully_synthetic, n_ini: 60, sampling_bias: 0.9}")


def test_a_verdict_says_how_much_the_distance_grew_and_is_json() -> None:
    grown = verdict({"fid": np.array([[1.0, 2, 4], [2.0, 2, 8], [1.0, 3, 4]])})
    assert grown is not None
    assert grown["growth"] == {"metric": "fid", "mean": 4.0, "low": 4.0, "high": 4.0}
    near, far = (verdict({"fid": np.full((3, 2), 4.4)}, {"fid": each}) for each in (1.0, 0.4))
    assert near is not None
    assert far is not None
    assert not any("learnt little" in each for each in near["warnings"])
    assert "The first generation is 11 times as far from real samples" in far["warnings"][-1]
    alone = verdict({"fid": np.array([[1.0, 4]])})
    json.dumps(alone, allow_nan=False)
    assert alone is not None
    assert (alone["growth"]["mean"], alone["growth"]["low"]) == (4.0, None)
    assert verdict({"own_measure": np.ones((2, 2))}) is None  # of a generator of one's own
    assert "growth" not in (verdict({"total_variation": np.ones((2, 2)), "heterozygosity": np.ones((2, 2))}) or {})
