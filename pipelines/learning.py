"""The learner's side of a diffusion model: a network being trained, its optimiser and its state."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pipelines.denoisers import load_family
from pipelines.diffusion import DiffusionPolicy
from pipelines.settings import ModelSettings
from pipelines.trainable import (
    Weights,
    copied,
    exported_adapter,
    exported_weights,
    from_numpy,
    load_weights,
    prepare,
    swapped,
    to_numpy,
)
from pipelines.trajectory import Trajectory
from policies.ddpo import policy_gradient
from policies.forward_process import negative_aware, reward_weighted
from policies.health import SickNumbers
from policies.learner import PolicyLearner, UpdateStatistics
from policies.rollouts import Network, Rollouts
from policies.settings import SamplingSettings, TrainingSettings

OBJECTIVES = {
    "importance_sampling": policy_gradient,
    "score_function": policy_gradient,
    "reward_weighted": reward_weighted,
    "negative_aware": negative_aware,
}

LARGEST_MICRO_BATCH = 512  # beyond this a call gains little even on a small network: see benchmarks/micro_batch.py


@dataclass(frozen=True)
class LearnerState:
    """Everything that learning needs to go on as if it had never stopped."""

    tensors: dict[str, np.ndarray]
    weights_version: int


class DiffusionLearner:
    """DDPO on the network of a diffusion model."""

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)  # LoRA's initial weights
        self.model = model
        self.sampling, self.training = sampling, training
        self.policy = DiffusionPolicy(model, sampling, device)
        self.parameters = prepare(self.policy.network, model)
        self.micro_batch = training.micro_batch or self._find_micro_batch()
        self.learner = PolicyLearner(list(self.parameters.values()), training, self.micro_batch)
        self.first = copied(self.parameters) if training.kl_weight else {}
        self.average = copied(self.parameters) if training.ema_decay else {}
        self.weights_version = 0

    def learn(self, trajectory: Trajectory, advantage: np.ndarray, seed: int) -> tuple[UpdateStatistics, int]:
        """One step's updates on ``trajectory`` with ``advantage`` (images,). Returns statistics and changed tensors.

        Raises ValueError on a trajectory of other weights, RatioError and SickNumbers as the policies do.
        """
        if trajectory.weights_version != self.weights_version:
            raise ValueError(
                f"the images were drawn by weights version {trajectory.weights_version}, the learner holds "
                f"{self.weights_version}: at depth 0 they must be the same"
            )
        schedule, training = self.policy.schedule, self.training
        before = copied(self.parameters)
        objective = OBJECTIVES[training.objective](self._rollouts(trajectory, advantage, before, seed), training)
        steps = training.learnable_steps(self.sampling.steps, schedule.stochastic_steps.tolist())
        generator = torch.Generator().manual_seed(seed)
        statistics = self.learner.learn(objective, len(advantage), torch.tensor(steps), generator)
        changed = sum(not torch.equal(before[name], value) for name, value in self.parameters.items())
        if not changed and self.training.on_sick_numbers == "stop":
            raise SickNumbers("the step's updates changed no tensor: check learning rate and advantages")
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters.values()):
            raise SickNumbers("a weight is no longer finite: lower the learning rate and resume")
        self.weights_version += 1
        for name, mean in self.average.items():
            mean.lerp_(self.parameters[name].detach(), 1 - training.ema_decay)
        return statistics, changed

    def _rollouts(
        self, trajectory: Trajectory, advantage: np.ndarray, drawn_by: dict[str, Tensor], seed: int
    ) -> Rollouts:
        """Everything of ``trajectory`` on the device, and the network with three sets of weights."""
        device, schedule = self.policy.device, self.policy.schedule
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(trajectory.prompts))}
        conditions = self.policy.embed(list(unique))
        owner = torch.tensor([unique[prompt] for prompt in trajectory.prompts], device=device)
        guidance = 1.0 if self.training.on_forward_process else self.sampling.guidance_scale

        def network(latents: Tensor, steps: Tensor, images: Tensor) -> Tensor:
            told = {name: table[owner[images]] for name, table in conditions.items()}
            return self.policy.predict(latents, schedule.timesteps[steps], told, guidance)

        def under(values: dict[str, Tensor]) -> Network:
            def other(latents: Tensor, steps: Tensor, images: Tensor) -> Tensor:
                with torch.no_grad(), swapped(self.parameters, values):
                    return network(latents, steps, images)

            return other

        latents, log_probs, weights = (
            torch.from_numpy(np.array(each)).to(device)
            for each in (trajectory.latents, trajectory.log_probs, advantage)
        )
        if self.training.log_density == "sum":
            log_probs = log_probs * latents[0, 0].numel()
        behaviour = under(self.average if self._draws_average else drawn_by)
        tables = schedule, latents, log_probs, weights
        return Rollouts(*tables, network, under(self.first), behaviour, seed, self.training.log_density)

    @property
    def _draws_average(self) -> bool:
        """DiffusionNFT's old policy, which draws, is the average; elsewhere the learned weights draw."""
        return bool(self.average) and self.training.objective == "negative_aware"

    def weights(self) -> Weights:
        """What samplers draw with, under the plain network's names."""
        return self.averaged_weights() if self._draws_average else exported_weights(self.policy.network)

    def averaged_weights(self) -> Weights:
        """What is evaluated and saved: the average over steps, or the weights themselves."""
        with self._averaging():
            return exported_weights(self.policy.network)

    def _averaging(self) -> AbstractContextManager[None]:
        """In this block the network holds what is evaluated and saved."""
        return swapped(self.parameters, self.average) if self.average else nullcontext()

    def state(self) -> LearnerState:
        """Trained parameters and the optimiser's moments."""
        tensors = {f"parameter/{name}": to_numpy(parameter) for name, parameter in self.parameters.items()}
        tensors |= {f"average/{name}": to_numpy(mean) for name, mean in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.learner.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = to_numpy(torch.as_tensor(value))
        return LearnerState(tensors, self.weights_version)

    def restore(self, state: LearnerState) -> None:
        """The inverse of :meth:`state`. Raises KeyError if the state is of another model or another LoRA."""
        moments: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(from_numpy(state.tensors[f"parameter/{name}"], parameter.dtype))
            for name, mean in self.average.items():
                kept = state.tensors.get(f"average/{name}", state.tensors[f"parameter/{name}"])
                mean.copy_(from_numpy(kept, mean.dtype))
        for key, array in state.tensors.items():
            if key.startswith("optimizer/"):
                name, moment = key.removeprefix("optimizer/").rsplit("/", 1)
                device = "cpu" if moment == "step" else self.policy.device
                dtype = torch.float32 if moment == "step" else self.parameters[name].dtype
                moments.setdefault(name, {})[moment] = from_numpy(array, dtype).to(device)
        for name, values in moments.items():
            self.learner.optimizer.state[self.parameters[name]] = values
        self.weights_version = state.weights_version

    def merged_pipeline(self) -> Any:
        """A stock pipeline with :meth:`averaged_weights`, LoRA merged."""
        family = load_family(self.model.path, getattr(torch, self.model.dtype))
        load_weights(family.network, self.averaged_weights())
        return family.pipeline

    def save(self, directory: str | Path) -> None:
        """Write a diffusers directory of :meth:`merged_pipeline`, and LoRA alone in its ``lora/``, for the base's."""
        pipeline = self.merged_pipeline()
        pipeline.save_pretrained(directory, safe_serialization=True)
        with self._averaging():
            layers = {name: torch.from_numpy(each) for name, each in exported_adapter(self.policy.network).items()}
        if layers and hasattr(pipeline, "save_lora_weights"):
            named = {f"{self.policy.family.network_name}_lora_layers": layers}
            pipeline.save_lora_weights(Path(directory) / "lora", **named)

    def _find_micro_batch(self) -> int:
        """Transitions a network call: as many as fit into memory, at most an update's or ``LARGEST_MICRO_BATCH``.

        Depends on the model and on the size of the machine, not on how busy it is, so that a run can be repeated.
        """
        stochastic = self.policy.schedule.stochastic_steps.tolist()
        share = self.training.timesteps_per_image(len(self.training.learnable_steps(self.sampling.steps, stochastic)))
        transitions = self.training.images_per_update * share
        if self.policy.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.policy.device).total_memory // 2
        else:
            memory = psutil.virtual_memory().total // 8
        fitting = max(1, memory // self._activation_bytes())
        calls = -(-transitions // min(fitting, LARGEST_MICRO_BATCH))
        return -(-transitions // calls)  # calls of equal size

    def _activation_bytes(self) -> int:
        """Bytes that one transition more keeps for the backward pass, counted in real forward passes."""
        device, shape = self.policy.device, self.policy.family.latent_shape
        weights = {parameter.data_ptr() for parameter in self.policy.network.parameters()}
        kept: list[dict[int, int]] = [{}, {}]

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                kept[count - 1][tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        for count in (1, 2):  # what both keep, such as LoRA's merged weights, does not grow
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                times, told = self.policy.schedule.timesteps[:1].expand(count), self.policy.embed([""] * count)
                output = self.policy.predict(torch.zeros(count, *shape, device=device), times, told)
            del output
        return max(1, sum(kept[1].values()) - sum(kept[0].values()))
