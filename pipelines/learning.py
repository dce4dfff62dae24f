"""The learner's side of a diffusion model: a UNet being trained by DDPO, its optimiser and its state."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.diffusion import DiffusionPolicy, load_pipeline
from pipelines.settings import ModelSettings
from pipelines.trainable import Weights, exported_weights, from_numpy, load_weights, prepare, to_numpy
from pipelines.trajectory import Trajectory
from policies.ddpo import PolicyLearner, SilentUpdateError, UpdateStatistics
from policies.settings import SamplingSettings, TrainingSettings

CPU_MICRO_BATCH = 64
"""On a CPU larger calls leave the cache and gain nothing; see benchmarks/micro_batch.py."""


@dataclass(frozen=True)
class LearnerState:
    """Everything that learning needs to go on as if it had never stopped."""

    tensors: dict[str, np.ndarray]
    weights_version: int


class DiffusionLearner:
    """DDPO on a Stable Diffusion UNet."""

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        training: TrainingSettings,
        seed: int,
        device: str = "cpu",
        micro_batch: int | None = None,
    ) -> None:
        torch.manual_seed(seed)  # LoRA's initial weights
        self.model = model
        self.training = training
        self.policy = DiffusionPolicy(model, sampling, device)
        self.parameters = prepare(self.policy.unet, model)
        self.micro_batch = micro_batch or self._find_micro_batch()
        self.learner = PolicyLearner(list(self.parameters.values()), training, self.micro_batch)
        self.weights_version = 0

    def learn(self, trajectory: Trajectory, advantage: np.ndarray, seed: int) -> tuple[UpdateStatistics, int]:
        """One step's updates on ``trajectory`` with ``advantage`` (images,). Returns statistics and changed tensors.

        Raises ValueError on a trajectory of other weights, RatioError and SilentUpdateError as the policies do.
        """
        if trajectory.weights_version != self.weights_version:
            raise ValueError(
                f"the images were drawn by weights version {trajectory.weights_version}, the learner holds "
                f"{self.weights_version}: at depth 0 they must be the same"
            )
        device, schedule = self.policy.device, self.policy.schedule
        latents = torch.from_numpy(np.array(trajectory.latents)).to(device)
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(trajectory.prompts))}
        embeddings = self.policy.embed(list(unique))
        owner = torch.tensor([unique[prompt] for prompt in trajectory.prompts], device=device)

        def log_prob(images: Tensor, steps: Tensor) -> Tensor:
            images, steps = images.to(device), steps.to(device)
            before, after = latents[images, steps], latents[images, steps + 1]
            output = self.policy.predict(before, schedule.timesteps[steps], embeddings[owner[images]])
            return schedule.log_prob(before, after, output, steps, self.training.log_density)

        old = torch.from_numpy(np.array(trajectory.log_probs)).to(device)
        if self.training.log_density == "sum":
            old = old * latents[0, 0].numel()
        previous = [parameter.detach().clone() for parameter in self.parameters.values()]
        statistics = self.learner.learn(
            log_prob,
            old,
            torch.from_numpy(np.array(advantage)).to(device),
            schedule.stochastic_steps.cpu(),
            torch.Generator().manual_seed(seed),
        )
        changed = sum(not torch.equal(a, b) for a, b in zip(previous, self.parameters.values(), strict=True))
        if not changed:
            raise SilentUpdateError("the step's updates changed no tensor: check learning rate and advantages")
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters.values()):
            raise SilentUpdateError("a weight is no longer finite: lower the learning rate and resume")
        self.weights_version += 1
        return statistics, changed

    def weights(self) -> Weights:
        """What samplers need, under the plain UNet's names."""
        return exported_weights(self.policy.unet)

    def state(self) -> LearnerState:
        """Trained parameters and the optimiser's moments."""
        tensors = {f"parameter/{name}": to_numpy(parameter) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.learner.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = to_numpy(torch.as_tensor(value))
        return LearnerState(tensors, self.weights_version)

    def restore(self, state: LearnerState) -> None:
        """The inverse of :meth:`state`. Raises KeyError if the state is of another model or another LoRA."""
        moments: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                saved = state.tensors[f"parameter/{name}"]
                parameter.copy_(from_numpy(saved, parameter.dtype))
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
        """A stock pipeline with the present weights, LoRA merged."""
        pipeline = load_pipeline(self.model.path, getattr(torch, self.model.dtype))
        load_weights(pipeline.unet, self.weights())
        return pipeline

    def save(self, directory: str) -> None:
        """Write a diffusers directory of :meth:`merged_pipeline`."""
        self.merged_pipeline().save_pretrained(directory, safe_serialization=True)

    def _find_micro_batch(self) -> int:
        """Transitions a call: fixed on a CPU; on a GPU the largest power of two that fits into 80 % of free memory."""
        transitions = self.training.images_per_update * self.policy.sampling.steps
        if self.policy.device.type != "cuda":
            return min(CPU_MICRO_BATCH, transitions)
        one, two = self._peak_memory(1), self._peak_memory(2)
        free, _ = torch.cuda.mem_get_info(self.policy.device)
        fitting = int((0.8 * free - one) / max(two - one, 1)) + 1
        return min(2 ** max(0, fitting.bit_length() - 1), transitions)

    def _peak_memory(self, batch: int) -> int:
        """Bytes a forward and backward pass over ``batch`` transitions adds."""
        config, device = self.policy.pipeline.unet.config, self.policy.device
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        latents = torch.zeros(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
        times = self.policy.schedule.timesteps[:1].expand(batch)
        self.policy.predict(latents, times, self.policy.embed([""] * batch)).float().sum().backward()
        peak = torch.cuda.max_memory_allocated(device) - before
        for parameter in self.parameters.values():
            parameter.grad = None
        return peak
