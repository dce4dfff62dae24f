"""The closed-form families, run through data rules and tasks, obey their exact laws: within 3 standard errors of at
most 1 % of the value, at three settings of each loop. (That the laws themselves are right is test_exact_laws.py's.)"""

import json
from typing import Any

import numpy as np
import pytest

from orchestration.experiments.mad.analysis import laws
from orchestration.experiments.mad.config import ArmSettings
from orchestration.experiments.mad.loop import chain
from pipelines.mad.graph import RealSource
from pipelines.mad.tasks import perform
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import in_order

GENERATIONS = 4
NUMBERS = 45_000  # means of one coordinate: universes × dimensions, of which only the universes cost a stream each


def measured(arm: ArmSettings, generations: int, universes: int, last: int = 0) -> dict[str, np.ndarray]:
    """Each metric (universes, last) of the ``last`` generations (0: all) of a chain, its tasks done one by one."""
    measures = [each.measure for each in chain("arm", arm, range(universes), generations, RealSource(100))][-last:]
    results: dict[str, Files] = {}
    for task in in_order(measures):
        results[task.key] = perform(task.kind, task.parameters, [results[each.key] for each in task.inputs], "cpu")
    found = [json.loads(results[task.key]["metrics.json"])["metrics"] for task in measures]
    return {metric: np.array([each[metric] for each in found]).T for metric in found[0]}


def deviations(
    arm: ArmSettings,
    metrics: set[str],
    against: ArmSettings | None = None,
    universes: int | None = None,
    generations: int = GENERATIONS,
    given: tuple[str, ...] = (),
) -> dict[str, float]:
    """How many standard errors ``metrics`` of the last generation are away from their laws.

    What of them is linear in metrics ``given``, whose laws are known, adds nothing to their error (control variates).
    """
    universes = universes or NUMBERS // arm.dimension
    values, exact = measured(arm, generations, universes, last=1), laws(against or arm, generations)
    last = {name: values[name][:, -1] - law[-1] for name, law in exact.items()}
    found = {}
    for metric in metrics & exact.keys():
        causes = np.stack([np.ones(universes), *(last[each] for each in given)], axis=1)
        (mean, *_), (rest,), *_ = np.linalg.lstsq(causes, last[metric], rcond=None)
        error = np.sqrt(rest / (universes - len(given) - 1) / universes)
        size = error / abs(exact[metric][-1])
        assert size <= 0.01, f"{metric}: the standard error is {size:.2%}"
        found[metric] = mean / error
    return found


GAUSSIAN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "fully synthetic": (
        {"dimension": 7, "rule": "fully_synthetic", "n_ini": 12},
        {"variance", "mean_square", "log_det"},
    ),
    "fully synthetic, biased": (
        {"dimension": 12, "rule": "fully_synthetic", "n_ini": 30, "n_synthetic": 15, "sampling_bias": 0.8},
        {"variance", "mean_square", "log_det"},
    ),
    "fully synthetic, mle": (
        {"dimension": 9, "rule": "fully_synthetic", "n_ini": 10, "n_synthetic": 20, "covariance": "mle"},
        {"variance", "mean_square", "log_det"},
    ),
    "fresh": (
        {"dimension": 9, "rule": "fresh", "n_ini": 10, "n_real": 5, "n_synthetic": 15},
        {"variance", "mean_square"},
    ),
    "fresh, biased": (
        {"dimension": 15, "rule": "fresh", "n_ini": 40, "n_real": 10, "n_synthetic": 10, "sampling_bias": 0.6},
        {"variance", "mean_square"},
    ),
    "fresh, schedule": (
        {"dimension": 15, "rule": "fresh", "n_ini": 20, "fresh_fraction": (0.5, 0.1, 0.3)},
        {"variance", "mean_square"},
    ),
    "corrected": (
        {"dimension": 9, "rule": "corrected", "n_ini": 12, "n_real": 0, "n_synthetic": 12, "correction": 0.25},
        {"variance", "mean_square"},
    ),
    "corrected, beside new real data": (
        {"dimension": 15, "rule": "corrected", "n_ini": 20, "n_real": 5, "n_synthetic": 10, "sampling_bias": 0.7}
        | {"real_supply": "fresh"},
        {"variance", "mean_square"},
    ),
    "corrected, mle": (
        {"dimension": 7, "rule": "corrected", "n_ini": 16, "n_real": 2, "n_synthetic": 14, "correction": 4.0}
        | {"real_supply": "fresh", "covariance": "mle"},
        {"variance", "mean_square"},
    ),
    "augmentation": (
        {"dimension": 9, "rule": "augmentation", "n_real": 10, "n_synthetic": 10},
        {"variance", "mean_square"},
    ),
    "augmentation, biased": (
        {"dimension": 15, "rule": "augmentation", "n_real": 20, "n_synthetic": 10, "sampling_bias": 0.7},
        {"variance", "mean_square"},
    ),
    "augmentation, mle": (
        {"dimension": 7, "rule": "augmentation", "n_real": 8, "n_synthetic": 24, "covariance": "mle"},
        {"variance", "mean_square"},
    ),
    "accumulate": (
        {"dimension": 9, "rule": "accumulate", "n_ini": 10, "covariance": "mle"},
        {"variance", "mean_square"},
    ),
    "accumulate, biased": (
        {"dimension": 12, "rule": "accumulate", "n_ini": 15, "sampling_bias": 0.7},
        {"variance", "mean_square"},
    ),
    "accumulate, small batches": (
        {"dimension": 15, "rule": "accumulate", "n_ini": 20, "n_synthetic": 5, "covariance": "mle"},
        {"variance", "mean_square"},
    ),
    "subsample": (
        {"dimension": 9, "rule": "accumulate_subsample", "n_ini": 10, "covariance": "mle"},
        {"variance", "mean_square"},
    ),
    "subsample, unbiased": (
        {"dimension": 12, "rule": "accumulate_subsample", "n_ini": 15},
        {"variance", "mean_square"},
    ),
    "subsample, biased": (
        {"dimension": 15, "rule": "accumulate_subsample", "n_ini": 20, "covariance": "mle", "sampling_bias": 0.8},
        {"variance", "mean_square"},
    ),
}


@pytest.mark.parametrize("loop", GAUSSIAN)
def test_gaussian_loops_obey_their_laws(loop: str) -> None:
    settings, metrics = GAUSSIAN[loop]
    found = deviations(ArmSettings(family="gaussian", **settings), metrics)
    assert set(found) == metrics
    assert max(map(abs, found.values())) < 3, found


REMEMBERING: dict[str, dict[str, Any]] = {
    "new real data": {"n_ini": 9, "n_real": 2, "n_synthetic": 12, "real_supply": "fresh", "sampling_bias": 0.9},
    "the same real data": {"n_ini": 6, "n_real": 6, "n_synthetic": 12},
}


@pytest.mark.parametrize("loop", REMEMBERING)
def test_the_memory_loop_obeys_its_law(loop: str) -> None:
    """Mean only. Were rows read again, the last two models' samples would not be independent."""
    arm = ArmSettings(family="gaussian", rule="memory", memory=3, dimension=10, covariance="known", **REMEMBERING[loop])
    metrics = {"mean_square", "w2_squared"}
    found = deviations(arm, metrics, universes=2500, generations=5)
    assert set(found) == metrics
    assert max(map(abs, found.values())) < 3, found


def test_the_memory_loop_obeys_its_law_with_a_fitted_covariance() -> None:
    settings = {"n_ini": 12, "n_real": 4, "n_synthetic": 10, "memory": 2, "real_supply": "fresh"}
    arm = ArmSettings(family="gaussian", rule="memory", dimension=8, **settings)  # type: ignore[arg-type]
    found = deviations(arm, {"variance", "mean_square"}, universes=4000)
    assert max(map(abs, found.values())) < 3, found


def test_a_variance_far_below_its_mean_keeps_its_digits() -> None:
    """With λ = 1e-6 the spread of generation 4 is a billionth of a billionth of the mean's size."""
    arm = ArmSettings(family="gaussian", rule="fully_synthetic", n_ini=20, dimension=2, sampling_bias=1e-6)
    values, exact = measured(arm, 8, 2000), laws(arm, 8)
    for metric in ("log_det", "mean_square"):
        error = values[metric].std(axis=0, ddof=1) / np.sqrt(2000)
        assert (np.abs(values[metric].mean(axis=0) - exact[metric]) < 3 * error).all()
    assert exact["log_det"][-1] < -190


@pytest.mark.parametrize(("n", "bias"), [(10, 1.0), (20, 0.8), (15, 0.5)])
def test_the_distance_of_a_line_obeys_its_law(n: int, bias: float) -> None:
    arm = ArmSettings(family="gaussian", rule="fully_synthetic", n_ini=n, sampling_bias=bias)
    assert abs(deviations(arm, {"w2_squared"}, universes=7000, given=("variance", "mean_square"))["w2_squared"]) < 3


@pytest.mark.parametrize(("n_ini", "n", "categories"), [(20, 20, 4), (50, 10, 10), (8, 30, 3)])
def test_categorical_loops_obey_drift(n_ini: int, n: int, categories: int) -> None:
    arm = ArmSettings(family="categorical", categories=categories, n_ini=n_ini, n_synthetic=n)
    found = deviations(arm, {"heterozygosity"}, universes=12_000)
    assert abs(found["heterozygosity"]) < 3


@pytest.mark.parametrize(("n_real", "n", "correction"), [(0, 20, 1.0), (5, 10, 0.2), (2, 30, 0.5)])
def test_corrected_categorical_loops_obey_their_law(n_real: int, n: int, correction: float) -> None:
    settings = {"n_ini": 20, "n_real": n_real, "n_synthetic": n, "correction": correction, "real_supply": "fresh"}
    arm = ArmSettings(family="categorical", categories=4, rule="corrected", **settings)  # type: ignore[arg-type]
    assert abs(deviations(arm, {"heterozygosity"}, universes=4000)["heterozygosity"]) < 3


@pytest.mark.parametrize(("ran", "law"), [("mle", "unbiased"), ("unbiased", "mle")])
def test_one_covariance_does_not_pass_for_the_other(ran: Any, law: Any) -> None:
    arms = [ArmSettings(family="gaussian", dimension=3, n_ini=12, covariance=each) for each in (ran, law)]
    found = deviations(arms[0], {"variance", "log_det"}, against=arms[1])
    assert abs(found["variance"]) > 6
    assert abs(found["log_det"]) > 6


def test_loops_without_a_law_have_none() -> None:
    for settings in (
        {"rule": "memory", "n_real": 5, "n_synthetic": 9},
        {"rule": "curated", "n_real": 5, "n_synthetic": 9},
        {"rule": "corrected", "n_real": 5, "n_synthetic": 9},  # always the same real samples
    ):
        assert laws(ArmSettings(family="gaussian", **settings), 3) == {}  # type: ignore[arg-type]
    weighted = ArmSettings(family="gaussian", rule="augmentation", n_real=5, n_synthetic=9, real_weight=2.0)
    assert laws(weighted, 3) == {}
    assert laws(ArmSettings(family="categorical", n_ini=5, sampling_bias=0.5), 3) == {}
