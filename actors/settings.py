"""Settings of the actors and where they run. Importable without torch and ray."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from policies.rl.settings import Settings

RoleName = Annotated[str, Field(pattern="^(sampler|captioner|reward|learner|evaluator)$")]
Workers = Annotated[int, Field(ge=1)]
Replicated = Annotated[str, Field(pattern="^(captioner|reward)$")]


class ActorSettings(Settings):
    """How many of each role, and whether they share the machine."""

    samplers: int = Field(2, ge=1, description="actors that draw images, each with the network")
    learners: int = Field(1, ge=1, description="processes that share each update, on a GPU each where there are GPUs")
    replicas: dict[Replicated, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="actors of the captioner, and of each reward function: {captioner: 2, reward: 4}; 1 if not named",
    )
    placement: Literal["shared", "spread"] = Field(
        "shared", description="all roles share what there is by fractions, or each takes whole CPUs and GPUs"
    )
    nodes: dict[RoleName, Annotated[str, Field(min_length=1)] | None] = Field(
        {}, description="role → the Ray resource that marks its kind of node; null or none: any node"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    threads: dict[RoleName, Annotated[int, Field(ge=1)]] = Field(
        {}, description="role → CPU threads of each actor; 1 if not named, of the learner all CPUs of a node, at most 8"
    )
    images_per_call: int = Field(64, ge=1, description="images a sampler draws at once: the unit of work")
    timeout_seconds: float = Field(1800.0, gt=0, description="longest wait for one piece of work")
    on_node_loss: Literal["continue", "wait"] = Field(
        "continue", description="go on with the nodes that are left, or wait for another in its place"
    )


class WorkerSettings(Settings):
    """What each task of a MAD experiment or a study takes of the cluster."""

    cpus_per_task: int = Field(1, ge=1, description="CPUs that a task reserves")
    tasks_per_gpu: int = Field(4, ge=1, description="tasks that share a GPU, where there is one")
    train_workers: Workers | tuple[Workers, Workers] = Field(
        1, description="Ray Train's workers that share each training, a GPU each if any; [least, most]: as have room"
    )
    nodes: str | None = Field(None, min_length=1, description="the resource that marks the nodes to use; null: any")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    timeout_seconds: float = Field(3600.0, gt=0, description="longest wait for any task to finish")

    @model_validator(mode="after")
    def _least_and_most(self) -> Self:
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"train_workers {list(self.bounds)}: the least comes first")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """How many share a training, at least and at most."""
        return self.train_workers if isinstance(self.train_workers, tuple) else (self.train_workers,) * 2
