"""MAVEN (Imran & Terzopoulos, 1906.06430): a variational GAN of several discriminators that are classifiers, too.

A discriminator tells n classes and, as one more, what is generated. A softmax over n + 1 logits stays the same if all
of them are shifted, so that of the last class is 0 (Salimans et al., 1606.03498): log p_{n+1} = −log(1 + Σ exp) of the
other n.
"""

from torch import Tensor
from torch.nn import functional


def log_real(logits: Tensor) -> Tensor:
    """log(1 − p_{n+1}), (…), of ``logits`` (…, n)."""
    return functional.logsigmoid(logits.logsumexp(dim=-1))


def log_fake(logits: Tensor) -> Tensor:
    """log p_{n+1}, (…), of ``logits`` (…, n)."""
    return functional.logsigmoid(-logits.logsumexp(dim=-1))


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the softmax over n + 1 classes, of ``logits`` (b, n) and ``labels`` (b,) in [0, n)."""
    return functional.cross_entropy(functional.pad(logits, (0, 1)), labels)


def discriminator_loss(known: Tensor, labels: Tensor, real: Tensor, generated: Tensor, encoded: Tensor, ENC=.5) -> Tensor:
    """A discriminator's loss by its logits (…, n): of images whose ``labels`` are ``known``, of any ``real`` ones, of
    those ``generated`` from the prior and from what was ``encoded``, half each."""
    fake = (1-ENC)*log_fake(generated).mean() + ENC*log_fake(encoded).mean()
    return class_loss(known, labels) - log_real(real).mean() - fake


def matching_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Squared distance of the mean features of two batches (b, d), a dimension (1606.03498, equation 1)."""
    return (real.mean(dim=0) - generated.mean(dim=0)).square().mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL from N(0, I) of diagonal Gaussians (b, d): the mean over the batch, in nats."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2
