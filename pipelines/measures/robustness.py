"""Small classifiers, trained plainly or against an attacker, and larger models as such: what
:func:`policies.adversarial.accuracy_under` asks, of images (n, channels, height, width) in [0, 1]."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS
from pipelines.training import train
from policies.adversarial import AttackSettings, Classify, LearningSettings, accuracy_under, attack, noised
from policies.common.seeding import derive_seed

Course = dict[float, float]  # by the L2 norm of a change, the share that is answered rightly
Architecture = Literal["normalised", "strided"]


def network_of(architecture: Architecture, shape: Sequence[int] = (3, 16, 16), classes: int = 10) -> nn.Sequential:
    """An untrained classifier of images of a ``shape`` (channels, height, width), sides a multiple of 4, in [-1, 1].

    ``normalised``: LeNet's plan with batch normalisation; ``strided``: strides in place of pooling, a larger kernel, no
    normalisation, one linear layer.
    """
    places = shape[1] * shape[2] // 16
    if architecture == "strided":
        first = nn.Conv2d(shape[0], 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()
        then = nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * places, classes)
        return nn.Sequential(*first, *then)
    pooled = nn.Conv2d(shape[0], 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    again = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*pooled, *again, nn.Linear(32 * places, 64), nn.ReLU(), nn.Linear(64, classes))


def learn(
    images: Tensor,
    labels: Tensor,
    architecture: Architecture,
    settings: LearningSettings,
    seed: int,
    eps: float = 0.0,
    classes: int = 10,
) -> nn.Sequential:
    """A fresh network trained on images and their ``labels`` (n,); with ``eps`` on what an attacker makes of each batch
    within it (Madry et al., 1706.06083), or, in the first half, within less: at once it learns little of either."""
    random = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialisation"))
        network = network_of(architecture, images.shape[1:], classes).to(images.device)
    how, updates = AttackSettings(steps=settings.attack_steps), count()

    def draw() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(images), (settings.batch,), generator=random)
        share = torch.full(chosen.shape, min(1.0, 2 * next(updates) / settings.updates))
        return images[chosen], labels[chosen], share

    def loss(network: nn.Module, shown: Tensor, known: Tensor, share: Tensor) -> Tensor:
        if eps:
            network.eval()  # else batch statistics of attacks half done would be kept
            shown = attack(classifier(network), shown, known, eps * share[0].item(), how)
            network.train()
        return functional.cross_entropy(network(2 * shown - 1), known)

    train(network, draw, loss, settings.updates, settings.learning_rate, divisible=False)
    return network.eval().requires_grad_(False)


def classifier(network: Callable[[Tensor], Any], slot: str | None = None) -> Classify:
    """A network of images in [-1, 1] as a function of images in [0, 1]; of an evaluator's network one ``slot``."""
    return (lambda images: network(2 * images - 1)[slot]) if slot else (lambda images: network(2 * images - 1))


def digit_named(captioner: Captioner, captions: Sequence[str]) -> Classify:
    """A captioner of images of 16x16 pixels as a classifier: the logits of the ten digits' words where ``captions``
    (n,) have theirs, after the true words before it. Raises ValueError if it has no such words, or sizes differ."""
    tokenizer, how = captioner.tokenizer, captioner.image_processor
    words = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)), device=captioner.device)
    tokens = torch.tensor([tokenizer(each).input_ids for each in captions], device=captioner.device)
    is_digit = torch.isin(tokens, words[words != tokenizer.unk_token_id])
    at = int(is_digit[0].int().argmax())
    if not at or not is_digit[:, at].all():
        raise ValueError("captioner: its tokenizer has no word of its own for each digit")
    if (how.size["height"], how.size["width"]) != (16, 16):
        raise ValueError(f"captioner: it looks at images of {dict(how.size)}, not of 16 x 16 pixels")
    model = captioner.model.requires_grad_(False)
    mean, spread = (torch.tensor(each, device=words.device)[:, None, None] for each in (how.image_mean, how.image_std))

    def logits(images: Tensor) -> Tensor:
        pixels = ((images - mean) / spread).to(model.vision_model.dtype)
        found: Tensor = model(pixel_values=pixels, input_ids=tokens[:, :at]).logits[:, -1, words]
        return found.float()

    return logits


def audited(
    who: Mapping[str, Classify], images: Tensor, labels: Tensor, eps: Sequence[float], settings: AttackSettings
) -> tuple[dict[str, Course], dict[str, float]]:
    """How often each classifier is right of ``images`` and their ``labels`` (n,), under an attacker who knows it and
    changes each by each of ``eps``; and, the control, under random noise of the largest of these norms."""
    noise = noised(images, max(eps), torch.Generator().manual_seed(0))
    found = {name: accuracy_under(each, images, labels, eps, settings) for name, each in who.items()}
    courses = {name: dict(zip(eps, shares, strict=True)) for name, shares in found.items()}
    return courses, {name: accuracy_under(each, noise, labels, [0], settings)[0] for name, each in who.items()}
