"""The DDPO objective and its update (Black et al., "Training Diffusion Models with Reinforcement Learning",
2305.13301).

Denoising is a decision process: state (prompt, x_t, t), action x_{t−1}, policy N(μ_θ(x_t, t, prompt), σ_t² I), one
reward at the end. A *transition* is one (image, denoising step) pair. Gradients are summed over transitions anyway,
so timesteps are folded into the batch: an update is one bag of transitions, computed in micro-batches of whatever
size the device likes best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from policies.health import SickNumbers
from policies.settings import TrainingSettings

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(image indices (batch,), denoising steps (batch,)) → log-probability (batch,) of the stored transitions under θ."""


class RatioError(RuntimeError):
    """The learner does not reproduce the log-probabilities under which the images were drawn."""


def importance_sampling_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """DDPO_IS, equation 6 with PPO's clipping: the loss of each transition (batch,)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def score_function_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """DDPO_SF, equation 5: the loss of each transition (batch,); its gradient is REINFORCE's."""
    return -advantage * log_prob


@dataclass
class UpdateStatistics:
    """What one call of :meth:`PolicyLearner.learn` did, averaged over its transitions and updates."""

    loss: float
    approximate_kl: float
    ratio_mean: float
    ratio_max: float
    clip_fraction: float
    gradient_norm: float
    micro_batch: int
    skipped_updates: int
    first_update_error: dict[int, float] = field(default_factory=dict)
    """|Δ log p| of the first update, the largest over images, for each denoising step."""


class PolicyLearner:
    """Updates ``parameters`` by DDPO. Knows nothing of diffusion: a policy is whatever gives log-probabilities."""

    def __init__(self, parameters: Sequence[nn.Parameter], settings: TrainingSettings, micro_batch: int) -> None:
        if not parameters:
            raise ValueError("there is nothing to train: no parameter was given")
        self.parameters = list(parameters)
        self.settings = settings
        self.micro_batch = micro_batch
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def learn(
        self,
        log_prob: LogProb,
        old_log_prob: Tensor,
        advantage: Tensor,
        steps: Tensor,
        generator: torch.Generator,
    ) -> UpdateStatistics:
        """One step's updates.

        ``old_log_prob`` (images, T) under the policy that drew the images, ``advantage`` (images,), ``steps`` (S,) the
        denoising steps that have a density. ``generator`` shuffles images and picks each image's share of the steps.
        Raises :class:`RatioError` before the first update if the policy does not reproduce ``old_log_prob``.
        """
        tally = _Tally()
        settings = self.settings
        images, share = len(advantage), settings.timesteps_per_image(len(steps))
        for _ in range(settings.inner_epochs):
            order = torch.randperm(images, generator=generator)
            for members in order.chunk(settings.updates_per_step):
                picks = torch.stack(
                    [steps[torch.randperm(len(steps), generator=generator)[:share]] for _ in range(len(members))]
                )
                self._update(
                    log_prob, old_log_prob, advantage, members.repeat_interleave(share), picks.flatten(), tally
                )
        return tally.summary(self.micro_batch)

    def _update(
        self, log_prob: LogProb, old: Tensor, advantage: Tensor, images: Tensor, steps: Tensor, tally: "_Tally"
    ) -> None:
        """One optimiser update on the transitions (``images``, ``steps``), both (transitions,)."""
        first = tally.updates == 0
        parts = None
        while parts is None:  # nothing is changed before the gradients are whole
            try:
                parts = self._gradients(log_prob, old, advantage, images, steps)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch = -(-self.micro_batch // 2)
            if parts is None and torch.cuda.is_available():
                torch.cuda.empty_cache()
        for loss, difference, step in parts:
            tally.add(loss, difference, step, self.settings.clip_range)
        if first:
            tally.check_first_update(self.settings.ratio_tolerance)
        tally.updates += 1
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        if not torch.isfinite(norm):
            if self.settings.on_sick_numbers == "stop":
                raise SickNumbers(f"the gradient's norm is {norm.item()}: no update was made")
            tally.skipped += 1
            return
        self.optimizer.step()
        tally.gradient_norms.append(float(norm))

    def _gradients(
        self, log_prob: LogProb, old: Tensor, advantage: Tensor, images: Tensor, steps: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Add up the gradients of an update. Returns loss, Δ log p and denoising steps of every micro-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for image, step in zip(images.split(self.micro_batch), steps.split(self.micro_batch), strict=True):
            new = log_prob(image, step)
            reference = old[image, step].to(new)
            weight = advantage[image].to(new)
            if self.settings.objective == "importance_sampling":
                loss = importance_sampling_loss(new, reference, weight, self.settings.clip_range)
            else:
                loss = score_function_loss(new, weight)
            (loss.sum() / len(images)).backward()
            parts.append((loss.detach(), (new - reference).detach(), step))
        return parts


class _Tally:
    """Running sums over the transitions of one step."""

    def __init__(self) -> None:
        self.updates = self.skipped = 0
        self.gradient_norms: list[float] = []
        self._losses: list[Tensor] = []
        self._differences: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._first_update_error: dict[int, float] = {}
        self._clip_range = 0.0

    def add(self, loss: Tensor, difference: Tensor, steps: Tensor, clip_range: float) -> None:
        self._losses.append(loss)
        self._differences.append(difference)
        self._steps.append(steps)
        self._clip_range = clip_range

    def check_first_update(self, tolerance: float) -> None:
        # NaN compares as smaller than anything: as infinity it is the worst that it is.
        difference = torch.cat(self._differences).abs().nan_to_num(nan=torch.inf).cpu()
        steps = torch.cat(self._steps).cpu()
        self._first_update_error = {int(s): float(difference[steps == s].max()) for s in steps.unique()}
        worst = max(self._first_update_error, key=lambda s: self._first_update_error[s])
        if not self._first_update_error[worst] <= tolerance:
            raise RatioError(
                f"before any update the log-probability at denoising step {worst} differs by "
                f"{self._first_update_error[worst]:.3g} nats from the stored one (allowed: {tolerance:.3g}). "
                "Sampler and learner differ: check weights version, guidance, precision and dropout"
            )

    def summary(self, micro_batch: int) -> UpdateStatistics:
        difference = torch.cat(self._differences)
        ratio = difference.exp()
        return UpdateStatistics(
            loss=float(torch.cat(self._losses).mean()),
            # Schulman's low-variance estimate of KL(old ‖ new): E[(r − 1) − log r].
            approximate_kl=float((ratio - 1 - difference).mean()),
            ratio_mean=float(ratio.mean()),
            ratio_max=float(ratio.max()),
            clip_fraction=float(((ratio - 1).abs() > self._clip_range).double().mean()),
            gradient_norm=sum(self.gradient_norms) / max(1, len(self.gradient_norms)),
            micro_batch=micro_batch,
            skipped_updates=self.skipped,
            first_update_error=self._first_update_error,
        )
