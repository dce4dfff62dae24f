"""Stable Diffusion 3: a rectified flow by a transformer, sampled as an SDE (:mod:`policies.diffusion.flow`)."""

from typing import Any

import torch
from torch import Tensor

from pipelines.denoisers.family import Conditions, Family, checked
from policies.diffusion.flow import FlowSchedule, PreservingSchedule
from policies.rl.settings import SamplingSettings


class StableDiffusion3(Family):
    """With or without the third text encoder, T5: where its files are not there, its tokens are zeros."""

    pipeline_class = "StableDiffusion3Pipeline"
    network_name = "transformer"
    scales = ("shift_factor",)

    @staticmethod
    def scheduler(config: Any) -> Any:
        """The flow's own times."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**config.model_dump())

    def schedule(self, sampling: SamplingSettings) -> FlowSchedule:
        """``sampling.eta`` is the noise level of the SDE, or of coefficient-preserving sampling."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(sampling.grid)
        kept = sampling.kept
        times = scheduler.sigmas.to("cpu", torch.float64)[[*kept, -1]]
        noisy = torch.tensor([step in sampling.noisy for step in range(len(kept))])
        tables = scheduler.timesteps.cpu()[kept], times, sampling.noise * noisy.double()
        schedule = PreservingSchedule(*tables) if sampling.method == "cps" else FlowSchedule(*tables)
        return checked(schedule, self.files.scheduler.steps(sampling))

    def encode(self, prompt: str | None, device: torch.device) -> Conditions:
        """Hidden states (tokens, width) of all encoders, and those of both CLIPs as a whole (width,)."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt or "", None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The velocity ε − x_0."""
        return self.network(hidden_states=latents, timestep=timesteps, **conditions, return_dict=False)[0]
