"""Settings that every experiment of content-addressed tasks has. Light to import."""

from pydantic import Field, field_validator

from actors.settings import WorkerSettings
from orchestration.tracking.tracker import TrackingSettings
from policies.rl.settings import Settings


class TaskRunSettings(Settings):
    """Seeds, where the run goes, where it is recorded, and what its tasks take of the cluster."""

    seeds: int | tuple[int, ...] = Field(3, description="how many, from 0 on; or a list of them")
    output_dir: str | None = Field(None, description="the run's directory; null: runs/<name>-<date>-<time>")
    tracking: TrackingSettings = TrackingSettings()
    workers: WorkerSettings = WorkerSettings()

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        counted = isinstance(seeds, int) and 0 < seeds <= 1_000_000
        listed = not isinstance(seeds, int) and 0 < len(set(seeds)) == len(seeds) and min(seeds) >= 0
        if counted or listed:
            return seeds
        raise ValueError("give a number of seeds from 1 on, a million at most, or a list of different ones from 0 on")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, each one universe."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)
