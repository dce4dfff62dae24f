"""What networks learn from data sets of adversarial examples, after Ilyas et al. (1905.02175), on the tinted digits.

A set is made of training digits with a network that was trained on them; fresh networks of two architectures are
trained on the set and asked about digits that nothing has seen. Everything is a function of settings and seed; on one
machine a repeat gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from math import inf
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from pipelines.captioner import Captioner
from pipelines.data.digits import CHOICES, DIGITS, Split, caption, load_split, tint
from pipelines.figures.arms import courses
from pipelines.figures.plots import image_grid
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.measures.robustness import Architecture, audited, classifier, digit_named, learn, network_of
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics
from policies.adversarial import (
    AttackSettings,
    InversionSettings,
    LearningSettings,
    accuracy_under,
    attack,
    noised,
    pgd,
)
from policies.common.seeding import derive_seed

GROUNDS = ("black", "white")  # on gray an ink's contrast can be below half: a small change is then a large one
_BELOW = "L2 norm of the change"
_AT_ONCE = 500  # images

Shown = tuple[Tensor, Tensor, list[str]]  # images (n, 3, 16, 16) in [0, 1], labels (n,), and a true caption of each


def digits(split: Split, tints: int, seed: int, device: str) -> Shown:
    """Every digit of a split in so many random tints, on ``GROUNDS``."""
    found, random = load_split(split), np.random.default_rng(derive_seed(seed, f"tints of {split}"))
    strokes, labels = np.tile(found.strokes, (tints, 1, 1)), np.tile(found.labels, tints)
    inks, grounds = (random.choice(among, len(labels)).tolist() for among in (CHOICES["ink"], GROUNDS))
    words = [caption(DIGITS[label], *how) for label, *how in zip(labels, inks, grounds, strict=True)]
    return _unit(tint(strokes, inks, grounds), device), torch.from_numpy(labels).to(device), words


def learn_source(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the weights of a network trained on true digits, against an attacker within ``eps`` if that is not 0."""
    images, labels, _ = digits("train", parameters["tints"], parameters["seed"], device)
    how = LearningSettings(**parameters["learning"]), derive_seed(parameters["seed"], "source"), parameters["eps"]
    network = learn(images, labels, parameters["architecture"], *how)
    return {"model.safetensors": save({name: each.cpu() for name, each in network.state_dict().items()})}


def make(parameters: Mapping[str, Any], network: nn.Sequential | None, shown: Shown, eps: float) -> tuple[Tensor, ...]:
    """A set of the ``arm``: what its images were, what they are (n, 3, 16, 16), and the label that each is given."""
    (images, labels, _), arm = shown, parameters["arm"]
    random = torch.Generator().manual_seed(derive_seed(parameters["seed"], "set"))  # so arms have the same labels
    given, other = torch.randint(10, labels.shape, generator=random), torch.randperm(len(labels), generator=random)
    if not arm.startswith("random"):  # which has any label: all but the true one would tell what it is not
        given = (labels + 1) % 10 if arm.startswith("next") else labels
    given = given.to(images.device)
    if arm.endswith("noise"):
        return images, noised(images, eps, random), given
    if network is None:
        return images, images, given
    if arm.endswith("features"):
        start, inversion = images[other.to(images.device)], InversionSettings(**parameters["inversion"])
        return start, _in_parts(partial(_alike, classifier(network[:-1]), inversion), images, start), given
    fool, how = partial(attack, classifier(network), eps=eps, towards=True), AttackSettings(**parameters["attack"])
    return images, _in_parts(partial(fool, settings=how), images, given), given


def _alike(features: Any, settings: InversionSettings, images: Tensor, start: Tensor) -> Tensor:
    """Images that a network's last features take for ``images``, beginning at others (1905.02175, equation 6)."""
    wanted = features(images)
    return pgd(lambda x: (features(x) - wanted).square().sum(dim=1), images, inf, settings.steps, settings.step, start)


def examine(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: make a set with the network in ``inputs``, if any, judge what it shows, train fresh networks on it, and
    test them on clean and on attacked digits that nothing has seen; for each of the norms ``eps``, whose metrics but
    the first one's end with ``/at_EPS``.

    Metrics: ``moved``, mean L2 norm of the change; ``success``, what the attacked network takes for its label;
    ``judge/original`` and ``judge/label``, what the evaluator sees; of each fresh network ``accuracy``, ``next``
    (answers y + 1) and ``robust_EPS``; and of several norms ``crossing``, the least at which y is answered as often as
    y + 1, left out where it never is.
    """
    attacker, learning = AttackSettings(**parameters["attack"]), LearningSettings(**parameters["learning"])
    shown, seed = digits("train", parameters["tints"], parameters["seed"], device), parameters["seed"]
    clean, true, _ = digits("test", parameters["test_tints"], seed, device)
    network = _loaded(inputs[0], "normalised", device) if inputs else None
    judge = load_evaluator(resolve_model(at), device) if (at := parameters["evaluator"]) else None
    found, files, curves = dict[str, float](), Files(), dict[str, dict[float, float]]()
    for eps in parameters["eps"]:
        at = "" if not found else f"/at_{eps:g}"
        before, changed, given = make(parameters, network, shown, eps)
        pixels = _pixels(changed)  # as an image file holds them
        changed = _unit(pixels, device)
        found[f"moved{at}"] = (changed - before).flatten(1).norm(dim=1).mean().item()
        if network is not None:
            found[f"success{at}"] = _share(classifier(network)(changed).argmax(dim=1) == given)
        if judge:
            seen = torch.tensor([DIGITS.index(word) for word in judge.slots(pixels)["digit"]], device=device)
            found |= {f"judge/original{at}": _share(seen == shown[1]), f"judge/label{at}": _share(seen == given)}
        for kind in get_args(Architecture):
            fresh = classifier(learn(changed, given, kind, learning, seed))
            for name, right in ("accuracy", true), ("next", (true + 1) % 10):
                found[f"{name}/{kind}{at}"] = share = _share(fresh(clean).argmax(dim=1) == right)
                curves.setdefault(f"{name}, {kind}", {})[eps] = share
            robust = {} if at else {each: f"robust_{each:g}/{kind}" for each in parameters["robust"]}
            found |= zip(robust.values(), accuracy_under(fresh, clean, true, [*robust], attacker), strict=True)
        columns = [int((shown[1] == digit).nonzero()[0]) for digit in range(10)]
        pair = np.concatenate([_pixels(before[columns]), pixels[columns]])
        Image.fromarray(image_grid(pair, columns=10)).save(picture := BytesIO(), "PNG")
        files[f"figures/examples{at.replace('/', '_')}.png"] = picture.getvalue()
    if len(parameters["eps"]) > 1:
        norms = sorted(parameters["eps"])
        found |= _crossings({name: [held[eps] for eps in norms] for name, held in curves.items()}, norms)
        files["figures/next.png"] = courses(curves, "answered as y (accuracy), y + 1 (next)", _BELOW)
    return metrics(found) | files


def _crossings(curves: Mapping[str, Sequence[float]], norms: Sequence[float]) -> dict[str, float]:
    found = {}
    for kind in get_args(Architecture):
        lead = np.subtract(curves[f"accuracy, {kind}"], curves[f"next, {kind}"])
        if (at := int((lead >= 0).argmax())) and lead[at] >= 0:
            found[f"crossing/{kind}"] = float(np.interp(0, lead[at - 1 : at + 1], norms[at - 1 : at + 1]))
    return found


def audit(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: how often each classifier is right under an attacker within each of ``eps``, as ``under_EPS/…`` and as a
    figure: the networks of ``inputs``, the evaluator, and the captioner, whose words are a reward. ``noise/…`` is the
    same under noise of the largest of these norms."""
    images, labels, captions = digits("test", parameters["test_tints"], parameters["seed"], device)
    networks = zip(parameters["networks"].items(), inputs, strict=True)
    who = {name: classifier(_loaded(files, kind, device)) for (name, kind), files in networks}
    if at := parameters["evaluator"]:
        who["evaluator"] = classifier(load_evaluator(resolve_model(at), device).network.requires_grad_(False), "digit")
    if at := parameters["captioner"]:
        who["captioner"] = digit_named(Captioner(CaptionerSettings(path=at), device), captions)
    curves, noise = audited(who, images, labels, parameters["eps"], AttackSettings(**parameters["attack"]))
    found = {f"under_{eps:g}/{name}": share for name, of in curves.items() for eps, share in of.items()}
    found |= {f"noise/{name}": share for name, share in noise.items()}
    return metrics(found) | {"figures/accuracy_under.png": courses(curves, "accuracy under attack", _BELOW)}


def _loaded(files: Files, architecture: Architecture, device: str) -> nn.Sequential:
    network = network_of(architecture)
    network.load_state_dict(load(files["model.safetensors"]))
    return network.to(device).eval().requires_grad_(False)


def _in_parts(make: Any, *rows: Tensor) -> Tensor:
    return torch.cat([make(*part) for part in zip(*(each.split(_AT_ONCE) for each in rows), strict=True)])


def _unit(images: np.ndarray, device: str) -> Tensor:
    return (to_network_input(images).to(device) + 1) / 2


def _pixels(images: Tensor) -> np.ndarray:
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy(force=True)


def _share(right: Tensor) -> float:
    return right.float().mean().item()
