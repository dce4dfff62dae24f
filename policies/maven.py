"""MAVEN (Imran & Terzopoulos, 1906.06430): a variational GAN of several discriminators that are classifiers, too.

A discriminator tells n classes and, as one more, what is generated. A softmax over n + 1 logits stays the same if all
of them are shifted, so that of the last class is 0 (Salimans et al., 1606.03498): log p_{n+1} = −log(1 + Σ exp) of the
other n. Importable without torch, as settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from policies.rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

_ENCODED = 0.2  # of what is generated counts what was encoded, which is nearest to real images


class PlainSettings(Settings):
    """Training of a classifier on labels alone, and on pseudo-labels."""

    updates: int = Field(400, ge=1, description="of a network on the labelled images")
    batch: int = Field(32, ge=1, description="images of an update")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    confidence: float = Field(0.95, gt=0, lt=1, description="with which an image is labelled to be learned from")
    retraining: int = Field(800, ge=1, description="updates of a fresh network on labels and pseudo-labels")


def log_real(logits: Tensor) -> Tensor:
    """log(1 − p_{n+1}), (…), of ``logits`` (…, n)."""
    from torch.nn import functional

    return functional.logsigmoid(logits.logsumexp(dim=-1))


def log_fake(logits: Tensor) -> Tensor:
    """log p_{n+1}, (…), of ``logits`` (…, n)."""
    from torch.nn import functional

    return functional.logsigmoid(-logits.logsumexp(dim=-1))


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the softmax over n + 1 classes, of ``logits`` (b, n) and ``labels`` (b,) in [0, n)."""
    from torch.nn import functional

    return functional.cross_entropy(functional.pad(logits, (0, 1)), labels)


def discriminator_loss(labels: Tensor, known: Tensor, real: Tensor, generated: Tensor, encoded: Tensor) -> Tensor:
    """A discriminator's loss by its logits (b, n): of images whose ``labels`` (b,) are ``known``, of any ``real`` ones,
    of those ``generated`` from the prior, .8, and of what was ``encoded``, .2."""
    fake = (1 - _ENCODED) * log_fake(generated).mean() + _ENCODED * log_fake(encoded).mean()
    return class_loss(known, labels) - log_real(real).mean() - fake


def matching_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Squared distance of the mean features of two batches (b, d), a dimension (1606.03498, equation 1)."""
    return (real.mean(dim=0) - generated.mean(dim=0)).square().mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL from N(0, I) of diagonal Gaussians (b, d): the mean over the batch, in nats."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2
