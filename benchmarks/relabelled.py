"""Labels in a loop that feeds on itself: as they were asked for, filtered by a classifier, or given by it.

``python -m benchmarks.relabelled DIRECTORY [KEY=VALUE …]`` runs configs/mad/relabelled.yaml there, or goes on with it,
and prints for each arm, generation by generation, what the next one is trained on: of how many samples the label is
right, by a judge of another architecture that learned from the reference images, which the loop's classifier has not
seen; how many labels the classifier changed; and, of a network trained on these samples, the accuracy on the reference,
also under an attacker. ``asked`` is how many of the samples that a generation is measured by show what they were asked
for. Then each claim, with its 95 % interval over paired seeds.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad, unroll
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.data.real_data import load_real_data, split_reference
from pipelines.mad.tasks import read_rows, read_samples
from pipelines.measures.evaluator import to_network_input
from pipelines.measures.robustness import classifier, learn
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import TaskStore
from policies.adversarial import AttackSettings, LearningSettings, accuracy_under
from policies.common.claims import Claim, judge
from policies.common.seeding import derive_seed

EPS = 0.5  # of 8x8 images in [0, 1]
_WITHSTOOD = f"change of learned from, under {EPS:g}"
LEARNING, ATTACK = LearningSettings(updates=400), AttackSettings()
Ask = Callable[[Tensor], Tensor]
Metrics = dict[str, dict[str, np.ndarray]]  # arm → metric → (seeds, generations)


def main(directory: Path, *changes: str) -> None:
    """Run and print."""
    config = load_config(MadConfig, Path("configs/mad/relabelled.yaml"), [f"output_dir={directory}", *changes])
    run_mad(config)
    found = measured(directory, config)
    for metric, arm in product(found[next(iter(found))], found):
        print(f"{metric:<26}{arm:<12}" + "".join(f"{value:8.3f}" for value in found[arm][metric].mean(axis=0)))
    ends: Any = {arm: dict(_ends(of)) for arm, of in found.items()}
    for claim in CLAIMS:
        held = judge(claim, ends)
        print(f"{held.outcome:<10} {claim.sentence}: {held.value:+.3f} [{held.low:+.3f}, {held.high:+.3f}]")


def measured(directory: Path, config: MadConfig) -> Metrics:
    """What is told of each arm, by the samples that are stored."""
    real = load_real_data(config.data)
    assert real.labels is not None
    pool, apart = split_reference(real, config.data.reference)
    images, labels = unit(real.images), torch.from_numpy(real.labels)
    ask = classifier(learn(images[apart], labels[apart], "strided", LEARNING, derive_seed(0, "judge")))
    right = _right(ask, images[pool], labels[pool])
    print(f"\ncommit {git_commit()}, {len(config.seed_list)} seeds; the judge is right of {right:.3f} of the pool")
    found, store = Metrics(), TaskStore(directory / "tasks")
    for each in unroll(config, preflight_mad(config)):
        assert each.evaluation is not None
        told = {"asked": _right(ask, *_samples(store.load(each.evaluation.key)))}
        for batch in each.drawn:
            told |= _fed(store.load(batch.task.key), ask, images[apart], labels[apart], each.seeds[0])
        place = config.seed_list.index(each.seeds[0]), each.number - 1
        for metric, value in told.items():
            course = np.full((len(config.seed_list), config.generations), np.nan)
            found.setdefault(each.arm, {}).setdefault(metric, course)[place] = value
    return found


def _ends(found: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What claims speak of, a value a seed: the last that there is, and how it changed since the first."""
    for metric, values in found.items():
        last = values[:, -1 if metric == "asked" else -2]  # nothing is trained on what the last generation draws
        yield metric, last
        yield f"change of {metric}", last - values[:, 0]


def _fed(files: Files, ask: Ask, images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Of a set that the next generation is trained on."""
    shown, given = _samples(files)
    asked = read_rows(files).get("asked", given.numpy())
    learned = classifier(learn(shown, given, "normalised", LEARNING, seed))
    clean, under = accuracy_under(learned, images, labels, [0.0, EPS], ATTACK)
    told = {"labels right": _right(ask, shown, given), "labels changed": float(np.mean(asked != given.numpy()))}
    return told | {"learned from": clean, f"learned from, under {EPS:g}": under}


def _samples(files: Files) -> tuple[Tensor, Tensor]:
    held = read_samples(files)
    assert held.labels is not None
    return unit(held.values[0]), torch.from_numpy(held.labels[0])


def _right(ask: Ask, images: Tensor, labels: Tensor) -> float:
    return float((ask(images).argmax(dim=1) == labels).float().mean())


def unit(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, channels) → (n, channels, height, width) in [0, 1]."""
    return (to_network_input(images) + 1) / 2


CLAIMS = [
    *(
        Claim(f"{metric}: more of them than in {other}", metric, "relabelled", "at least", 0.0, other, "difference")
        for metric in ("labels right", "asked")
        for other in ("plain", "verified")
    ),
    *(
        Claim(f"{arm}: what is learned from it withstands less", _WITHSTOOD, arm, "at most", 0.0)
        for arm in ("plain", "verified", "relabelled")
    ),
]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
