"""What the study of MAVEN compares: labels from few by MAVEN, by the labelled images alone, and by pseudo-labels, all
on images that none has seen; and how near what MAVEN draws is to these.

Networks are those of :mod:`pipelines.generators.maven`: every arm classifies with as many of its discriminators.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipelines.data.real_data import DataSettings, load_real_data, split_reference
from pipelines.figures.plots import image_grid
from pipelines.generators.maven import Maven, MavenSettings, chosen_labels, judge
from pipelines.measures.distances import frechet_distance, moments_nearness, precision_recall_density_coverage
from pipelines.measures.evaluator import to_network_input
from pipelines.measures.features import load_extractor
from pipelines.storage.atomic import Files, unpacked
from pipelines.studies import metrics
from pipelines.studies.distil import learn_features
from pipelines.training import train
from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from policies.maven import PlainSettings

__all__ = ["learn_features", "learn_few", "learn_maven"]  # tasks
_SHOWN = 40  # images of a picture


def learn_maven(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: MAVEN of so many labels, and what it says of the images kept apart and draws beside them.

    Metrics end with ``/of_LABELLED``: ``accuracy``, and that of single discriminators (``alone``), how often two of
    them disagree (``disagree``), ``fid``, ``precision``, ``recall``, ``moments``, and how often the features' own
    classifier sees a drawn image as it is labelled (``label_accuracy``).
    """
    (images, labels), (shown, true) = _data(parameters)
    settings = MavenSettings(**parameters["settings"])
    model = Maven.fit(settings, Samples(images[None], labels[None]), [parameters["seed"]], device=device)
    each = model.opinions(shown).argmax(axis=2)
    found = {"accuracy": (model.classify(shown).argmax(axis=1) == true).mean(), "alone": (each == true).mean()}
    if len(each) > 1:
        pairs = [(a != b).mean() for number, a in enumerate(each) for b in each[:number]]
        found["disagree"] = np.mean(pairs)
    drawn = model.sample(len(shown), [derive_seed(parameters["seed"], "drawn")], 1.0)
    eye = unpacked(inputs[0], lambda directory: load_extractor(directory, device))
    seen, real = eye.features(drawn.values[0]), eye.features(shown)
    near = precision_recall_density_coverage(real, seen)
    found |= {"fid": frechet_distance(seen, real), "precision": near["precision"], "recall": near["recall"]}
    found["moments"] = moments_nearness(drawn.values[0], shown)
    assert drawn.labels is not None
    found["label_accuracy"] = (eye.classify(seen).argmax(axis=1) == drawn.labels[0]).mean()
    by_label = np.argsort(drawn.labels[0], kind="stable")
    spread = by_label[np.linspace(0, len(by_label) - 1, _SHOWN).round().astype(int)]
    Image.fromarray(image_grid(drawn.values[0][spread], columns=10)).save(picture := BytesIO(), "PNG")
    return _named(found, settings.labelled) | {f"images/drawn_of_{settings.labelled}.png": picture.getvalue()}


def learn_few(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: ``accuracy`` of networks trained on so many labels alone; or with ``pseudo``, of fresh ones trained on what
    these are sure of, too: ``kept``, the share of images that get a label so, and ``right``, of these the true ones."""
    (images, labels), (shown, true) = _data(parameters)
    how, settings, seed = (
        PlainSettings(**parameters["plain"]),
        MavenSettings(**parameters["settings"]),
        parameters["seed"],
    )
    rows = chosen_labels(labels, settings.labelled, seed)
    inputs_, classes = to_network_input(images).to(device), int(labels.max()) + 1
    known = torch.from_numpy(labels[rows]).to(device)

    def networks(x: Tensor, y: Tensor, updates: int, name: str) -> Any:
        kinds = [derive_seed(seed, name, number) for number in range(settings.discriminators)]
        found = [_learn(x, y, classes, settings.width, how, updates, each) for each in kinds]
        return lambda x: torch.stack([network(x).softmax(dim=1) for network in found]).mean(dim=0)

    found = {}
    classify = networks(inputs_[rows], known, how.updates, "labelled")
    if parameters["pseudo"]:
        sure, guess = classify(inputs_).max(dim=1)
        taken = (sure >= how.confidence).index_fill(0, torch.from_numpy(rows).to(device), False)
        found = {"kept": _mean(taken), "right": _mean(guess[taken] == torch.from_numpy(labels).to(device)[taken])}
        x, y = torch.cat([inputs_[rows], inputs_[taken]]), torch.cat([known, guess[taken]])
        classify = networks(x, y, how.retraining, "pseudo")
    answers = classify(to_network_input(shown).to(device)).argmax(dim=1)
    return _named(found | {"accuracy": _mean(answers == torch.from_numpy(true).to(device))}, settings.labelled)


def _learn(
    x: Tensor, y: Tensor, classes: int, width: int, how: PlainSettings, updates: int, seed: int
) -> nn.Sequential:
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = judge(tuple(x.shape[1:]), width, classes).to(x.device)

    def draw() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(x), (how.batch,), generator=random)
        return x[chosen], y[chosen]

    def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(network(x), y)

    train(network, draw, loss, updates, how.learning_rate, weight_decay=how.weight_decay)
    return network.eval().requires_grad_(False)


def _data(parameters: Mapping[str, Any]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Images and labels to learn from, and those that are kept apart."""
    settings = DataSettings(**parameters["data"])
    data = load_real_data(settings)
    assert data.labels is not None
    return tuple((data.images[rows], data.labels[rows]) for rows in split_reference(data, settings.reference))


def _mean(right: Tensor) -> float:
    return right.float().mean().item()


def _named(found: Mapping[str, Any], labelled: int | None) -> Files:
    return metrics({f"{name}/of_{labelled}": value for name, value in found.items()})
