"""How often do 95 % intervals hold what they are intervals of? Every kind that the product prints, by simulation.

``python -m benchmarks.coverage`` prints the share of experiments, in percent, whose interval holds the truth, for
several numbers of seeds and distributions such as seeds have, and ends with 1 unless each is 93 to 97. A dash: no
interval is printed there; in brackets, in how many percent of the experiments one is. About a minute on one core.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np

from orchestration.runs.manifest import git_commit
from policies.common.intervals import Scale, interval, paired, rank_correlation, share_of
from policies.loops.effective_samples import limits, wasserstein_squared

SEEDS = (3, 5, 10, 50, 500)
EXPERIMENTS = 6_000
TRUTH = 500_000  # draws
LEAST, MOST = 93.0, 97.0
Draw = Callable[[tuple[int, ...]], np.ndarray]
Row = tuple[
    str, str, Callable[[int], np.ndarray]
]  # what, of what, seeds → low − truth and high − truth (2, experiments)

rng = np.random.default_rng(0)
LEVELS = np.array([0, 0.05, 0.1, 0.2, 0.4])  # fresh fractions


def main() -> int:
    """Print the table and return 1 if an interval does not hold what it says."""
    print(f"commit {git_commit()}\n{'interval of':<34}{'seeds are':<34}" + "".join(f"{seeds:>12}" for seeds in SEEDS))
    bad = 0
    for what, of, ends in rows():
        cells = []
        for seeds in SEEDS:
            low, high = ends(seeds)
            printed = np.isfinite(low) & np.isfinite(high)
            held = 100 * np.mean(((low <= 0) & (high >= 0))[printed]) if printed.any() else np.nan
            bad += bool(printed.any()) and not LEAST <= held <= MOST
            some = f" ({100 * printed.mean():.0f})" if 0 < printed.mean() < 1 else ""
            cells.append(f"{held:.1f}{some}" if printed.any() else "–")
        print(f"{what:<34}{of:<34}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    verdict = "MISSED" if bad else "kept"
    print(f"{verdict:<8}every interval that is printed holds in {LEAST:.0f} to {MOST:.0f} %; {bad} do not")
    return int(bad > 0)


def rows() -> Iterator[Row]:
    """Every interval of :mod:`policies.common.intervals`, with its users in brackets."""
    normal: Draw = lambda shape: rng.normal(1, 0.3, shape)  # noqa: E731
    yield "mean (metrics, sweeps)", "normal", at_once(normal, "plain")
    for sigma in (0.2, 0.5, 1.0):
        yield "geometric mean (FID)", f"log-normal, σ = {sigma}", at_once(lognormal(sigma), "logarithm")
    yield "geometric mean (FID)", "gamma, k = 4", at_once(lambda shape: rng.gamma(4, size=shape), "logarithm")
    for mean, deviation in ((0.95, 0.02), (0.7, 0.17), (0.1, 0.065), (0.03, 0.02)):
        what = f"share {mean} ± {deviation} of 400 images"
        yield "mean on arcsin √p (precision …)", what, at_once(share(mean, deviation), "share")
    for name, draw in (
        ("χ², 1 degree of freedom", lambda shape: rng.chisquare(1, shape)),
        ("log-normal, σ = 1", lognormal(1)),
        ("log-normal, σ = 0.5", lognormal(0.5)),
        ("χ², 100 degrees of freedom", chisquare(100)),
    ):
        yield "expectation (closed forms)", name, at_once(draw, "expectation")
    yield "expectation (n_e/n_r)", "limits of W₂², d = 1", at_once(steady(1), "expectation")
    yield "expectation (n_e/n_r)", "limits of W₂², d = 10", at_once(steady(10), "expectation")
    loop, alone = limits(20, 20, 0.8, (20_000, 2), seed=0)
    yield "excess (largest admissible n_s)", "differences of limits, d = 2", at_once(pick(loop - alone), "plain")
    for first, last in ((0.4, 0.4), (0.8, 0.2)):
        of = f"log-normal, σ = {first}, {last}"
        yield "log-ratio (verdict, n_ini, gain)", of, changes(lognormal(first), lognormal(last), "fid")
    for freedom in (2, 100):
        of = f"χ², {freedom} degrees of freedom"
        yield "log-ratio (verdict on W₂²)", of, changes(chisquare(freedom), chisquare(freedom), "w2_squared")
    for last in ((0.7, 0.17), (0.1, 0.065)):
        of = f"share .93 ± .02 to {last[0]} ± {last[1]}"
        yield "change of a share (verdict, gain)", of, changes(share(*last), share(0.93, 0.02), "precision")
    for mean, deviation, images in ((0.1, 0.065, 400), (0.12, 0.08, 60), (0.05, 0.04, 36)):
        of = f"share {mean} ± {deviation} of {images} images"
        yield "share of the control's (claims)", of, left(share(mean, deviation, images), share(0.95, 0.02, images))
    for noise in (0.1, 0.3, 1.0):
        yield "rank correlation", f"FID falls, noise {noise} of its fall", correlations(noise)


def at_once(draw: Draw, scale: Scale) -> Callable[[int], np.ndarray]:
    """The ends of means on a scale around that scale's true mean."""
    truth = interval(draw((TRUTH,)), scale).mean
    return lambda seeds: np.stack(interval(draw((seeds, EXPERIMENTS)), scale)[1:]) - truth


def changes(a: Draw, b: Draw, metric: str) -> Callable[[int], np.ndarray]:
    """Those of the change of a metric from b to a around the true one."""
    truth = paired(a((TRUTH,)), b((TRUTH,)), metric)[0].mean
    return lambda seeds: np.stack(paired(a((seeds, EXPERIMENTS)), b((seeds, EXPERIMENTS)), metric)[0][1:]) - truth


def left(a: Draw, b: Draw) -> Callable[[int], np.ndarray]:
    """Those of how much of b is left in a around the true mean on a share's scale."""
    truth = interval(share_of(a((TRUTH,)), b((TRUTH,))), "share").mean

    def ends(seeds: int) -> np.ndarray:
        return np.stack(interval(share_of(a((seeds, EXPERIMENTS)), b((seeds, EXPERIMENTS))), "share")[1:]) - truth

    return ends


def correlations(noise: float) -> Callable[[int], np.ndarray]:
    """Those of a rank correlation around the true one, from seeds drawn from many."""
    draw = lambda seeds: np.exp(-3 * LEVELS + noise * rng.normal(size=(seeds, len(LEVELS))))  # noqa: E731
    each = np.array(rank_correlation(LEVELS, draw(5_000)).each)
    truth = interval(each, "correlation").mean

    def ends(seeds: int) -> np.ndarray:
        picked = pick(each)((seeds, EXPERIMENTS))
        return np.stack(interval(picked, "correlation")[1:]) - truth

    return ends


def lognormal(sigma: float) -> Draw:
    return lambda shape: rng.lognormal(0, sigma, shape)


def chisquare(freedom: int) -> Draw:
    return lambda shape: rng.chisquare(freedom, shape) / freedom


def share(mean: float, deviation: float, images: int = 400) -> Draw:
    """Shares of images, of seeds that differ."""
    size = mean * (1 - mean) / deviation**2 - 1
    return lambda shape: rng.binomial(images, rng.beta(mean * size, (1 - mean) * size, shape)) / images


def pick(values: np.ndarray) -> Draw:
    return lambda shape: rng.choice(values, shape)


def steady(dimension: int) -> Draw:
    """W₂² of a fresh loop (n_r = 50, n_s = 50), the mean of its last ten generations of forty."""
    universes, n_real, n_synthetic = 20_000, 50, 50
    mean, deviation = np.zeros((universes, dimension)), np.ones((universes, dimension))
    kept = []
    for generation in range(40):  # of independent coordinates, whose moments suffice
        real = rng.normal(size=mean.shape) / n_real**0.5, rng.chisquare(n_real - 1, mean.shape)
        drawn = mean + deviation * rng.normal(size=mean.shape) / n_synthetic**0.5
        scatter = real[1] + deviation**2 * rng.chisquare(n_synthetic - 1, mean.shape)
        gap = n_real * n_synthetic / (n_real + n_synthetic) * (real[0] - drawn) ** 2
        mean = (n_real * real[0] + n_synthetic * drawn) / (n_real + n_synthetic)
        deviation = np.sqrt((scatter + gap) / (n_real + n_synthetic - 1))
        if generation >= 30:
            kept.append(wasserstein_squared(mean, np.empty(0), deviation**2))
    return pick(np.mean(kept, axis=0))


if __name__ == "__main__":
    sys.exit(main())
