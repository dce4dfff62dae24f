"""Settings of the families. Importable without torch."""

from typing import Self

from pydantic import Field, model_validator

from policies.loops.laws import Covariance
from policies.rl.settings import Settings


class GaussianSettings(Settings):
    """A Gaussian fitted by its mean and covariance; the truth is N(0, I)."""

    dimension: int = Field(1, ge=1, description="gaussian: d")
    covariance: Covariance = Field(
        "unbiased", description="gaussian: divide by N − 1 or by N (mle), or fit the mean only (known)"
    )


class CategoricalSettings(Settings):
    """A categorical distribution fitted by its frequencies; the truth is uniform."""

    categories: int = Field(10, ge=2, le=1_000_000, description="categorical: how many")


class MixtureSettings(Settings):
    """A two-dimensional Gaussian mixture fitted by expectation–maximisation; the truth has modes on a square grid."""

    modes: int = Field(25, ge=4, le=10_000, description="mixture: of the truth and of the fit; a square number")


class GanSettings(Settings):
    """The networks and their training."""

    width: int = Field(32, ge=1, description="channels at half the resolution; twice as many at a quarter")
    latent: int = Field(32, ge=1, description="dimensions of z and of w")
    steps: int = Field(800, ge=1, description="updates of the critic and of the generator in one fit")
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(8e-3, gt=0, description="Adam's at the first step; falls to 0 along a cosine")
    gradient_penalty: float = Field(2.0, ge=0, description="γ of R1 and R2, for pixels in [-1, 1]")


class DiffusionSettings(Settings):
    """The network, its training and its sampler."""

    classes: int | None = Field(None, ge=1, description="number of labels; null: the largest label in the data + 1")
    channels: int = Field(16, ge=8, multiple_of=8, description="width of the UNet's finest level; doubles each level")
    levels: int = Field(2, ge=1, description="resolutions of the UNet; image sides must be multiples of 2^(levels-1)")
    training_steps: int = Field(400, ge=1, description="optimiser updates of one fit, annealed to rate 0")
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(8e-3, gt=0, description="peak of the one-cycle schedule")
    timesteps: int = Field(200, ge=2, description="noise levels in training")
    sampling_steps: int = Field(20, ge=1, description="steps of the sampler, DPM-Solver++(2M); timesteps at most")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training, for guidance")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.sampling_steps > self.timesteps:
            raise ValueError(f"sampling_steps ({self.sampling_steps}) must be at most timesteps ({self.timesteps})")
        return self
