"""Every exact law against a simulation of the loop itself, sample by sample."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from policies.loops.laws import (
    Laws,
    accumulate,
    accumulate_subsample,
    augmentation,
    categorical,
    corrected,
    corrected_categorical,
    fresh,
    fresh_steady_state,
    fully_synthetic,
)

WORK = 12_000_000  # numbers drawn a simulation: so many universes that an expectation is known to 1 %


def fit(points: np.ndarray, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean (universes, d) and covariance (universes, d, d) of points (universes, n, d)."""
    mean = points.mean(axis=1)
    centred = points - mean[:, None]
    scatter = np.swapaxes(centred, 1, 2) @ centred
    return mean, scatter / (points.shape[1] - (covariance == "unbiased"))


def draw(
    model: tuple[np.ndarray, np.ndarray], count: int, sampling_bias: float, rng: np.random.Generator
) -> np.ndarray:
    """Samples (universes, count, d) of N(mean, λ covariance)."""
    mean, covariance = model
    root = np.linalg.cholesky(sampling_bias * covariance)
    return mean[:, None] + rng.standard_normal((len(mean), count, mean.shape[1])) @ np.swapaxes(root, 1, 2)


def simulate(loop: Callable[[np.random.Generator, int], Iterator[tuple]], numbers: int, metrics: Laws) -> Laws:
    """Values (universes, generations) of each of ``metrics``; a universe of the loop draws ``numbers`` numbers."""
    rng, values = np.random.default_rng(2), {name: [] for name in metrics}
    for mean, covariance in loop(rng, WORK // numbers):
        d, square, trace = mean.shape[1], np.sum(mean**2, axis=1), np.trace(covariance, axis1=1, axis2=2)
        measured = {"variance": lambda t=trace, d=d: t / d, "mean_square": lambda s=square, d=d: s / d}
        measured["log_det"] = lambda c=covariance: np.linalg.slogdet(c)[1]
        measured["w2_squared"] = lambda s=square, t=trace: s + (np.sqrt(t) - 1) ** 2
        for name in metrics:
            values[name].append(measured[name]())
    return {name: np.stack(columns, axis=1) for name, columns in values.items()}


def deviations(law: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standard errors between law and simulation at the generations where the standard error is at most 1 %."""
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    known = error <= 0.01 * np.abs(law)
    assert known[-1], f"the last generation is known only to {error[-1] / abs(law[-1]):.2%}"
    return ((values.mean(axis=0) - law) / error)[known]


def assert_agree(laws: Laws, values: Laws) -> None:
    assert laws.keys() == values.keys()
    for name, law in laws.items():
        assert np.abs(deviations(law, values[name])).max() < 3, name


def assert_rejected(laws: Laws, values: Laws) -> None:
    assert np.abs(deviations(laws["variance"], values["variance"])[-1]) > 3


def synthetic_loop(
    generations: int, n_ini: int, n_synthetic: int, dimension: int, sampling_bias: float, covariance: str
) -> Callable[[np.random.Generator, int], Iterator[tuple]]:
    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        model = fit(rng.standard_normal((universes, n_ini, dimension)), covariance)
        yield model
        for _ in range(generations - 1):
            model = fit(draw(model, n_synthetic, sampling_bias, rng), covariance)
            yield model

    return loop


SYNTHETIC = [
    {"n_ini": 40, "n_synthetic": 25, "dimension": 3, "sampling_bias": 1.0, "covariance": "unbiased"},
    {"n_ini": 12, "n_synthetic": 30, "dimension": 1, "sampling_bias": 0.8, "covariance": "unbiased"},
    {"n_ini": 20, "n_synthetic": 15, "dimension": 1, "sampling_bias": 0.9, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", SYNTHETIC)
def test_fully_synthetic(setting: dict) -> None:
    laws = fully_synthetic(generations=6, **setting)
    assert ("w2_squared" in laws) == (setting["dimension"] == 1)
    numbers = setting["dimension"] * (setting["n_ini"] + 5 * setting["n_synthetic"])
    assert_agree(laws, simulate(synthetic_loop(6, **setting), numbers, laws))


def test_unbiased_and_mle_reject_each_other() -> None:
    setting = {"n_ini": 30, "n_synthetic": 30, "dimension": 2, "sampling_bias": 1.0}
    for truth, other in [("unbiased", "mle"), ("mle", "unbiased")]:
        laws = fully_synthetic(generations=5, **setting, covariance=truth)
        values = simulate(synthetic_loop(5, **setting, covariance=truth), 300, laws)
        assert_agree(laws, values)
        assert_rejected(fully_synthetic(generations=5, **setting, covariance=other), values)


def test_fully_synthetic_variance_is_flat_while_its_typical_value_falls() -> None:
    laws = fully_synthetic(
        generations=50, n_ini=20, n_synthetic=20, dimension=1, sampling_bias=1.0, covariance="unbiased"
    )
    np.testing.assert_allclose(laws["variance"], 1)
    assert laws["log_det"][-1] < -2.5
    np.testing.assert_allclose(np.diff(laws["mean_square"]), 1 / 20)


def test_log_det_needs_more_samples_than_dimensions() -> None:
    laws = fully_synthetic(
        generations=3, n_ini=30, n_synthetic=4, dimension=4, sampling_bias=1.0, covariance="unbiased"
    )
    assert laws.keys() == {"variance", "mean_square"}


FRESH = [
    {"n_ini": 10, "n_real": 10, "n_synthetic": 20, "sampling_bias": 1.0, "covariance": "unbiased"},
    {"n_ini": 30, "n_real": [5, 8, 2, 12, 3], "n_synthetic": [9, 30, 14, 6, 18], "sampling_bias": 0.7}
    | {"covariance": "unbiased"},
    {"n_ini": 15, "n_real": 4, "n_synthetic": [12, 6, 16, 9, 11], "sampling_bias": 0.9, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", FRESH)
def test_fresh(setting: dict) -> None:
    laws = fresh(generations=6, **setting)
    sizes = list(zip(*(np.broadcast_to(setting[key], 5) for key in ("n_real", "n_synthetic")), strict=True))

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        model = fit(rng.standard_normal((universes, setting["n_ini"], 3)), setting["covariance"])
        yield model
        for n_real, n_synthetic in sizes:
            real = rng.standard_normal((universes, n_real, 3))
            synthetic = draw(model, n_synthetic, setting["sampling_bias"], rng)
            model = fit(np.concatenate([real, synthetic], axis=1), setting["covariance"])
            yield model

    assert_agree(laws, simulate(loop, 3 * (setting["n_ini"] + int(np.sum(sizes))), laws))


@pytest.mark.parametrize(("n_real", "n_synthetic", "sampling_bias"), [(10, 90, 1.0), (3, 5, 0.5), (1, 4, 0.9)])
def test_fresh_forgets_where_it_began(n_real: int, n_synthetic: int, sampling_bias: float) -> None:
    sizes = {"n_real": n_real, "n_synthetic": n_synthetic, "sampling_bias": sampling_bias}
    v, c = fresh_steady_state(**sizes)
    for n_ini in (2, 1000):
        laws = fresh(generations=400, n_ini=n_ini, covariance="unbiased", **sizes)
        assert laws["variance"][-1] == pytest.approx(v, rel=1e-9)
        assert laws["mean_square"][-1] == pytest.approx(c, rel=1e-9)


CORRECTED = [
    {"n_ini": 20, "n_real": 0, "n_synthetic": 20, "kept": 0.6, "sampling_bias": 1.0, "covariance": "unbiased"},
    {"n_ini": 12, "n_real": [5, 2, 8, 3], "n_synthetic": [9, 14, 6, 18], "kept": 0.5, "sampling_bias": 0.7}
    | {"covariance": "unbiased"},
    {"n_ini": 15, "n_real": 2, "n_synthetic": 8, "kept": 0.9, "sampling_bias": 0.9, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", CORRECTED)
def test_corrected(setting: dict) -> None:
    laws = corrected(generations=5, **setting)
    sizes = list(zip(*(np.broadcast_to(setting[key], 4) for key in ("n_real", "n_synthetic")), strict=True))

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        model = fit(rng.standard_normal((universes, setting["n_ini"], 3)), setting["covariance"])
        yield model
        for n_real, n_synthetic in sizes:
            drawn = draw(model, n_synthetic, setting["sampling_bias"], rng)
            stays = rng.random((universes, n_synthetic, 1)) < setting["kept"]
            synthetic = np.where(stays, drawn, rng.standard_normal(drawn.shape))
            model = fit(np.concatenate([rng.standard_normal((universes, n_real, 3)), synthetic], 1), "unbiased")
            if setting["covariance"] == "mle":
                model = model[0], model[1] * (1 - 1 / (n_real + n_synthetic))
            yield model

    values = simulate(loop, 3 * (setting["n_ini"] + int(np.sum(sizes))), laws)
    assert_agree(laws, values)
    # As if what was corrected no longer depended on where the model was.
    naive = np.array(laws["mean_square"])
    for t, (_, n_synthetic) in enumerate(sizes, start=1):
        share = setting["kept"] * n_synthetic / sum(sizes[t - 1])
        naive[t] -= share**2 * laws["mean_square"][t - 1]
    assert np.abs(deviations(naive, values["mean_square"])[1:]).min() > 3


def test_correction_is_what_so_much_fresh_data_is() -> None:
    """To keep all is the fresh loop; to keep nothing is a first generation each time."""
    sizes: dict[str, Any] = {"n_ini": 20, "n_real": 5, "n_synthetic": 15, "sampling_bias": 0.8, "generations": 6}
    for covariance in ("unbiased", "mle", "known"):
        how = {**sizes, "covariance": covariance}
        for metric, values in fresh(**how).items():
            np.testing.assert_allclose(corrected(kept=1.0, **how)[metric], values)
            np.testing.assert_allclose(corrected(kept=0.0, **how)[metric], values[0])


AUGMENTATION = [
    {"n_real": 10, "n_synthetic": 20, "sampling_bias": 1.0, "covariance": "unbiased"},
    {"n_real": 5, "n_synthetic": 25, "sampling_bias": 0.7, "covariance": "unbiased"},
    {"n_real": 8, "n_synthetic": 8, "sampling_bias": 0.9, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", AUGMENTATION)
def test_augmentation(setting: dict) -> None:
    laws = augmentation(generations=6, **setting)

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        real = rng.standard_normal((universes, setting["n_real"], 3))
        model = fit(real, setting["covariance"])
        yield model
        for _ in range(5):
            synthetic = draw(model, setting["n_synthetic"], setting["sampling_bias"], rng)
            model = fit(np.concatenate([real, synthetic], axis=1), setting["covariance"])
            yield model

    assert_agree(laws, simulate(loop, 3 * (setting["n_real"] + 5 * setting["n_synthetic"]), laws))


@pytest.mark.parametrize("setting", [s for s in AUGMENTATION if s["covariance"] == "unbiased"])
def test_augmentation_tends_to_the_limit_for_a_given_real_set(setting: dict) -> None:
    """v = [pN/(N−1)] Ŝ/(1 − λq − λq²/((N−1)(1+q))) with E Ŝ = 1 − 1/n_r, the real set's MLE variance."""
    total = setting["n_real"] + setting["n_synthetic"]
    p, q, bias = setting["n_real"] / total, setting["n_synthetic"] / total, setting["sampling_bias"]
    limit = p * total / (total - 1) * (1 - 1 / setting["n_real"])
    limit /= 1 - bias * q - bias * q**2 / ((total - 1) * (1 + q))
    assert augmentation(generations=300, **setting)["variance"][-1] == pytest.approx(limit, rel=1e-9)


MEMORY = [
    {"n_real": 4, "n_synthetic": 14, "memory": 3, "sampling_bias": 0.8, "covariance": "unbiased"},
    {"n_real": 6, "n_synthetic": 9, "memory": 4, "sampling_bias": 1.0, "covariance": "mle"},
    {"n_real": 2, "n_synthetic": 18, "memory": 2, "sampling_bias": 0.5, "covariance": "known"},
]


@pytest.mark.parametrize("again", [False, True], ids=["new real data", "the same real data"])
@pytest.mark.parametrize("setting", MEMORY)
def test_memory(setting: dict, again: bool) -> None:
    n_real, n_synthetic, covariance = setting["n_real"], setting["n_synthetic"], setting["covariance"]
    laws = augmentation(generations=7, **setting) if again else fresh(generations=7, n_ini=n_real, **setting)

    def fitted(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, spread = fit(points, covariance)
        return mean, np.tile(np.eye(2), (len(mean), 1, 1)) if covariance == "known" else spread

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        real = rng.standard_normal((universes, n_real, 2))
        models = [fitted(real)]
        yield models[-1]
        for _ in range(6):
            real = real if again else rng.standard_normal((universes, n_real, 2))
            remembered = models[-setting["memory"] :]
            share, rest = divmod(n_synthetic, len(remembered))
            counts = [share] * (len(remembered) - rest) + [share + 1] * rest
            drawn = [draw(*each, setting["sampling_bias"], rng) for each in zip(remembered, counts, strict=True)]
            models.append(fitted(np.concatenate([real, *drawn], axis=1)))
            yield models[-1]

    metrics = {"mean_square": laws["mean_square"]} if covariance == "known" else laws
    assert_agree(metrics, simulate(loop, 4 * 7 * (n_real + n_synthetic), metrics))
    if covariance == "known":
        np.testing.assert_array_equal(laws["variance"], 1)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("covariance", ["unbiased", "mle"])
def test_a_memory_of_one_is_the_recursion_of_the_last_model(covariance: Any, again: bool) -> None:
    """V_t = p' + λqV_{t−1} + pq N/(N−1) C_{t−1}, C_t = (p″ + λqV_{t−1})/N + q²C_{t−1}, as it is derived by hand for one
    predecessor; for a fixed real set C is about the set's own mean, p' = (n_r − 1)/(N − 1) and p″ = 0."""
    n_real, n_synthetic, bias, total = 6, 10, 0.7, 16
    p, q = n_real / total, n_synthetic / total
    sizes = {"n_real": n_real, "n_synthetic": n_synthetic, "sampling_bias": bias, "covariance": covariance}
    laws = augmentation(generations=9, **sizes) if again else fresh(generations=9, n_ini=n_real, **sizes)
    mle = covariance == "mle"
    v, c = 1 - mle / n_real, 0.0 if again else 1 / n_real
    for t in range(1, 9):
        within = (n_real - 1) / (total - 1) if again else p
        v, c = (
            (1 - mle / total) * (within + bias * q * v + p * q * total / (total - 1) * c),
            ((0 if again else p) + bias * q * v) / total + q**2 * c,
        )
        assert laws["variance"][t] == pytest.approx(v)
        assert laws["mean_square"][t] == pytest.approx(c + (1 / n_real if again else 0))


@pytest.mark.parametrize(("memory", "least", "most"), [(1, 1.9, 1.9), (5, 4.2, 4.35), (10, 5.7, 6.1), (20, 7.2, 7.7)])
def test_memory_is_worth_what_the_paper_found(memory: int, least: float, most: float) -> None:
    """Figure 30 of 2307.01850: n_e/n_r for n_r : n_s = 1 : 9, mean only, where n_e = 1/C."""
    laws = fresh(
        generations=800,
        n_ini=2000,
        n_real=20,
        n_synthetic=180,
        sampling_bias=1.0,
        covariance="known",
        memory=memory,
    )
    assert least - 1e-9 <= 1 / laws["mean_square"][-1] / 20 <= most + 1e-9


def test_laws_without_synthetic_or_without_real_samples() -> None:
    common: dict[str, Any] = {"generations": 5, "sampling_bias": 0.8, "covariance": "unbiased"}
    alone = {"variance": np.ones(5), "mean_square": np.full(5, 0.1)}
    for laws in (
        fresh(**common, n_ini=10, n_real=10, n_synthetic=0),
        augmentation(**common, n_real=10, n_synthetic=0),
        accumulate(**common, n_ini=10, n_synthetic=0),
    ):
        for name, law in alone.items():
            np.testing.assert_allclose(laws[name], law)
    synthetic = fully_synthetic(**common, n_ini=10, n_synthetic=7, dimension=9)
    for name, law in fresh(**common, n_ini=10, n_real=0, n_synthetic=7).items():
        np.testing.assert_allclose(law, synthetic[name])


ACCUMULATE = [
    {"n_ini": 12, "n_synthetic": 12, "sampling_bias": 1.0, "covariance": "mle"},
    {"n_ini": 5, "n_synthetic": 15, "sampling_bias": 0.8, "covariance": "unbiased"},
    {"n_ini": 20, "n_synthetic": 6, "sampling_bias": 0.7, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", ACCUMULATE)
def test_accumulate(setting: dict) -> None:
    laws = accumulate(generations=6, **setting)

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        pool = rng.standard_normal((universes, setting["n_ini"], 3))
        for _ in range(6):
            model = fit(pool, setting["covariance"])
            yield model
            pool = np.concatenate([pool, draw(model, setting["n_synthetic"], setting["sampling_bias"], rng)], axis=1)

    assert_agree(laws, simulate(loop, 3 * (setting["n_ini"] + 6 * setting["n_synthetic"]), laws))


@pytest.mark.parametrize("n", [2, 7, 30])
def test_accumulated_maximum_likelihood_falls_to_the_sine(n: int) -> None:
    laws = accumulate(generations=5000, n_ini=n, n_synthetic=n, sampling_bias=1.0, covariance="mle")
    steps = np.arange(1, 5001)
    np.testing.assert_allclose(laws["variance"], np.cumprod(1 - 1 / (steps**2 * n)), rtol=1e-9)
    assert laws["variance"][-1] == pytest.approx(np.sinc(1 / np.sqrt(n)), rel=1e-3)


SUBSAMPLE = [
    {"n": 12, "sampling_bias": 1.0, "covariance": "mle"},
    {"n": 20, "sampling_bias": 0.7, "covariance": "unbiased"},
    {"n": 8, "sampling_bias": 0.9, "covariance": "mle"},
]


@pytest.mark.parametrize("setting", SUBSAMPLE)
def test_accumulate_subsample(setting: dict) -> None:
    laws, n = accumulate_subsample(generations=6, **setting), setting["n"]

    def loop(rng: np.random.Generator, universes: int) -> Iterator[tuple]:
        pool = rng.standard_normal((universes, n, 3))
        for _ in range(6):
            # The n smallest of independent keys are a uniform draw without replacement.
            keys = rng.random(pool.shape[:2], dtype=np.float32)
            chosen = np.argpartition(keys, n - 1, axis=1)[:, :n]
            model = fit(np.take_along_axis(pool, chosen[..., None], axis=1), setting["covariance"])
            yield model
            pool = np.concatenate([pool, draw(model, n, setting["sampling_bias"], rng)], axis=1)

    assert_agree(laws, simulate(loop, 3 * n * 7, laws))


@pytest.mark.parametrize(
    ("n_ini", "n", "probabilities"), [(10, 10, [0.5, 0.5]), (30, 8, [0.7, 0.2, 0.1]), (6, 25, [0.1] * 10)]
)
def test_categorical(n_ini: int, n: int, probabilities: list[float]) -> None:
    rng = np.random.default_rng(2)
    frequencies, values = np.tile(probabilities, (50_000, 1)), []
    for size in [n_ini, n, n, n, n, n]:
        # Division may leave a sum of 1 + 2e-16, which the multinomial refuses.
        frequencies = rng.multinomial(size, frequencies / frequencies.sum(axis=1, keepdims=True)) / size
        values.append(1 - np.sum(frequencies**2, axis=1))
    laws = categorical(generations=6, n_ini=n_ini, n=n, probabilities=probabilities)
    assert_agree(laws, {"heterozygosity": np.stack(values, axis=1)})


@pytest.mark.parametrize(
    ("n_ini", "n_real", "n_synthetic", "kept"), [(10, 0, 10, 0.5), (30, 3, 8, 0.9), (6, 10, 25, 0.7)]
)
def test_corrected_categorical(n_ini: int, n_real: int, n_synthetic: int, kept: float) -> None:
    rng, real, values = np.random.default_rng(2), np.array([0.5, 0.3, 0.2]), []
    frequencies = rng.multinomial(n_ini, real, 50_000) / n_ini
    for generation in range(5):
        if generation:
            mixed = kept * frequencies + (1 - kept) * real
            counts = rng.multinomial(n_synthetic, mixed / mixed.sum(axis=1, keepdims=True))
            frequencies = (counts + rng.multinomial(n_real, real, 50_000)) / (n_synthetic + n_real)
        values.append(1 - np.sum(frequencies**2, axis=1))
    sizes = {"n_ini": n_ini, "n_real": n_real, "n_synthetic": n_synthetic}
    laws = corrected_categorical(generations=5, kept=kept, probabilities=list(real), **sizes)
    assert_agree(laws, {"heterozygosity": np.stack(values, axis=1)})
