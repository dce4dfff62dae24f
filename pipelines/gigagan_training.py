"""The game that GigaGAN's players learn from (:mod:`policies.gigagan`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.generators.adversarial import Game
from pipelines.gigagan_networks import Stage, halved
from policies.gigagan import ahead, alikeness, confusable, slope

_BATCH = 32  # images of an update
_PENALTY, _PENALTY_EVERY = 0.2, 4  # γ of R1 and R2, for pixels in [-1, 1]; updates of the critic from one to the next
SEEKING = 0.005  # weight of mode seeking: with more, images of a caption differ more, and heed it later
_TRIES = 4  # other captions, of which the nearest one is held against an image
_FIDELITY, _GRAIN = 10.0, 0.05  # of an enlargement: weight of what it was given, noise in that


def play(
    stage: Stage,
    images: Tensor,
    owner: Tensor,
    states: Tensor,
    weights: np.ndarray,
    settings: Any,
    steps: int,
    seed: int,
    enlarges: bool = False,
) -> None:
    """Train a ``stage`` on ``images`` (n, channels, height, width) in [-1, 1], drawn in proportion to ``weights``.

    Their captions have ``states`` by the numbers of ``owner`` (n,). One that ``enlarges`` is given them at half size.
    """
    random, chances = torch.Generator().manual_seed(seed), torch.from_numpy(weights)
    device, size = states.device, _BATCH
    judged, drawn = settings.matched
    (judging, drawing), critic = stage.players(), stage.critic
    every = torch.arange(size)
    game = Game(stage, settings.learning_rate, steps)
    for step in range(steps):
        chosen = torch.multinomial(chances, size, replacement=True, generator=random)
        z = torch.randn(size, settings.latent, generator=random).to(device)
        own = states[owner[chosen]]
        other = confusable(owner[chosen], own[:, 0].cpu(), _TRIES, random).to(device)
        real = images[chosen].to(device)
        reals, given = (real, halved(real)), None
        if enlarges:
            given = reals[1] + _GRAIN * torch.randn(reals[1].shape, generator=random).to(device)
        fakes = stage.synthesis(*stage.styles(own, z, every), given)[0][:-3:-1]
        paid = step % _PENALTY_EVERY == 0
        seen = [torch.cat(pair).detach().requires_grad_(paid) for pair in zip(reals, fakes, strict=True)]
        text = stage.critic_text(own)[1]
        scores = critic(seen, [text.repeat(2, 1), text[other].repeat(2, 1)])  # heads of (matches, resolutions, n, any)
        right, wrong = [each[0, :, :size] for each in scores], [each[0, :, size:] for each in scores]
        loss = ahead(right, wrong)
        if judged:
            loss = loss + judged * ahead([each.repeat(1, 2, 1) for each in right], [each[1] for each in scores])
        if paid:
            loss = loss + _PENALTY / 2 * _PENALTY_EVERY * slope([each[0] for each in scores], seen, size)
        game.step(judging, loss)
        loss = drawing_loss(stage, fakes, own, other, [each.detach() for each in right], drawn)
        elsewhere = torch.randn(size, settings.latent, generator=random).to(device)
        others = stage.synthesis(*stage.styles(own, elsewhere, every), given)[0][-1]
        loss = loss + SEEKING * alikeness(fakes[0], others, z, elsewhere)
        if enlarges:
            loss = loss + _FIDELITY * (fakes[1] - reals[1]).square().mean()
        game.step(drawing, loss)
        game.end_round()


def drawing_loss(
    stage: Stage,
    fakes: Sequence[Tensor],
    own: Tensor,
    other: Tensor,
    right: Sequence[Tensor],
    matching: float,
) -> Tensor:
    """The generator's: its images are to be ahead of real ones, whose scores were ``right`` a step ago, and further
    ahead with their ``own`` captions than with those of ``other`` places."""
    text = stage.critic_text(own)[1]
    scores = stage.critic(fakes, [text, text[other]])
    own_scores = [each[0] for each in scores]
    loss = ahead(own_scores, right)
    return loss + matching * ahead(own_scores, [each[1] for each in scores]) if matching else loss
