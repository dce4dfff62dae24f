"""The update: an objective's gradients summed over transitions, clipped, and one optimiser step.

Gradients are summed over transitions anyway, so timesteps are folded into the batch: an update is one bag of
transitions, computed in micro-batches of whatever size the device likes best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from policies.rl.group import Group, gathered
from policies.rl.health import DegenerateBatch, ShortOfMemoryError
from policies.rl.ratio import LEAST, check_reproduced
from policies.rl.rollouts import Objective
from policies.rl.settings import TrainingSettings

WEIGHT_DECAY = 1e-4  # that of the paper and of every peer


@dataclass
class UpdateStatistics:
    """What one call of :meth:`PolicyLearner.learn` did, averaged over its updates and the transitions that were
    computed. What is of the ratio, objectives without one leave at None. ``staleness``: versions between the weights
    that drew and those that learned; ``behaviour_kl``: KL of the ones to the others, None at the same version.
    """

    loss: float
    gradient_norm: float
    micro_batch: int
    learners: int
    skipped_updates: int
    staleness: int = 0
    behaviour_kl: float | None = None
    approximate_kl: float | None = None
    ratio_mean: float | None = None
    ratio_max: float | None = None
    clip_fraction: float | None = None
    first_update_error: dict[int, float] = field(default_factory=dict)
    """|Δ log p| of the first update, the largest over images, for each denoising step; where older weights drew the
    images, of their replay."""


class _Update(NamedTuple):
    """What one update found: of each transition (transitions,) its loss and, where there is one, Δ log p."""

    loss: Tensor
    difference: Tensor | None
    gradient_norm: float
    errors: dict[int, float]  # of the first update


class PolicyLearner:
    """Updates ``parameters``, alone or as one of a ``group`` whose ranks all receive the same calls. Knows nothing of
    diffusion: an objective gives the loss of each transition."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: TrainingSettings,
        micro_batch: int,
        group: Group | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """``loss_scale``: what losses are multiplied by for the way back, and gradients divided by; less of it, for an
        update whose gradients it makes infinite."""
        self.parameters = list(parameters)
        self.settings = settings
        self.micro_batch = micro_batch
        self.moved = False  # whether the parameters are others than at the beginning of the step
        self.epoch = 0  # the pass over the step's images that is being made
        self.group = group or Group()
        self.loss_scale = loss_scale
        asked = settings.ratio_tolerance
        self.tolerance = LEAST if isinstance(asked, str) else asked  # who knows the density's size says another
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )

    def learn(
        self,
        objective: Objective,
        images: int,
        steps: Tensor,
        generator: torch.Generator,
        teaching: Tensor | None = None,
    ) -> UpdateStatistics:
        """One step's updates on so many ``images``.

        ``steps`` (S,): the denoising steps to learn from. ``generator`` shuffles images and picks each image's share
        of the steps. ``teaching`` (images,) bool: those whose gradient is not 0. What the others would add is not
        computed, and they still count in the mean. Raises RatioError before the first update if the policy
        does not reproduce the log-probabilities that the images were drawn with.
        """
        settings, updates = self.settings, list[_Update]()
        share = settings.timesteps_per_image(len(steps))
        self.moved = False
        epochs = [torch.randperm(images, generator=generator) for _ in range(settings.inner_epochs)]
        parts = ((epoch, part) for epoch, order in enumerate(epochs) for part in order.chunk(settings.updates_per_step))
        for self.epoch, members in parts:
            picks = torch.stack(
                [steps[torch.randperm(len(steps), generator=generator)[:share]] for _ in range(len(members))]
            )
            drawn, count = members.repeat_interleave(share), len(members) * share
            rows = torch.ones(count, dtype=torch.bool) if teaching is None else teaching[drawn]
            rows[0] |= not rows.any()  # an update without a gradient is still one for the optimiser's moments
            updates.append(self._update(objective, drawn[rows], picks.flatten()[rows], count, first=not updates))
        return self._summary(updates)

    def moments(self) -> list[dict[str, Tensor]]:
        """What the optimiser knows of each parameter."""
        return [dict(self.optimizer.state.get(parameter, {})) for parameter in self.parameters]

    def restore_moments(self, moments: Sequence[Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`moments`, wherever and however these lie. AdamW's fused kernel fails where its count of
        steps is on another device than the parameter, and reads the numbers of a moment in the order of the parameter's
        memory: from one in another order it takes other numbers, and says nothing."""
        known = {
            number: {name: _laid_out(value, parameter) for name, value in each.items()}
            for number, (parameter, each) in enumerate(zip(self.parameters, moments, strict=True))
            if each
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": known})
        for parameter, state in self.optimizer.state.items():
            assert all(value.device == parameter.device for value in state.values())

    def on_some(
        self, values: Callable[[Tensor, Tensor], Tensor], images: int, steps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``values`` (batch, n) of a micro-batch of transitions of so many ``images``, each of ``steps`` among them.

        Returns them, and the step of each (batch,).
        """
        row = torch.arange(min(max(self.micro_batch, len(steps)), images * len(steps)))
        order, column = torch.randperm(images, generator=generator), row % len(steps)
        chosen = steps[column]
        parts, _ = self.group.share(order[(row // len(steps) + column) % images], chosen)
        calls = zip(*(part.split(self.micro_batch) for part in parts), strict=True)
        return self.group.gather(torch.cat([values(*call) for call in calls]))[: len(row)], chosen

    def _update(self, objective: Objective, images: Tensor, steps: Tensor, count: int, first: bool) -> _Update:
        """One optimiser update on the transitions (``images``, ``steps``), both (transitions,), of ``count`` in all."""
        scale = self.loss_scale  # each update begins with all of it: there is no state that a resumed run would lack
        loss, difference, norm = self._summed(objective, images, steps, count, scale)
        while scale > 1 and not torch.isfinite(norm):
            scale = max(1.0, scale / 16)
            loss, difference, norm = self._summed(objective, images, steps, count, scale)
        errors: dict[int, float] = {}
        if first and difference is not None:
            errors = check_reproduced(difference, steps, self.tolerance)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.moved = True
        elif self.settings.on_sick_numbers == "stop":
            raise DegenerateBatch(f"the gradient's norm is {norm.item()}: no update was made")
        return _Update(loss, difference, float(norm), errors)

    def _summed(
        self, objective: Objective, images: Tensor, steps: Tensor, count: int, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Leave all learners' gradients in the parameters, clipped. Returns all transitions' loss and Δ log p, and the
        gradients' norm."""
        parts = None
        while parts is None:  # nothing is changed before the gradients are whole
            shortage = ""  # the error itself would keep what its frames hold
            try:
                parts = self._gradients(objective, images, steps, count, scale)
            except torch.OutOfMemoryError as error:
                if self.group.sharded:
                    raise ShortOfMemoryError(f"micro-batches of {self.micro_batch} do not fit into memory") from error
                shortage = str(error) or "out of memory"
            if self.group.any(bool(shortage))[0]:
                if self.micro_batch == 1:
                    raise torch.OutOfMemoryError(shortage or "another learner has no memory for one transition")
                parts, self.micro_batch = None, -(-self.micro_batch // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        self.group.sum_gradients(self.parameters)
        if scale != 1:
            for gradient in (parameter.grad for parameter in self.parameters if parameter.grad is not None):
                gradient /= scale
        loss, difference = parts
        loss = self.group.gather(loss)[: len(images)]
        if difference is not None:
            difference = self.group.gather(difference)[: len(images)]
        norm = gathered(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm))
        return loss, difference, norm

    def _summary(self, updates: Sequence[_Update]) -> UpdateStatistics:
        norms = [update.gradient_norm for update in updates if isfinite(update.gradient_norm)]
        statistics = UpdateStatistics(
            loss=float(torch.cat([update.loss for update in updates]).mean()),
            gradient_norm=sum(norms) / max(1, len(norms)),
            micro_batch=self.micro_batch,
            learners=self.group.size,
            skipped_updates=len(updates) - len(norms),
            first_update_error=updates[0].errors,
        )
        if differences := [update.difference for update in updates if update.difference is not None]:
            difference = torch.cat(differences)
            ratio = difference.exp()
            statistics.approximate_kl = estimated_kl(difference)
            statistics.ratio_mean, statistics.ratio_max = float(ratio.mean()), float(ratio.max())
            clipped = (ratio - 1).abs() > self.settings.clip_range
            statistics.clip_fraction = float(clipped.double().mean())
        return statistics

    def _gradients(
        self, objective: Objective, images: Tensor, steps: Tensor, count: int, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Add up the gradients of this learner's part of an update. Returns its transitions' loss and Δ log p."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, differences = [], []
        (images, steps), real = self.group.share(images, steps)
        for image, step in zip(images.split(self.micro_batch), steps.split(self.micro_batch), strict=True):
            loss, difference = objective(image, step)
            (loss[: max(0, real)].sum() * scale / count).backward()
            real -= len(loss)
            losses.append(loss.detach())
            if difference is not None:
                differences.append(difference)
        return torch.cat(losses), torch.cat(differences) if differences else None


def _laid_out(moment: Tensor, parameter: Tensor) -> Tensor:
    """``moment`` in the memory order of ``parameter``."""
    if not moment.dim() or moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def estimated_kl(difference: Tensor) -> float:
    """Schulman's low-variance estimate of KL(old ‖ new): E[(r − 1) − log r], of log r (transitions,)."""
    return float((difference.exp() - 1 - difference).mean())
