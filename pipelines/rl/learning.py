"""The learner's side of a diffusion model: a network being trained, its optimiser and its state."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.denoisers import load_family
from pipelines.rl import weights as trainable
from pipelines.rl.activations import find_micro_batch, room, transitions_of
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.sharding import own_part, placed_as, shard, unsharded
from pipelines.rl.stored_latents import StoredLatents
from pipelines.rl.trajectory import Trajectory, version_of
from pipelines.settings import ModelSettings
from pipelines.storage.checkpoint import LearnerState, WeightsKind
from pipelines.storage.tensor_files import Outline
from policies.rl.group import Group, gathered
from policies.rl.health import DegenerateBatch
from policies.rl.ratio import RatioBound, check_reproduced
from policies.rl.rollouts import Network, Rollouts, replayed
from policies.rl.settings import SamplingSettings, TrainingSettings
from policies.rl.update import PolicyLearner, UpdateStatistics, estimated_kl

_LOSS_SCALE = 2.0**16  # below 6e-8 a gradient in float16 is 0


class DiffusionLearner:
    """DDPO on the network of a diffusion model, alone or as one of a ``group`` whose ranks all receive the same calls.

    ``sharding``: whether they share out weights, gradients and optimiser state; None: where these do not fit on one
    device. Then weights and state are gathered: all have to ask for them, and to save, at the same time.
    """

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        device: str = "cpu",
        group: Group | None = None,
        sharding: bool | None = None,
    ) -> None:
        torch.manual_seed(seed)  # LoRA's initial weights
        self.model = model
        self.sampling, self.training = sampling, training
        self.group = group = group or Group()
        self.policy = DiffusionPolicy(model, sampling, device, trained=True)
        self.parameters = trainable.prepare(self.policy.network, model)
        self.micro_batch = find_micro_batch(
            self.policy, training.micro_batch, transitions_of(self.policy, training, group.size), group
        )
        group.sharded = group.size > 1 and group.any(self._is_too_large() if sharding is None else sharding)[0]
        if group.sharded:
            shard(self.policy.network, group.size)
            self.policy.shares_halves = False  # its weights are whole in its own forward alone
            if sampling.cache and not training.algorithm.on_forward_process:
                raise ValueError("sampling.cache: a model that learners share out is not replayed so: set it to null")
            self.parameters = {n: p for n, p in self.policy.network.named_parameters() if p.requires_grad}
        self.policy.use_kernels()
        self.masters = trainable.masters(self.parameters)
        scale = _LOSS_SCALE if self.policy.dtype == torch.float16 else 1.0
        self.learner = PolicyLearner(list(self.masters.values()), training, self.micro_batch, group, scale)
        self.take_ratio_bound(RatioBound.of(training, math.prod(self.policy.family.latent_shape)))
        self.learner.optimizer.register_step_post_hook(lambda *_: trainable.fill(self.parameters, self.masters))
        self.first = trainable.copied(self.masters) if training.kl_weight else {}
        self.average = trainable.copied(self.masters) if training.ema_decay else {}
        self.previous: dict[str, Tensor] = {}  # at depth 1: what the version before drew with
        self.weights_version = 0
        self._given: dict[str, dict[tuple[str, str], Tensor]] = {}  # kind → (name, moment) → of a state that comes in

    def learn(
        self, trajectory: Trajectory | Sequence[Trajectory], advantage: np.ndarray, seed: int
    ) -> tuple[UpdateStatistics, int]:
        """One step's updates on one trajectory, or several, with ``advantage`` (images,). Returns statistics and
        changed tensors.

        At depth 1 they may be of the version before. That, and weights whose log-probabilities are computed anew, are
        replayed on a micro-batch of them, to give what is stored.
        Raises ValueError on a trajectory of other weights, RatioError and DegenerateBatch as the policies do.
        """
        parts = [trajectory] if isinstance(trajectory, Trajectory) else trajectory
        drawn_by = version_of(parts)
        staleness = self.weights_version - drawn_by
        if staleness and (staleness != 1 or not self.previous):
            raise ValueError(
                f"the images were drawn by weights version {drawn_by}, the learner holds "
                f"{self.weights_version}: at depth {self.training.depth} that cannot be"
            )
        policy, training = self.policy.by(self.sampling.at(drawn_by)), self.training
        before = trainable.copied(self.masters)
        rollouts = self._rollouts(policy, parts, advantage, before, seed)
        objective = training.algorithm.objective(rollouts, training)
        schedule = policy.schedule
        steps = torch.tensor(training.learnable_steps(len(schedule.timesteps), schedule.stochastic_steps.tolist()))
        generator, found = torch.Generator().manual_seed(seed), {}
        if rollouts.proximal and not training.algorithm.on_forward_process:
            found = self._replay(rollouts, steps, generator)
        # An image that is as good as its prompt's others teaches nothing, but to stay near the first weights.
        teaching = (
            None if training.algorithm.on_forward_process or training.kl_weight else torch.from_numpy(advantage != 0)
        )
        statistics = self.learner.learn(objective, len(advantage), steps, generator, teaching)
        statistics = replace(statistics, staleness=staleness, **found)
        pairs = [(own_part(before[name]), own_part(value.detach())) for name, value in self.masters.items()]
        flags = [(start != now).any() for start, now in pairs] + [~now.isfinite().all() for _, now in pairs]
        raised = self.group.any(*torch.stack(flags).tolist())  # asked at once: a card is waited for but one time
        changed, sick = sum(raised[: len(pairs)]), any(raised[len(pairs) :])
        if not changed and self.training.on_sick_numbers == "stop":
            why = "check the learning rate" if np.any(advantage) else "no image is better than what it is compared with"
            raise DegenerateBatch(f"the step's updates changed no tensor: {why}")
        if sick:
            raise DegenerateBatch("a weight is no longer finite: lower the learning rate and resume")
        self.weights_version += 1
        if training.depth:
            self.previous = trainable.copied(self.average) if self._draws_average else before
        for name, mean in self.average.items():
            mean.lerp_(self.masters[name].detach(), 1 - training.ema_decay)
        return statistics, changed

    def _replay(self, rollouts: Rollouts, steps: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """What of the statistics the weights that drew tell. Raises RatioError if they do not give what is stored."""

        def both(images: Tensor, steps: Tensor) -> Tensor:
            networks = rollouts.behaviour, rollouts.network
            return torch.stack([replayed(rollouts, network, images, steps) for network in networks], dim=1)

        apart, chosen = self.learner.on_some(both, len(rollouts.advantage), steps, generator)
        error = check_reproduced(apart[:, 0], chosen, self.ratio_bound.tolerance)
        return {"first_update_error": error} | (
            {} if rollouts.recomputed else {"behaviour_kl": estimated_kl(apart[:, 1])}
        )

    def take_ratio_bound(self, bound: RatioBound) -> None:
        """Hold the first update's ratio to ``bound`` from now on."""
        self.ratio_bound, self.learner.tolerance = bound, bound.tolerance

    def find_ratio_bound(self, prompts: Sequence[str]) -> RatioBound:
        """Take and return the bound that the settings ask for. Where they leave it open, one sampler's call is drawn
        here for as many ``prompts``, and some of it is replayed in the learner's own calls: weights, device and code
        are the same, so what differs is rounding. All of a group have to ask."""
        asked, on_forward = self.training.ratio_tolerance, self.training.algorithm.on_forward_process
        if isinstance(asked, str) and not on_forward:
            apart, numbers = self.rounding(prompts), math.prod(self.policy.family.latent_shape)
            coarse = self.policy.dtype != torch.float32 or self.policy.device.type == "cuda"  # which has TF32
            noise = float(apart.nan_to_num(nan=torch.inf).max())
            self.take_ratio_bound(RatioBound.of(self.training, numbers, noise, coarse))
        return self.ratio_bound

    def rounding(self, prompts: Sequence[str]) -> Tensor:
        """|Δ log p| of some transitions between a sampler's call for ``prompts`` and a learner's, at equal weights.
        Where there is no memory for all of them, half have to do, as they would for a sampler."""
        count, drawn = min(len(prompts), self.micro_batch) if self.group.sharded else len(prompts), None
        while drawn is None:
            try:
                _, drawn = self.policy.denoise(prompts[:count], range(count), self.weights_version)
            except torch.OutOfMemoryError:
                if count == 1 or self.group.sharded:
                    raise
            if self.group.any(drawn is None)[0]:
                drawn, count = None, -(-count // 2)
        rollouts = self._rollouts(self.policy, [drawn], np.zeros(count), {}, seed=0)
        steps, generator = self.policy.schedule.stochastic_steps.cpu(), torch.Generator().manual_seed(0)

        def apart(images: Tensor, steps: Tensor) -> Tensor:
            return replayed(rollouts, rollouts.network, images, steps)

        return self.learner.on_some(apart, count, steps, generator)[0].abs()

    def _rollouts(
        self,
        policy: DiffusionPolicy,
        parts: Sequence[Trajectory],
        advantage: np.ndarray,
        before: dict[str, Tensor],
        seed: int,
    ) -> Rollouts:
        """What was drawn, by the settings of ``policy``, and the network with all the sets of weights."""
        device, schedule = policy.device, policy.schedule
        prompts = [prompt for part in parts for prompt in part.prompts]
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        conditions = policy.embed(list(unique))
        owner = torch.tensor([unique[prompt] for prompt in prompts], device=device)
        stored = StoredLatents([part.latents for part in parts], device)

        def network(latents: Tensor, steps: Tensor, images: Tensor) -> Tensor:
            given = {name: table[owner[images]] for name, table in conditions.items()}
            if self.training.algorithm.on_forward_process:  # which knows no sampler, and no guidance
                return policy.predict(latents, schedule.timesteps[steps], given, 1.0)
            return policy.replay(latents, steps, given, lambda full: stored[images, full])

        def under(values: dict[str, Tensor]) -> Network:
            def other(latents: Tensor, steps: Tensor, images: Tensor) -> Tensor:
                with torch.no_grad(), trainable.swapped(self.parameters, values):
                    return network(latents, steps, images)

            return other

        densities = np.concatenate([part.log_probs for part in parts])
        log_probs, weights = (torch.from_numpy(np.array(each)).to(device) for each in (densities, advantage))
        if self.training.log_density == "sum":
            log_probs = log_probs * math.prod(self.policy.family.latent_shape)
        start = under(before)
        stale = version_of(parts) != self.weights_version
        behaviour = under(self.previous) if stale else under(self.average) if self._draws_average else start

        def proximal(*of: Tensor) -> Tensor | None:
            return start(*of) if self.learner.moved else None

        tables = schedule, stored, log_probs, weights
        networks, how = (network, under(self.first), behaviour), (seed, self.training.log_density)
        anew = self.ratio_bound.recomputes and not stale  # of stale ones they are, always
        return Rollouts(*tables, *networks, *how, proximal if stale or anew else None, anew, lambda: self.learner.epoch)

    @property
    def _draws_average(self) -> bool:
        """DiffusionNFT's old policy, which draws, is the average; elsewhere the learned weights draw."""
        return bool(self.average) and self.training.algorithm.average_draws

    def weights(self, kind: WeightsKind = "current") -> trainable.Weights:
        """As they travel what samplers draw with ("current"), what they drew with before the last step
        of learning, at depth 1 ("previous"), or what is evaluated and saved: the average over steps ("averaged")."""
        with self.exported(kind) as tensors:
            return {name: trainable.to_numpy(each) for name, each in tensors.items()}

    @contextmanager
    def exported(self, kind: WeightsKind) -> Iterator[dict[str, Tensor]]:
        """In this block, some of the :meth:`weights` where they lie. All of a group have to ask."""
        with self.holding(kind), unsharded(self.policy.network):
            yield trainable.exported(self.policy.network)

    def holding(self, kind: WeightsKind) -> AbstractContextManager[None]:
        """In this block the network holds some of the :meth:`weights`."""
        held = self.previous if kind == "previous" else {}
        if kind == "averaged" or (kind == "current" and self._draws_average):
            held = self.average
        return trainable.swapped(self.parameters, held) if held else nullcontext()

    def state(self) -> LearnerState:
        """Trained parameters and the optimiser's moments, in float32 whatever the network computes in; of the first of
        a group, the others' has no tensors."""
        tensors = {name: self.state_part([name])[0] for name in self._held()}
        return LearnerState({} if self.group.rank else tensors, self.weights_version)

    def state_outline(self) -> tuple[Outline, int]:
        """What :meth:`state` holds, and the weights' version."""
        held = self._held()
        shapes = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in held.items()}
        return shapes, self.weights_version

    def state_part(self, names: Sequence[str]) -> list[np.ndarray]:
        """Some of the :meth:`state`; of the first of a group, others give nothing but their share."""
        held = self._held()
        whole = (gathered(held[name]) for name in names)
        return [trainable.to_numpy(each) if self.group.rank == 0 else np.empty(0) for each in whole]

    def _held(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {f"parameter/{name}": parameter for name, parameter in self.masters.items()}
        held |= {f"average/{name}": mean for name, mean in self.average.items()}
        held |= {f"previous/{name}": value for name, value in self.previous.items()}
        for name, moments in zip(self.masters, self.learner.moments(), strict=True):
            held |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
        return held

    def restore(self, state: LearnerState) -> None:
        """The inverse of :meth:`state`. Raises KeyError if the state is of another model or another LoRA."""
        self.restore_part(state.tensors)
        self.restored(state.weights_version)

    @torch.no_grad()
    def restore_part(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take some of a state's tensors; :meth:`restored` follows the last ones. Raises KeyError."""
        written: dict[str, Mapping[str, Tensor]] = {"parameter": self.masters, "average": self.average}
        for key, array in tensors.items():
            kind, name = key.split("/", 1)
            name, moment = name.rsplit("/", 1) if kind == "optimizer" else (name, "")
            like = self.masters[name]
            value = trainable.from_numpy(array, torch.float32 if moment else like.dtype)
            # A count of steps is no part of a sharded tensor.
            value = value if moment and not value.dim() else placed_as(value, like)
            if kind in written:
                value = written[kind][name].copy_(value) if name in written[kind] else like
            self._given.setdefault(kind, {})[name, moment] = value

    @torch.no_grad()
    def restored(self, weights_version: int) -> None:
        """Go on from what the parts held. Raises KeyError if some of it is missing."""
        given, self._given = self._given, {}
        if missing := [name for name in self.masters if (name, "") not in given.get("parameter", {})]:
            raise KeyError(missing[0])
        trainable.fill(self.parameters, self.masters)
        for name, mean in self.average.items() if "average" not in given else ():
            mean.copy_(self.masters[name])
        self.previous = {name: value for (name, _), value in given.get("previous", {}).items() if self.training.depth}
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.masters}
        for (name, moment), value in given.get("optimizer", {}).items():
            moments[name][moment] = value
        self.learner.restore_moments(list(moments.values()))
        self.weights_version = weights_version

    def begin_at(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at other weights of what is trained than the model's own, by their names."""
        with torch.no_grad():
            for name, parameter in self.masters.items():
                parameter.copy_(weights[name])
        trainable.fill(self.parameters, self.masters)
        self.first = trainable.copied(self.masters) if self.first else {}
        self.average = trainable.copied(self.masters) if self.average else {}

    def save(self, directory: str | Path) -> None:
        """Write a diffusers directory of the averaged weights, LoRA merged, and LoRA alone in its ``lora/``, for the
        base's. The first of a group writes.
        """
        family, lora = self.policy.family, self.model.lora_rank
        weights = self.weights("averaged") if lora or self.group.sharded else {}
        if self.group.rank:
            return
        with ExitStack() as stack:
            if self.group.sharded:
                family = load_family(self.model.path, self.policy.dtype)
                trainable.load_weights(family.network, weights)
            else:
                stack.enter_context(self.holding("averaged"))
                stack.enter_context(trainable.plain(family.network))
                self.policy.lay_out(torch.contiguous_format)  # safetensors knows no other
            family.pipeline.save_pretrained(directory, safe_serialization=True)
            self.policy.lay_out()
        if lora and hasattr(family.pipeline, "save_lora_weights"):
            layers = {name: torch.from_numpy(each) for name, each in weights.items()}
            named = {f"{family.network_name}_lora_layers": layers}
            family.pipeline.save_lora_weights(Path(directory) / "lora", **named)

    def _is_too_large(self) -> bool:
        """Whether weights, gradients, both moments, a step's starting point and averages do not fit on the device."""
        copies = 5 + bool(self.training.kl_weight) + bool(self.training.ema_decay) + self.training.depth
        trained, network = self.parameters.values(), sum(p.nbytes for p in self.policy.network.parameters())
        held = sum(p.numel() * torch.float32.itemsize * (copies - (p.dtype == torch.float32)) for p in trained)
        return network + held > room(self.policy.device)
