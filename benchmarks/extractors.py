"""Does an extractor that was trained without labels rank images as a classifier of them does?

``python -m benchmarks.extractors [digits|tinted …]`` makes sets of real images ever worse, five steps in each of ten
ways, from a little noise to lost classes and GANs of ever shorter training, of two data sets with labels, digits and
digits tinted, where colour hides them. The extractors are trained on 1,000 images, the reference is 397 others, and
what is made worse is 397 more. Printed, over seeds of the extractors: Spearman's ρ of all 50 Fréchet
distances with the mean of the classifiers' (its own row: with that of the other seeds); how many of the ways are in
their order; precision where half of the images are noise; CPU seconds of the last seed. Controls are the same network
with random weights, pixels, and their principal components.
"""

import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from orchestration.runs.manifest import git_commit
from pipelines.data.digits import SPLIT_SIZES, Digits, load_split, render
from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.generators.gan import GanGenerator, GanSettings
from pipelines.measures import features
from pipelines.measures.distances import frechet_distance, precision_recall_density_coverage
from policies.common.intervals import interval
from policies.loops.samples import Samples

TRAINED, COMPARED, SEEDS = 1000, 397, 5
LABELLED, UNLABELLED = "classifier of the labels", "self-supervised"
Look = Callable[[np.ndarray], np.ndarray]


def main(*names: str) -> int:
    """Print, and return on how many data sets training without labels agrees no better than each control."""
    print(f"commit {git_commit()}; {SEEDS} seeds; mean and 95 % interval of ρ, where seeds differ")
    missed, seeds = 0, SEEDS
    for name, read in {"digits": plain_digits, "tinted": tinted_digits}.items():
        if names and name not in names:
            continue
        images, labels = read()
        order = np.random.default_rng(1).permutation(len(images))
        pool, real, rest = np.split(order[: TRAINED + 2 * COMPARED], [TRAINED, TRAINED + COMPARED])
        sets = worsened(images[pool], images[rest], labels[rest])
        looks = {seed: extractors(images[pool], labels[pool], seed) for seed in range(seeds)}
        found: dict[str, list[np.ndarray]] = {}
        seconds: dict[str, float] = {}
        precise: dict[str, list[float]] = {}
        for makers in looks.values():
            for kind, make in makers.items():
                begun = time.process_time()
                look = make()
                seconds[kind] = time.process_time() - begun
                seen = look(images[real])
                distances = [[frechet_distance(look(each), seen) for each in way] for way in sets.values()]
                found.setdefault(kind, []).append(np.array(distances))
                precision = precision_recall_density_coverage(seen, look(sets["noise images"][-1]))["precision"]
                precise.setdefault(kind, []).append(precision)
        print(f"\n{name:<26}{'ρ with the classifier':>24}{'ways in order':>16}{'precision':>12}{'CPU seconds':>14}")
        agreement: dict[str, np.ndarray] = {}
        for kind, of_seeds in found.items():
            true = np.log(np.array(found[LABELLED])).reshape(seeds, -1)
            others = [np.delete(true, seed, axis=0) if kind == LABELLED else true for seed in range(seeds)]
            each = [spearmanr(d.ravel(), o.mean(axis=0)).statistic for d, o in zip(of_seeds, others, strict=True)]
            agreement[kind] = np.array(each)
            mean, low, high = interval(agreement[kind])
            rho = f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if high > low else "")
            kept = [sum(all(a < b for a, b in pairwise(way)) for way in distances) for distances in of_seeds]
            about = f"{np.mean(kept):.1f} of {len(sets)}"
            print(f"{kind:<26}{rho:>24}{about:>16}{np.mean(precise[kind]):12.2f}{seconds[kind]:14.1f}")
        lows = {kind: interval(agreement[UNLABELLED] - agreement[kind]).low for kind in list(found)[2:]}
        missed += any(not low > 0 for low in lows.values())
        ahead = ", ".join(f"{kind} {low:+.3f}" for kind, low in lows.items())
        print(f"ρ of self-supervised over that of each control, paired by seed, at least: {ahead}")
    return missed


def extractors(images: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Callable[[], Look]]:
    """By name, what makes a map from images (n, height, width, channels) uint8 to features (n, D)."""

    def flat(given: np.ndarray) -> np.ndarray:
        return given.reshape(len(given), -1) / 255.0

    def untrained() -> Look:
        usual = features.LEARNING_RATE, features.UPDATES
        features.LEARNING_RATE, features.UPDATES = 1e-12, 50  # only the means and spreads for normalising are learned
        try:
            return features.train_extractor(images, None, 0, seed).features
        finally:
            features.LEARNING_RATE, features.UPDATES = usual

    def components() -> Look:
        fitted = PCA(features.DIMENSIONS, random_state=seed).fit(flat(images))
        return lambda given: fitted.transform(flat(given))

    return {
        LABELLED: lambda: features.train_extractor(images, labels, 10, seed).features,
        UNLABELLED: lambda: features.train_extractor(images, None, 0, seed).features,
        "random weights": untrained,
        "pixels": lambda: flat,
        "32 principal components": components,
    }


def worsened(pool: np.ndarray, rest: np.ndarray, labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Five sets of each kind, ever worse, as many images (n, height, width, channels) uint8 as ``rest``."""
    random, exact = np.random.default_rng(2), rest.astype(float)
    noise, other = random.normal(size=rest.shape), exact[random.permutation(len(rest))]
    junk = random.integers(0, 256, rest.shape)
    first = np.arange(len(rest)).reshape(-1, 1, 1, 1) / len(rest)

    def cut(values: np.ndarray) -> np.ndarray:
        return values.clip(0, 255).round().astype(np.uint8)

    def drawn(rows: np.ndarray) -> np.ndarray:
        return rest[random.choice(rows, len(rest))]

    def holes(side: float) -> np.ndarray:
        spoiled, size = rest.copy(), round(side * rest.shape[1] / 8)
        for image in spoiled:
            top, left = (random.integers(0, length - size + 1) for length in rest.shape[1:3])
            image[top : top + size, left : left + size] = 0
        return spoiled

    def gan(steps: int) -> np.ndarray:
        return (
            GanGenerator.fit(GanSettings(steps=steps), Samples(pool[None]), [steps]).sample(len(rest), [1], 1).values[0]
        )

    return {
        "noise": [cut(exact + spread * noise) for spread in (5, 10, 20, 40, 80)],
        "blur": [cut(gaussian_filter(exact, (0, spread, spread, 0))) for spread in (0.45, 0.6, 0.8, 1.2, 2)],
        "contrast": [cut((exact - 128) * share + 128) for share in (0.9, 0.8, 0.65, 0.4, 0.2)],
        "saturation": [cut((exact - 128) * share + 128) for share in (1.1, 1.25, 1.5, 2, 4)],
        "light": [cut(exact + more) for more in (5, 10, 20, 40, 80)],
        "holes": [holes(side) for side in range(1, 6)],
        "blends": [cut(exact * (1 - share) + other * share) for share in (0.05, 0.1, 0.2, 0.35, 0.5)],
        "noise images": [np.where(first < share, junk, rest).astype(np.uint8) for share in (0.02, 0.05, 0.1, 0.2, 0.5)],
        "classes lost": [drawn(np.flatnonzero(labels < count)) for count in (9, 7, 5, 3, 1)],
        "short training": [gan(steps) for steps in (200, 100, 50, 25, 12)],
    }


def plain_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, 8x8 and grey, and what they are."""
    data = load_real_data(DataSettings())
    assert data.labels is not None
    return data.images, data.labels


def tinted_digits() -> tuple[np.ndarray, np.ndarray]:
    """The same, 16x16, in one of six inks on one of three grounds."""
    splits = [load_split(split) for split in SPLIT_SIZES]  # type: ignore[arg-type]
    digits = Digits(*(np.concatenate([each[part] for each in splits]) for part in (0, 1)))
    return render(digits, np.random.default_rng(0))[0], digits.labels


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
