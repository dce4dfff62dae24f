"""Settings of the actors and where they run, and the plan that follows from them. Importable without torch and ray."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from policies.settings import Settings


class ActorSettings(Settings):
    """How many of each role, and whether they share the machine."""

    samplers: int = Field(2, ge=1)
    captioners: int = Field(1, ge=1)
    rewards: int = Field(1, ge=1)
    placement: Literal["shared", "spread"] = Field(
        "shared", description="all roles share what there is by fractions, or each takes whole CPUs and GPUs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    sampler_threads: int = Field(1, ge=1, description="CPU threads of a sampler")
    learner_threads: int | None = Field(None, ge=1, description="CPU threads of the learner; null: all CPUs, at most 8")
    images_per_call: int = Field(64, ge=1, description="images a sampler draws at once: the unit of work")
    timeout_seconds: float = Field(1800.0, gt=0, description="longest wait for one piece of work")


class WorkerSettings(Settings):
    """What each task of a MAD experiment takes of the cluster."""

    cpus_per_task: int = Field(1, ge=1)
    tasks_per_gpu: int = Field(4, ge=1, description="tasks that share a GPU, where there is one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    timeout_seconds: float = Field(3600.0, gt=0, description="longest wait for any task to finish")


@dataclass(frozen=True)
class Role:
    """One role's actors and what each of them takes."""

    name: str
    count: int
    cpus: float
    gpus: float
    threads: int
    device: str


def plan_roles(
    settings: ActorSettings, cpus: int, gpus: int, captioner: bool = True, evaluator: bool = True
) -> list[Role]:
    """The actors of a run on ``cpus`` and ``gpus``. Raises ValueError if they do not fit."""
    if settings.device == "cuda" and not gpus:
        raise ValueError("actors.device is cuda, but no GPU was found: set actors.device=auto or cpu")
    on_gpu = gpus > 0 and settings.device != "cpu"
    learner_threads = settings.learner_threads or min(cpus, 8)
    counts = {"sampler": settings.samplers, "captioner": settings.captioners * captioner, "reward": settings.rewards}
    counts |= {"learner": 1, "evaluator": int(evaluator)}
    threads = {"sampler": settings.sampler_threads, "learner": learner_threads}
    gpu_roles = {"sampler", "captioner", "learner"} if on_gpu else set()
    total = sum(counts.values())
    sharers = -(-sum(counts[name] for name in gpu_roles) // gpus) if on_gpu else 1
    roles = []
    for name, count in counts.items():
        if not count:
            continue
        if settings.placement == "shared":
            cpu, gpu = min(1.0, int(100 * cpus / total) / 100), 1 / sharers
        else:
            cpu, gpu = float(threads.get(name, 1)), 1.0
        uses_gpu = name in gpu_roles
        device = "cuda" if uses_gpu else "cpu"
        roles.append(Role(name, count, cpu, gpu if uses_gpu else 0.0, threads.get(name, 1), device))
    _check_fit(roles, cpus, gpus, settings.placement)
    return roles


def _check_fit(roles: list[Role], cpus: int, gpus: int, placement: str) -> None:
    needed_cpus = sum(role.count * role.cpus for role in roles)
    needed_gpus = sum(role.count * role.gpus for role in roles)
    if any(role.cpus <= 0 for role in roles):
        raise ValueError(f"{sum(r.count for r in roles)} actors cannot share {cpus} CPUs: ask for fewer samplers")
    if needed_cpus > cpus or needed_gpus > gpus + 1e-9:
        raise ValueError(
            f"the actors need {needed_cpus:g} CPUs and {needed_gpus:g} GPUs, there are {cpus} and {gpus}: "
            f"ask for fewer actors or threads, or set actors.placement=shared (it is {placement})"
        )
