"""The mathematics of GigaGAN (Kang et al., 2303.05511): kernels that each sample mixes for itself, attention by
distance, and a game in which an image counts only with its own caption.

Images are (n, channels, height, width). Of scores there is one tensor a head, (n, any), and a loss is the sum over
heads of means over all else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, softmax, softplus

_EPSILON = 1e-8

Scores = Sequence[Tensor]


def modulated_convolution(x: Tensor, bank: Tensor, mixture: Tensor, scale: Tensor, demodulate: bool = True) -> Tensor:
    """Convolve each of ``x`` (n, in, h, w) with its own kernel of odd size k, zeros around it: K = Σ_i m_i K_i of the
    ``bank`` (out, filters, in, k, k) by ``mixture`` (n, filters), times its ``scale`` (n, in); demodulated, so that
    independent inputs of variance 1 stay so (section 3.1, and StyleGAN2, 1912.04958, equations 1 and 3).

    A convolution is linear in its kernel. So no sample's kernel is built: its input, times m_i s, goes to each filter.
    """
    if bank.shape[1] == 1:  # there is nothing to mix
        inputs = x * scale[:, :, None, None]
    else:
        inputs = (x[:, None] * (mixture[:, :, None] * scale[:, None])[..., None, None]).flatten(1, 2)
    found = conv2d(inputs, bank.flatten(1, 2), padding=bank.shape[-1] // 2)
    return found * inverse_norms(bank, mixture, scale)[:, :, None, None] if demodulate else found


def inverse_norms(bank: Tensor, mixture: Tensor, scale: Tensor) -> Tensor:
    """1 / ‖K s‖ of every sample and output, (n, out), without the kernels: from the filters' inner products."""
    flat = bank.flatten(3)
    if bank.shape[1] == 1:
        return (scale.square() @ flat[:, 0].square().sum(dim=-1).T + _EPSILON).rsqrt()
    products = torch.einsum("oaik,obik->abio", flat, flat).flatten(0, 2)  # (filters · filters · in, out)
    pairs = (mixture[:, :, None] * mixture[:, None]).flatten(1)
    weights = (pairs[:, :, None] * scale.square()[:, None]).flatten(1)
    return (weights @ products + _EPSILON).rsqrt()


def distance_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Σ_j softmax_j(−‖q_i − k_j‖² / √d) v_j of (n, positions, d) each: attention that is Lipschitz, other than that by
    inner products (2006.04710)."""
    distances = queries.square().sum(-1, keepdim=True) - 2 * queries @ keys.mT + keys.square().sum(-1)[:, None]
    return softmax(-distances / queries.shape[-1] ** 0.5, dim=-1) @ values


def mismatched(captions: Tensor, random: torch.Generator) -> Tensor:
    """For each of ``captions`` (n,), which are numbers, the place of another in the batch, (n,): of another caption
    wherever there is one. Of groups in a random order, a rotation by the largest leaves none at its own caption unless
    that group is more than half of the batch; what is left then draws among the others."""
    count = len(captions)
    order = torch.randperm(count, generator=random)
    ranks = torch.randperm(int(captions.max()) + 1, generator=random)  # or neighbours would always be the same
    order = order[ranks[captions[order]].argsort(stable=True)]
    largest = int(captions.unique(return_counts=True)[1].max())
    found = torch.empty(count, dtype=torch.long)
    found[order] = order.roll(-largest)
    for place in (captions[found] == captions).nonzero()[:, 0].tolist():
        others = (captions != captions[place]).nonzero()[:, 0]
        if len(others):
            found[place] = others[int(torch.randint(len(others), (), generator=random))]
    return found


def confusable(captions: Tensor, states: Tensor, tries: int, random: torch.Generator) -> Tensor:
    """Of so many :func:`mismatched` ``tries`` for each of ``captions`` (n,), the place whose ``states`` (n, width) are
    nearest to its own (n,). Most of any others differ in every word, from which little is left to learn soon."""
    found = torch.stack([mismatched(captions, random) for _ in range(tries)])
    distances = (states[found] - states).square().sum(dim=-1)
    return found.gather(0, distances.argmin(dim=0)[None])[0]


def ahead(favoured: Scores, other: Scores) -> Tensor:
    """Σ over heads of the mean of −log σ(favoured − other): R3GAN's pairs (2501.05441, equation 2)."""
    return torch.stack([softplus(b - a).mean() for a, b in zip(favoured, other, strict=True)]).sum()


def slope(scores: Scores, images: Sequence[Tensor], count: int) -> Tensor:
    """Σ over ``images`` (any, …) of squared gradients of the summed scores, over ``count``: R1 and R2 of so many."""
    total = torch.stack([each.sum() for each in scores]).sum()
    slopes = torch.autograd.grad(total, list(images), create_graph=True)
    return torch.stack([each.square().sum() for each in slopes]).sum() / count
