"""What networks learn from data sets of adversarial examples, after Ilyas et al. (1905.02175), on the tinted digits.

A set is made of training digits with a network that was trained on them; fresh networks of two architectures are
trained on the set and asked about digits that nothing has seen. Everything is a function of settings and seed; on one
machine a repeat gives the same bytes.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from pipelines.captioner import Captioner
from pipelines.data.digits import CHOICES, DIGITS, Split, caption, load_split, tint
from pipelines.figures.plots import image_grid
from pipelines.figures.style import arm_looks, dress, finish, sheet
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files, packed
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics
from pipelines.training import train
from policies.adversarial import (
    AttackSettings,
    Classify,
    InversionSettings,
    LearningSettings,
    accuracy_under,
    noised,
    pgd,
    targeted,
    untargeted,
)
from policies.common.seeding import derive_seed

FRESH = {"same": "normalised", "other": "strided"}  # the attacked network's architecture, and another
GROUNDS = ("black", "white")  # on gray an ink's contrast can be below half: a small change is then a large one
_AT_ONCE = 500  # images


class Shown(NamedTuple):
    """Digits: ``images`` (n, 3, 16, 16) in [0, 1], ``labels`` (n,), and a true caption of each."""

    images: Tensor
    labels: Tensor
    captions: list[str]


def digits(split: Split, tints: int, seed: int) -> Shown:
    """Every digit of a split in so many random tints, on ``GROUNDS``."""
    found, random = load_split(split), np.random.default_rng(derive_seed(seed, f"tints of {split}"))
    strokes, labels = np.tile(found.strokes, (tints, 1, 1)), np.tile(found.labels, tints)
    inks, grounds = (random.choice(among, len(labels)).tolist() for among in (CHOICES["ink"], GROUNDS))
    words = [caption(DIGITS[label], *how) for label, *how in zip(labels, inks, grounds, strict=True)]
    return Shown(_unit(tint(strokes, inks, grounds)), torch.from_numpy(labels), words)


def network_of(architecture: str, shape: tuple[int, ...] = (16, 16, 3), classes: int = 10) -> nn.Sequential:
    """An untrained classifier of images of a ``shape`` (height, width, channels), sides a multiple of 4: (n, channels,
    height, width) in [-1, 1] → logits. ``normalised``: LeNet's plan with batch normalisation, 25 k weights at 16x16x3;
    ``strided``: strides in place of pooling, larger kernels, no normalisation."""
    places = shape[0] * shape[1] // 16
    if architecture == "strided":
        first = nn.Conv2d(shape[2], 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()
        then = nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * places, classes)
        return nn.Sequential(*first, *then)
    pooled = nn.Conv2d(shape[2], 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*pooled, *second, nn.Linear(32 * places, 64), nn.ReLU(), nn.Linear(64, classes))


def learn(
    images: Tensor, labels: Tensor, architecture: str, settings: LearningSettings, seed: int, eps: float = 0.0
) -> nn.Sequential:
    """A fresh network trained on ``images`` (n, channels, height, width) in [0, 1] and their ``labels``; with ``eps``
    on what an attacker makes of each batch within it (Madry et al., 1706.06083)."""
    random = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialisation"))
        network = network_of(architecture, (*images.shape[2:], images.shape[1])).to(images.device)
    attack = AttackSettings(steps=settings.attack_steps)

    def draw() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(images), (settings.batch,), generator=random)
        return images[chosen], labels[chosen]

    def loss(network: nn.Module, shown: Tensor, known: Tensor) -> Tensor:
        if eps:
            network.eval()  # else statistics of attacks half done would be learned
            shown = untargeted(classifier(network), shown, known, eps, attack)
            network.train()
        return functional.cross_entropy(network(2 * shown - 1), known)

    train(network, draw, loss, settings.updates, settings.learning_rate, divisible=False)
    return network.eval().requires_grad_(False)


def classifier(network: Callable[[Tensor], Any], slot: str | None = None) -> Classify:
    """A network of images in [-1, 1], as a function of images in [0, 1]; of an evaluator's network one ``slot``."""
    return (lambda x: network(2 * x - 1)[slot]) if slot else (lambda x: network(2 * x - 1))


def digit_named(captioner: Captioner, captions: list[str]) -> Classify:
    """A captioner of images of 16x16 pixels as a classifier: the logits of the ten digits' words where ``captions``
    (n,) have theirs, after the true words before it. Raises ValueError if words are not tokens, or sizes differ."""
    tokenizer, how = captioner.tokenizer, captioner.image_processor
    words = tokenizer.convert_tokens_to_ids(list(DIGITS))
    tokens = torch.tensor([tokenizer(each).input_ids for each in captions], device=captioner.device)
    places = torch.isin(tokens, torch.tensor(words, device=tokens.device)).int()
    at = int(places[0].argmax())
    if tokenizer.unk_token_id in words or not at or not (places.sum(dim=1) == places[:, at]).all():
        raise ValueError("captioner: its tokenizer has no word of its own for each digit")
    if (how.size["height"], how.size["width"]) != (16, 16):
        raise ValueError(f"captioner: it looks at images of {how.size}, not of 16 x 16 pixels")
    captioner.model.requires_grad_(False)
    mean, spread = (torch.tensor(each, device=tokens.device)[:, None, None] for each in (how.image_mean, how.image_std))

    def logits(images: Tensor) -> Tensor:
        pixels = ((images - mean) / spread).to(captioner.model.vision_model.dtype)
        found: Tensor = captioner.model(pixel_values=pixels, input_ids=tokens[:, :at]).logits[:, -1, words]
        return found.float()

    return logits


def learn_source(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the weights of a network trained on true digits, against an attacker within ``eps`` if that is not 0."""
    held, settings = (
        digits("train", parameters["tints"], parameters["seed"]),
        LearningSettings(**parameters["learning"]),
    )
    how = parameters["architecture"], settings, derive_seed(parameters["seed"], "source"), parameters["eps"]
    network = learn(held.images.to(device), held.labels.to(device), *how)
    return {"model.safetensors": save({name: each.cpu() for name, each in network.state_dict().items()})}


def examine(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: make a set (``arm``) with the network in ``inputs``, judge what it shows, train fresh networks on it, and
    test them on clean and on attacked digits that nothing has seen.

    Metrics, all shares but for ``moved`` (mean L2): ``success`` (what the attacked network takes for its label),
    ``judge/original`` and ``judge/label`` (what the evaluator sees), and of each fresh network ``accuracy``, ``next``
    (answers y + 1) and ``robust_EPS``.
    """
    arm, eps, seed, at = (parameters[name] for name in ("arm", "eps", "seed", "at"))
    held, attack = digits("train", parameters["tints"], seed), AttackSettings(**parameters["attack"])
    images, labels = held.images.to(device), held.labels.to(device)
    source = classifier(network := _loaded(inputs[0], "normalised", device)) if inputs else None
    random = torch.Generator().manual_seed(derive_seed(seed, "set"))  # so labels are the same in all arms
    given, before, changed = labels, images, images
    if arm.startswith("random"):
        given = torch.randint(len(DIGITS), labels.shape, generator=random).to(device)  # of all: others would tell
    elif arm.startswith("next"):
        given = (labels + 1) % len(DIGITS)
    if arm.endswith("noise"):
        changed = noised(images, eps, random)
    elif arm.endswith("features"):
        before = images[torch.randperm(len(images), generator=random).to(device)]
        how = InversionSettings(**parameters["inversion"])
        changed = _in_parts(partial(_alike, partial(_features, network), how), images, before)
    elif source is not None:
        changed = _in_parts(lambda x, to: targeted(source, x, to, eps, attack), images, given)
    pixels = _pixels(changed)  # what an image file holds; so is what is trained on
    changed = _unit(pixels).to(device)
    found = {f"moved{at}": (changed - before).flatten(1).norm(dim=1).mean().item()}
    if source is not None:
        found[f"success{at}"] = _share(source(changed).argmax(dim=1) == given)
    if parameters["evaluator"]:
        judge = load_evaluator(resolve_model(parameters["evaluator"]), device)
        seen = torch.tensor([DIGITS.index(word) for word in judge.slots(pixels)["digit"]], device=device)
        found |= {f"judge/original{at}": _share(seen == labels), f"judge/label{at}": _share(seen == given)}
    clean = digits("test", parameters["test_tints"], seed)
    shown, true = clean.images.to(device), clean.labels.to(device)
    for kind, architecture in FRESH.items():
        fresh = learn(changed, given, architecture, LearningSettings(**parameters["learning"]), seed)
        answers = classifier(fresh)(shown).argmax(dim=1)
        found[f"accuracy/{kind}{at}"] = _share(answers == true)
        found[f"next/{kind}{at}"] = _share(answers == (true + 1) % len(DIGITS))
        shares = accuracy_under(classifier(fresh), shown, true, parameters["robust"], attack)
        found |= {f"robust_{e:g}/{kind}": share for e, share in zip(parameters["robust"], shares, strict=True)}
    columns = [int((labels == digit).nonzero()[0]) for digit in range(len(DIGITS))]
    pair = np.concatenate([_pixels(before[columns]), pixels[columns]])
    Image.fromarray(image_grid(pair, columns=len(columns))).save(picture := BytesIO(), "PNG")
    return metrics(found) | {f"figures/examples{at.replace('/', '_')}.png": picture.getvalue()}


def crossing(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: of ``inputs``, one of :func:`examine` for each of ``eps``, the curves of P(y) and P(y + 1) as a figure,
    and ``crossing/…``, the least eps where y is answered as often as y + 1; left out where it never is."""
    told, eps, found = [json.loads(files["metrics.json"]) for files in inputs], parameters["eps"], dict[str, float]()
    names = {
        f"P({what}), {kind}": f"{name}/{kind}"
        for what, name in (("y", "accuracy"), ("y + 1", "next"))
        for kind in FRESH
    }
    curves = {
        label: [each[f"{name}{at}"] for each, at in zip(told, parameters["at"], strict=True)]
        for label, name in names.items()
    }
    for kind in FRESH:
        lead = np.subtract(curves[f"P(y), {kind}"], curves[f"P(y + 1), {kind}"])
        if (over := np.flatnonzero(lead >= 0)).size and (last := int(over[0])):
            found[f"crossing/{kind}"] = float(np.interp(0, lead[last - 1 : last + 1], eps[last - 1 : last + 1]))
    return metrics(found) | _figure("next", curves, eps, "share of clean digits that are answered as")


def audit(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: how often each classifier is right under an attacker within each of ``eps``, as ``under_EPS/…`` and as a
    figure: the networks of ``inputs``, the evaluator, and the captioner, whose words are a reward. ``noise/…`` is the
    same under noise of the largest of these norms."""
    seed, eps = parameters["seed"], parameters["eps"]
    held, attack = digits("test", parameters["test_tints"], seed), AttackSettings(**parameters["attack"])
    images, labels = held.images.to(device), held.labels.to(device)
    who = {
        name: classifier(_loaded(files, architecture, device))
        for files, (name, architecture) in zip(inputs, parameters["networks"].items(), strict=True)
    }
    if at := parameters["evaluator"]:
        who["evaluator"] = classifier(load_evaluator(resolve_model(at), device).network.requires_grad_(False), "digit")
    if at := parameters["captioner"]:
        who["captioner"] = digit_named(Captioner(CaptionerSettings(path=at), device), held.captions)
    curves = {name: accuracy_under(each, images, labels, eps, attack) for name, each in who.items()}
    found = {
        f"under_{e:g}/{name}": share for name, course in curves.items() for e, share in zip(eps, course, strict=True)
    }
    random = torch.Generator().manual_seed(derive_seed(seed, "noise"))
    for name, each in who.items():
        found[f"noise/{name}"] = accuracy_under(each, noised(images, max(eps), random), labels, [0], attack)[0]
    return metrics(found) | _figure("accuracy_under", curves, eps, "accuracy under attack")


def _figure(name: str, curves: Mapping[str, list[float]], eps: list[float], title: str) -> Files:
    figure, (axes,) = sheet(1)
    dress(axes, title, "L2 norm of the change, eps", integer=False)
    for label, look in arm_looks(curves).items():
        axes.plot(eps, curves[label], ms=4, label=label, **look)
    axes.set_ylim(-0.03, 1.03)
    return {
        f"figures/{path}": content
        for path, content in packed(lambda at: finish(figure, Path(at, f"{name}.png"))).items()
    }


def _alike(features: Classify, settings: InversionSettings, images: Tensor, start: Tensor) -> Tensor:
    """Images that a network's last features take for ``images``, beginning at others (1905.02175, equation 6)."""
    wanted = features(images)

    def distance(moved: Tensor) -> Tensor:
        return (features(moved) - wanted).square().sum(dim=1)

    return pgd(distance, images, inf, settings.steps, settings.step, start)


def _features(network: nn.Sequential, images: Tensor) -> Tensor:
    found: Tensor = network[:-1](2 * images - 1)
    return found


def _loaded(files: Files, architecture: str, device: str) -> nn.Sequential:
    network = network_of(architecture)
    network.load_state_dict(load(files["model.safetensors"]))
    return network.to(device).eval().requires_grad_(False)


def _in_parts(make: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    return torch.cat([make(*part) for part in zip(*(each.split(_AT_ONCE) for each in rows), strict=True)])


def _unit(images: np.ndarray) -> Tensor:
    return (to_network_input(images) + 1) / 2


def _pixels(images: Tensor) -> np.ndarray:
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy(force=True)


def _share(right: Tensor) -> float:
    return right.float().mean().item()
