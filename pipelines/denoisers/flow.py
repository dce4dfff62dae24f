"""What rectified flows have in common: they are sampled as an SDE (:mod:`policies.diffusion.flow`)."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from pipelines.denoisers.family import Family, checked
from pipelines.denoisers.schedulers import FlowConfig
from policies.diffusion.flow import FlowSchedule, PreservingSchedule
from policies.rl.settings import SamplingSettings


class FlowFamily(Family):
    """Transformers that predict the velocity ε − x_0, at times that may depend on how large images are."""

    network_name = "transformer"
    scales = ("shift_factor",)
    even_times: ClassVar[bool] = False  # whether the stock pipeline begins with times 1, (n − 1)/n, …, 1/n

    @staticmethod
    def scheduler(config: Any) -> Any:
        """The flow's own times."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**config.model_dump())

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Of an image, as the transformer counts them: what a dynamic shift of times goes by."""

    def schedule(self, sampling: SamplingSettings) -> FlowSchedule:
        """``sampling.eta`` is the noise level of the SDE, or of coefficient-preserving sampling."""
        scheduler, config, steps = self.pipeline.scheduler, self.files.scheduler, sampling.grid
        assert isinstance(config, FlowConfig)
        times = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if self.even_times else {"num_inference_steps": steps}
        mu = config.shift_of(self.tokens) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(**times, mu=mu)
        kept = sampling.kept
        levels = scheduler.sigmas.to("cpu", torch.float64)[[*kept, -1]]
        noisy = torch.tensor([step in sampling.noisy for step in range(len(kept))])
        tables = scheduler.timesteps.cpu()[kept], levels, sampling.noise * noisy.double()
        schedule = PreservingSchedule(*tables) if sampling.method == "cps" else FlowSchedule(*tables)
        return checked(schedule, config.steps(sampling))
