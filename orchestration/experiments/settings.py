"""Settings that every experiment of content-addressed tasks has. Light to import."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from actors.allocation import check_kind
from actors.settings import WorkerSettings
from orchestration.tracking.tracker import TrackingSettings
from policies.rl.settings import Settings

if TYPE_CHECKING:
    from orchestration.cluster.ray_cluster import Machine


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
        if not (counted or listed):
            raise ValueError(
                "give a number of seeds from 1 on, a million at most, or a list of different ones from 0 on"
            )
        return seeds

    @property
    def seed_list(self) -> list[int]:
        """The seeds, each one universe."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)


def task_resources(workers: WorkerSettings, machine: "Machine", wants_gpu: bool) -> tuple[int, dict[str, Any]]:
    """GPUs of the run, and what a task takes, with the longest wait. Raises ValueError for what is not there."""
    if workers.cpus_per_task > machine.cpus:
        raise ValueError(f"workers.cpus_per_task is {workers.cpus_per_task}, there are {machine.cpus} CPUs")
    check_kind("workers.nodes", workers.nodes, machine.offers)
    if workers.device == "cuda" and not machine.gpus:
        raise ValueError("workers.device is cuda, but no GPU was found: set workers.device=auto or cpu")
    on_gpu = machine.gpus > 0 and workers.device != "cpu" and wants_gpu
    taken = {"cpus": workers.cpus_per_task, "gpus": 1 / workers.tasks_per_gpu if on_gpu else 0.0}
    return machine.gpus if on_gpu else 0, taken | {"timeout": workers.timeout_seconds, "nodes": workers.nodes}
