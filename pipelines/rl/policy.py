"""A diffusion model as a policy: images drawn with their trajectories, and the outputs behind their log-probabilities.

An image is a function of (weights, prompt, seed): each has its own CPU generator, read in the order in which a stock
pipeline (``generator=[…]``, ``eta=…``) reads it, so a stock DDIM pipeline draws the very same images.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.denoisers import check_cache, check_guidance, deep_cache, load_family
from pipelines.denoisers.deep_cache import can_be_run
from pipelines.denoisers.family import Conditions, placed
from pipelines.rl.trajectory import Trajectory
from pipelines.rl.weights import changed_by, copied, from_numpy, load_weights, swapped, to_numpy
from pipelines.settings import ModelSettings
from pipelines.storage.model_files import reading
from policies.rl.health import DegenerateBatch
from policies.rl.settings import SamplingSettings

_KEPT_BYTES = 2**30  # of prompts' conditions, in the machine's memory


class DiffusionPolicy:
    """A pipeline of any family on one device, bound to its sampling settings. Raises ValueError if they do not fit."""

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, device: str = "cpu", trained: bool = False
    ) -> None:
        """``trained``: whether somebody prepares the network for training, and then calls :meth:`use_kernels`."""
        self.device, self.kernels = torch.device(device), model.kernels
        if self.device.type == "cuda":  # products of float32 in TF32, as convolutions are anyway
            torch.set_float32_matmul_precision("high")
        # Kept here because diffusers' own property walks every module at every call.
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.family = load_family(model.path, self.dtype, "meta" if device == "meta" else None)
        check_guidance(self.family.files, sampling.guidance_scale)
        check_cache(self.family.files, sampling.cache)
        self.shares_halves = can_be_run(self.family.files.network)
        self.network.to(self.device)  # the other parts come when they are needed
        self.sampling = sampling.at(0)
        with reading(self.family.files.directory / "scheduler"):
            self.schedule = self.family.schedule(sampling.at(0)).to(self.device)
        self._conditions: dict[str | None, Conditions] = {}
        self.base: dict[str, Tensor] = {}  # what the first weights from elsewhere replaced, in the machine's memory
        if not trained:
            self.use_kernels()

    @property
    def network(self) -> Any:
        """The trained network."""
        return self.family.network

    def lay_out(self, form: torch.memory_format = torch.channels_last) -> None:
        """If ``model.kernels`` says so, have weights lie as tensor cores read them, or in another form."""
        if "channels_last" in self.kernels:
            self.network.to(memory_format=form)

    def use_kernels(self) -> None:
        """Have the network compute as ``model.kernels`` says: the same numbers, but for rounding."""
        self.lay_out()
        if "compiled" in self.kernels or "graphs" in self.kernels:
            self.shares_halves = False  # what is compiled is the network's own forward
            mode = "reduce-overhead" if "graphs" in self.kernels else "default"
            self.network.compile(dynamic=False, mode=mode)

    def load(self, weights: Mapping[str, np.ndarray | Tensor]) -> int:
        """Take a learner's weights, or a part of them. Returns how many tensors changed. Raises KeyError on an unknown
        name."""
        known = dict(self.network.named_parameters())
        self.base |= copied({name: known[name] for name in changed_by(weights) if name not in self.base}, "cpu")
        return load_weights(self.network, weights, self.base)

    def embed(self, prompts: Sequence[str | None]) -> Conditions:
        """The prompts' conditions; of None: what guidance leads away from. Each is computed once, alone, so it never
        depends on a batch; the text encoders take memory of the device only while they compute."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._conditions]
        # What has no numbers cannot be brought elsewhere.
        home = torch.device("meta" if self.device.type == "meta" else "cpu")
        if unknown:
            for encoder in self.family.text_encoders:
                placed(encoder, self.device)
            with torch.no_grad():
                for prompt in unknown:
                    encoded = self.family.encode(prompt, self.device)
                    place = self.device if prompt is None else home  # that of None is asked for at every step
                    self._conditions[prompt] = {name: each.to(place, copy=True) for name, each in encoded.items()}
            for encoder in self.family.text_encoders:
                placed(encoder, home)
        known = [self._conditions[prompt] for prompt in prompts]
        size = sum(tensor.nbytes for tensor in known[0].values()) or 1  # a model without text has empty ones
        most = max(len(set(prompts)), _KEPT_BYTES // size)
        for oldest in [prompt for prompt in self._conditions if prompt is not None][:-most]:
            del self._conditions[oldest]
        return {name: torch.stack([each[name] for each in known]).to(self.device) for name in known[0]}

    def predict(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, guidance_scale: float | None = None
    ) -> Tensor:
        """The network's output (batch, channels, height, width), guided if ``guidance_scale`` (by default the
        sampling's) is above 1.

        The unconditional half rides in the same call, in sampling and in training alike.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        if self.family.files.kind.embeds_guidance:
            if self.family.files.network.get("guidance_embeds"):
                conditions = conditions | {"guidance": latents.new_full((len(latents),), scale, dtype=torch.float32)}
            return self.family.forward(latents.to(self.dtype), timesteps, conditions)
        if scale == 1:
            return self.family.forward(latents.to(self.dtype), timesteps, conditions)
        if self.shares_halves:
            return self._cached(latents, timesteps, conditions, scale=scale)[0]
        empty = self.embed([None])
        both = {name: torch.cat([empty[name].expand_as(given), given]) for name, given in conditions.items()}
        output = self.family.forward(latents.to(self.dtype).repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        return _guided(output, scale)

    def _cached(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        features: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`predict`, and the features (rows, …) that later steps can begin with, or began with."""
        scale = self.sampling.guidance_scale if scale is None else scale
        branch = self.sampling.cache[1] if self.sampling.cache else 0
        given = self.network, latents.to(self.dtype), timesteps
        if scale == 1:
            return deep_cache.forward(*given, conditions, branch, features)
        output, features = deep_cache.guided_halves(*given, self.embed([None]), conditions, branch, features)
        return _guided(output, scale), features

    def replay(
        self, latents: Tensor, steps: Tensor, conditions: Conditions, begun: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The output of the network at ``steps`` (batch,), as :meth:`denoise` had it: of steps that began with features
        of an earlier one these are computed anew, from the latents that it had, ``begun`` (of its number, (batch,))."""
        timesteps, cache = self.schedule.timesteps, self.sampling.cache
        if cache is None:
            return self.predict(latents, timesteps[steps], conditions)
        after = steps % cache[0]
        output, features = self._cached(begun(steps - after), timesteps[steps - after], conditions)
        later = after.nonzero().flatten()
        if len(later):
            kept = features.unflatten(0, (-1, len(latents)))[:, later].flatten(0, 1)
            some = {name: each[later] for name, each in conditions.items()}
            outcome, _ = self._cached(latents[later], timesteps[steps[later]], some, kept)
            output = output.index_copy(0, later.to(output.device), outcome)
        return output

    def by(self, sampling: SamplingSettings) -> "DiffusionPolicy":
        """The same network, drawn with by other settings. Raises ValueError where the model cannot be."""
        if sampling == self.sampling:
            return self
        other = copy(self)
        other.sampling = sampling
        other.schedule = self.family.schedule(sampling).to(self.device)
        return other

    def rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], weights_version: int = 0
    ) -> tuple[np.ndarray, Trajectory]:
        """One image for each (prompt, seed): images (batch, height, width, 3) uint8 and their trajectory."""
        latents, trajectory = self.denoise(prompts, seeds, weights_version)
        return self.decode(latents), trajectory

    @torch.no_grad()
    def denoise(
        self, prompts: Sequence[str], seeds: Sequence[int], weights_version: int = 0
    ) -> tuple[Tensor, Trajectory]:
        """The latents (batch, channels, height, width) of :meth:`rollout`, and the trajectory."""
        family, schedule, eta = self.family, self.schedule, self.sampling.noise
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> Tensor:
            drawn = [torch.randn(family.latent_shape, generator=each, dtype=self.dtype) for each in generators]
            return torch.stack(drawn).to(self.device)

        family.schedule(self.sampling)  # a scheduler forgets its steps where another has used it
        conditions = self.embed(prompts)
        latents = noise() * getattr(family.pipeline.scheduler, "init_noise_sigma", 1.0)
        stochastic = set(schedule.stochastic_steps.tolist())
        path, log_probs, features, clean = [latents], [], None, None
        coarse = self.sampling.noisy.stop if isinstance(self.sampling.steps, tuple) else len(schedule.timesteps)
        for step, timestep in enumerate(schedule.timesteps):
            times = timestep.repeat(len(prompts))
            if self.sampling.cache is None:
                output = self.predict(latents, times, conditions)
            else:
                fresh = step % self.sampling.cache[0] == 0
                output, features = self._cached(latents, times, conditions, None if fresh else features)
            if step >= coarse:
                index = torch.full((len(prompts),), step, device=self.device)
                denoised = schedule.denoised(latents, output, index)
                output = output if clean is None else schedule.second_order(latents, output, step, clean)
                clean = denoised
            # A step without noise reads its own from the generator, too, as a stock pipeline does.
            following = family.step(schedule, step, latents, output, noise(), eta if step in stochastic else 0.0)
            if step in stochastic:
                index = torch.full((len(prompts),), step, device=self.device)
                log_probs.append(schedule.log_prob(latents, following, output, index))
            else:
                log_probs.append(torch.full((len(prompts),), torch.nan, dtype=torch.float64, device=self.device))
            latents = following
            path.append(latents)
        taken, densities = torch.stack(path, dim=1), torch.stack(log_probs, dim=1).cpu().numpy()
        for image, finite in enumerate(taken.isfinite().flatten(2).all(dim=2).cpu().numpy()):
            if not finite.all():
                when = f"after {finite.argmin()} of {len(finite) - 1} denoising steps"
                whose = f"the image of {prompts[image]!r}, seed {seeds[image]}"
                raise DegenerateBatch(f"{whose}, is NaN or infinite {when}: {self._remedy}")
        return latents, Trajectory(list(prompts), list(seeds), to_numpy(taken), densities, weights_version)

    @torch.no_grad()
    def divergence(self, trajectory: Trajectory) -> np.ndarray:
        """KL of the present policy to the one of the model's files, along a trajectory (batch,): that of its normal
        steps, summed over steps, channels and pixels, in nats an image."""
        latents = from_numpy(trajectory.latents, self.dtype).to(self.device)
        conditions, schedule = self.embed(trajectory.prompts), self.schedule
        steps = [step.repeat(len(latents)) for step in schedule.stochastic_steps]

        def outputs() -> list[Tensor]:
            return [self.replay(latents[:, i[0]], i, conditions, lambda full: latents[:, full[0]]) for i in steps]

        here, parameters = outputs(), dict(self.network.named_parameters())
        with swapped({name: parameters[name] for name in self.base}, self.base):
            there = outputs()
        apart = [
            schedule.divergence(latents[:, step[0]], one, other, step, "sum")
            for step, one, other in zip(steps, here, there, strict=True)
        ]
        return torch.stack(apart).sum(dim=0).cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (batch, channels, height, width) as (batch, height, width, 3) uint8. Raises DegenerateBatch."""
        pixels = self.family.decode(latents).float()
        if bad := int((~pixels.isfinite()).flatten(1).any(dim=1).sum()):
            raise DegenerateBatch(
                f"the autoencoder makes {bad} of {len(pixels)} images NaN or infinite: {self._remedy}"
            )
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        return (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)

    @property
    def _remedy(self) -> str:
        return f"look for such numbers among the weights of {self.family.files.directory}" + (
            "" if self.dtype == torch.float32 else f", or for ones beyond {self.dtype} (model.dtype=float32)"
        )


def _guided(output: Tensor, scale: float) -> Tensor:
    """Away from what is said without a prompt, the first half of ``output``."""
    unconditional, conditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)
