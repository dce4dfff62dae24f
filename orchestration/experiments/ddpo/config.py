"""The configuration of a DDPO run. Light to import."""

from typing import Any, Literal

from pydantic import Field, field_validator

from actors.settings import ActorSettings
from orchestration.tracking.tracker import TrackingSettings
from pipelines.settings import CaptionerSettings, ModelSettings, RewardSettings
from pipelines.storage.checkpoint import parse_size
from policies.rl.settings import AdvantageSettings, Name, SamplingSettings, Settings, TrainingSettings


class EvaluationSettings(Settings):
    """The held-out measure: images of fixed prompts and seeds that are never learned from."""

    evaluator: str | None = Field(
        "models/digits/evaluator", description="directory of an evaluator; null: only the reward is measured"
    )
    images: int = Field(1080, ge=1, description="images before and after the run")
    every: int = Field(10, ge=0, description="steps between interim evaluations; 0 for none")
    interim_images: int = Field(180, ge=1, description="images of an evaluation on the way")
    patience: int = Field(
        2,
        ge=0,
        description="so many evaluations in a row below the best one end a run, which keeps its weights; 0: never",
    )

    def size_after(self, done: int, steps: int) -> int:
        """How many images are to be measured when ``done`` of ``steps`` steps are done."""
        if done == steps:
            return self.images
        return self.interim_images if self.every and done % self.every == 0 else 0


class CheckpointSettings(Settings):
    """Commits of the whole run state."""

    every: int = Field(5, ge=1, description="steps between commits")
    keep: int | str = Field(2, description='newest commits to keep: their number, or what all may take ("20 GB")')

    @field_validator("keep", mode="before")
    @classmethod
    def _is_number_or_size(cls, keep: Any) -> Any:
        if isinstance(keep, str):
            parse_size(keep)
        elif isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError('write how many commits are to be kept, 1 at least, or a size such as "20 GB"')
        return keep


class DdpoConfig(Settings):
    """One DDPO run."""

    name: Name = "ddpo"
    seed: int = Field(0, ge=0, lt=2**63, description="of all that is drawn: equal seeds give equal runs")
    output_dir: str | None = Field(None, description="the run's directory; null: runs/<name>-<date>-<time>-seed<seed>")
    prompts: str | dict[Literal["path", "guard"], str] = Field(
        "configs/prompts/digits.txt",
        description="a text file, one prompt a line; {path: …, guard: …}: with a guard (docs/audits.md), which drops "
        "prompts that it refuses and rewrites what others leave open",
    )
    model: ModelSettings = ModelSettings()
    captioner: CaptionerSettings = CaptionerSettings()
    reward: RewardSettings = RewardSettings()
    sampling: SamplingSettings = SamplingSettings()
    training: TrainingSettings = TrainingSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    actors: ActorSettings = ActorSettings()

    @property
    def prompt_files(self) -> dict[str, str]:
        """The file of prompts, ``path``, and that of a ``guard``, if any."""
        return (
            {"path": self.prompts}
            if isinstance(self.prompts, str)
            else {str(key): path for key, path in self.prompts.items()}
        )

    @field_validator("prompts")
    @classmethod
    def _has_prompts(cls, prompts: Any) -> Any:
        if not isinstance(prompts, str) and "path" not in prompts:
            raise ValueError("name the file of prompts as path, beside guard")
        return prompts
