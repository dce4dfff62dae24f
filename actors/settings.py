"""Settings of the actors and where they run, and the plan that follows from them. Importable without torch and ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings import RewardSettings
from policies.settings import Settings

RoleName = Annotated[str, Field(pattern="^(sampler|captioner|reward|learner|evaluator)$")]
Replicated = Annotated[str, Field(pattern="^(captioner|reward)$")]
NODE_SHARE = 0.001  # of the resource that marks a kind of node, for each actor or task: 1 is enough for a thousand
Offer = Mapping[str, float]  # resource → amount, what one node has


class ActorSettings(Settings):
    """How many of each role, and whether they share the machine."""

    samplers: int = Field(2, ge=1)
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
    """What each task of a MAD experiment takes of the cluster."""

    cpus_per_task: int = Field(1, ge=1)
    tasks_per_gpu: int = Field(4, ge=1, description="tasks that share a GPU, where there is one")
    nodes: str | None = Field(None, min_length=1, description="the resource that marks the nodes to use; null: any")
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
    node: str | None = None

    @property
    def described(self) -> str:
        """For people."""
        place = f", {self.node} nodes" if self.node else ""
        return f"{self.name}: {self.cpus:g} CPU, {self.gpus:g} GPU, {self.threads} threads, on {self.device}{place}"

    @property
    def demand(self) -> dict[str, float]:
        """What one of them asks Ray for."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus} | mark(self.node)
        return {resource: amount for resource, amount in wanted.items() if amount}


def mark(node: str | None) -> dict[str, float]:
    """The Ray resources by which work lands on a kind of node."""
    return {node: NODE_SHARE} if node else {}


def check_kind(setting: str, node: str | None, offers: Sequence[Offer]) -> None:
    """Raise ValueError unless some node is of the kind that ``setting`` names."""
    if node and not any(offer.get(node, 0) >= NODE_SHARE for offer in offers):
        raise ValueError(
            f"{setting} is {node}, but no node advertises a resource of that name: start one with "
            f"ray start --resources='{{\"{node}\": 1}}', or set {setting}=null"
        )


def reward_roles(settings: RewardSettings) -> dict[str, bool]:
    """The role of each reward function's actors, and whether it is on a GPU where there is one."""
    functions = settings.functions
    names = ["reward"] if len(functions) == 1 else [f"reward {name}" for name in functions]
    return {name: options.on_gpu for name, options in zip(names, functions.values(), strict=True)}


def plan_roles(
    settings: ActorSettings,
    cpus: int,
    gpus: int,
    captioner: bool = True,
    evaluator: bool = True,
    offers: Sequence[Offer] = (),
    rewards: Mapping[str, bool] | None = None,
) -> list[Role]:
    """The actors of a run on nodes with ``cpus`` and ``gpus`` in all, and ``offers`` each (by default it is one node).

    ``rewards``: names of the rewards' roles, and whether each is on a GPU; by default it is one that is not.
    Raises ValueError if they do not fit.
    """
    offers = offers or [{"CPU": cpus, "GPU": gpus}]
    if settings.device == "cuda" and not gpus:
        raise ValueError("actors.device is cuda, but no GPU was found: set actors.device=auto or cpu")
    counts = {"sampler": settings.samplers, "captioner": settings.replicas.get("captioner", 1) * captioner}
    rewards = rewards or {"reward": False}
    counts |= dict.fromkeys(rewards, settings.replicas.get("reward", 1))
    counts |= {"learner": settings.learners, "evaluator": int(evaluator)}
    counts = {name: count for name, count in counts.items() if count}
    for name in counts:
        check_kind(f"actors.nodes.{name.split()[0]}", settings.nodes.get(name.split()[0]), offers)
    # Several nodes hold fewer fractions than their sum would: shares shrink until every actor has a place.
    for crowding in range(sum(counts.values()) if settings.placement == "shared" else 1):
        roles = _roles(settings, counts, rewards, cpus, gpus, offers, crowding)
        if any(role.cpus <= 0 for role in roles):
            raise ValueError(f"{sum(counts.values())} actors cannot share {cpus} CPUs: ask for fewer samplers")
        homeless = _homeless(roles, offers)
        if homeless is None:
            # Ray seats in this order, always on the fullest GPU that has enough: two halves take a card before a
            # learner finds .51 of it, and it would wait for ever.
            return sorted(roles, key=lambda role: -role.gpus)
    needed_cpus, needed_gpus = (sum(r.count * getattr(r, each) for r in roles) for each in ("cpus", "gpus"))
    raise ValueError(
        f"the actors need {needed_cpus:g} CPUs and {needed_gpus:g} GPUs, there are {cpus} and {gpus}; no node has room "
        f"for the {homeless}. Ask for fewer actors or threads, choose other actors.nodes, or set "
        f"actors.placement=shared (it is {settings.placement})"
    )


def _roles(
    settings: ActorSettings,
    counts: Mapping[str, int],
    rewards: Mapping[str, bool],
    cpus: int,
    gpus: int,
    offers: Sequence[Offer],
    crowding: int,
) -> list[Role]:
    home = settings.nodes.get("learner")
    widest = max(1, *(int(offer.get("CPU", 0)) for offer in offers if home is None or home in offer))
    together = -(-counts["learner"] // len(offers))  # learners of a node
    threads = {"learner": max(1, min(widest // together, 8)), **settings.threads}
    models = {"sampler", "captioner", "learner", *(name for name, on_gpu in rewards.items() if on_gpu)}
    gpu_roles = models & set(counts) if gpus and settings.device != "cpu" else set()
    total, on_gpu = sum(counts.values()), sum(counts[name] for name in gpu_roles)
    shared = settings.placement == "shared"
    cpu = int(100 * min(1.0, cpus / total) / (1 + crowding)) / 100
    # NCCL wants a card for each learner: more than half of it, and the other roles get along with what that leaves.
    apart = counts["learner"] if on_gpu and counts["learner"] > 1 else 0
    if apart > gpus:
        raise ValueError(f"actors.learners is {apart} and each needs a GPU of its own, but there are {gpus}")
    gpu = (0.49 if apart else 1) / (-(-(on_gpu - apart) // gpus) + crowding) if shared and on_gpu else 1.0
    gpus_of = dict.fromkeys(gpu_roles, gpu) | ({"learner": 0.51} if apart and shared else {})
    return [
        Role(
            name,
            count,
            cpu if shared else float(threads.get(name.split()[0], 1)),
            gpus_of.get(name, 0.0),
            threads.get(name.split()[0], 1),
            "cuda" if name in gpu_roles else "cpu",
            settings.nodes.get(name.split()[0]),
        )
        for name, count in counts.items()
    ]


def _homeless(roles: Sequence[Role], offers: Sequence[Offer]) -> str | None:
    """The first actor for which no node has room left. Those that cannot go everywhere choose first, then the large."""
    free = [dict(offer) for offer in offers]
    for role in sorted(roles, key=lambda role: (role.node is None, -role.gpus, -role.cpus)):
        for _ in range(role.count):
            fitting = [n for n in free if all(n.get(name, 0) >= need - 1e-9 for name, need in role.demand.items())]
            if not fitting:
                return role.described
            node = min(fitting, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
            for name, need in role.demand.items():
                node[name] -= need
    return None
