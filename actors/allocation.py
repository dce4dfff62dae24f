"""Which actor gets which part of which node: the one place that decides it, for plans, for the Ray that is started, and
for the placement group that reserves them. Importable without torch and ray.

A bundle is what Ray places as a whole: a GPU with all the actors that share it, or one actor without a GPU. So what
shares a card follows from here, and never from where Ray finds room for a fraction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.settings import ActorSettings
from pipelines.settings import RewardSettings

NODE_SHARE = 0.001  # of the resource that marks a kind of node, for each actor or task: 1 is enough for a thousand
_LEARNERS_SHARE = 0.51  # of a card: where several learners are, NCCL wants one for each
Offer = Mapping[str, float]  # resource → amount, what one node has


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


@dataclass
class Bundle:
    """What Ray places as a whole. ``node``: the number of the node that it was planned for."""

    node: int
    on_card: bool = False
    roles: list[Role] = field(default_factory=list)

    def names(self) -> list[str]:
        """The role of each actor."""
        return [role.name for role in self.roles]

    @property
    def demand(self) -> dict[str, float]:
        """What it asks Ray for: a whole card, if it is one."""
        wanted = Counter[str]()
        for role in self.roles:
            wanted.update({"CPU": role.cpus, **mark(role.node)})
        wanted["GPU"] += int(self.on_card)
        return {resource: round(amount, 4) for resource, amount in wanted.items() if amount}


class NoRoomError(ValueError):
    """An actor for which no node has room left."""


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
    total, shared, homeless = sum(counts.values()), settings.placement == "shared", ""
    roles = _roles(settings, counts, rewards, gpus, offers)
    # Several nodes hold fewer fractions than their sum would: shares shrink until every actor has a place.
    for crowding in range(total if shared else 1):
        if shared:
            share = int(100 * min(1.0, cpus / total) / (1 + crowding)) / 100
            if share <= 0:
                raise ValueError(f"{total} actors cannot share {cpus} CPUs: ask for fewer samplers")
            roles = [replace(role, cpus=share) for role in roles]
        try:
            bundles = allocate(roles, offers)
            check_room(bundles, offers)
        except NoRoomError as full:
            homeless = str(full)
        else:
            return _with_parts_of_cards(roles, bundles) if shared else roles
    needed_cpus, needed_gpus = sum(r.count * r.cpus for r in roles), sum(r.count * (r.device == "cuda") for r in roles)
    raise ValueError(
        f"the actors need {needed_cpus:g} CPUs and {'up to ' * shared}{needed_gpus:g} GPUs, there are {cpus} and "
        f"{gpus}; no node has room for the {homeless}. Ask for fewer actors or threads, choose other actors.nodes, or "
        f"set actors.placement=shared (it is {settings.placement})"
    )


def allocate(roles: Iterable[Role], offers: Sequence[Offer]) -> list[Bundle]:
    """The bundles of all actors, GPUs first, on nodes with ``offers``. Raises NoRoomError.

    An actor on a GPU goes to the card with the fewest of its kind, then with the fewest actors: no card is idle while
    another that would do holds two of a kind. Those that cannot go everywhere choose first, then the large.
    """
    free = [dict(offer) for offer in offers]
    cards = [Bundle(n, True) for n, offer in enumerate(offers) for _ in range(int(offer.get("GPU", 0)))]
    others: list[Bundle] = []

    def first(role: Role) -> tuple[Any, ...]:
        kind = ("learner", "sampler", role.name).index(role.name)
        return role.device != "cuda", role.node is None, -role.cpus, kind, role.name

    for role in sorted(roles, key=first):
        needs, on_node = {"CPU": role.cpus, **mark(role.node)}, Counter[int]()

        def crowd(bundle: Bundle, role: Role = role, on_node: Counter[int] = on_node) -> tuple[float, ...]:
            kin = on_node[bundle.node] / max(1.0, offers[bundle.node].get("GPU", 0))
            return bundle.roles.count(role), len(bundle.roles), kin, -free[bundle.node].get("CPU", 0)

        for _ in range(role.count):
            able = {n for n, has in enumerate(free) if all(has.get(k, 0) >= need - 1e-9 for k, need in needs.items())}
            # Shares of CPUs can be cut where they are short, so they have no say in which card is shared.
            near = able if role.gpus == 1 else {n for n, has in enumerate(free) if not role.node or role.node in has}
            places = [card for card in cards if card.node in near and _has_room(card, role)]
            if role.device != "cuda":
                places = [Bundle(node) for node in sorted(able)]
            chosen = min(places, key=crowd, default=None)
            if chosen is None or chosen.node not in able:
                raise NoRoomError(role.described)
            chosen.roles.append(role)
            others += [] if chosen.on_card else [chosen]
            on_node[chosen.node] += 1
            for name, need in needs.items():
                free[chosen.node][name] -= need
    return [card for card in cards if card.roles] + others


def cards_of(roles: Iterable[Role], offers: Sequence[Offer]) -> list[list[str]]:
    """The roles of the actors on each GPU; none on those that are not used."""
    used = allocate([role for role in roles if role.device == "cuda"], offers)
    return [card.names() for card in used] + [[]] * (int(sum(offer.get("GPU", 0) for offer in offers)) - len(used))


def check_room(bundles: Iterable[Bundle], offers: Sequence[Offer]) -> None:
    """Raise NoRoomError unless Ray finds room for all ``bundles`` of a group that is spread over nodes.

    As Ray does it: those with a GPU first, then those that ask for a kind of node; each on the node that keeps the
    largest parts of what is asked for, of those that have none of the group yet if one of them will do.
    """
    free, fresh = [dict(offer) for offer in offers], set(range(len(offers)))
    demands = [(bundle.demand, bundle) for bundle in bundles]
    for demand, bundle in sorted(demands, key=lambda d: (-d[0].get("GPU", 0), -len(d[0]), -d[0].get("CPU", 0))):

        def able(nodes: Iterable[int], demand: dict[str, float] = demand) -> list[int]:
            return [n for n in nodes if all(free[n].get(name, 0) >= need - 1e-9 for name, need in demand.items())]

        fitting = able(sorted(fresh)) or able(range(len(free)))
        if not fitting:
            raise NoRoomError(max(bundle.roles, key=lambda role: role.cpus).described)
        node = max(fitting, key=lambda n: sum(1 - need / free[n][name] for name, need in demand.items()))
        fresh.discard(node)
        for name, need in demand.items():
            free[node][name] -= need


def _roles(
    settings: ActorSettings, counts: Mapping[str, int], rewards: Mapping[str, bool], gpus: int, offers: Sequence[Offer]
) -> list[Role]:
    """The actors as they are where each has CPUs and a GPU of its own; where they share, that is found out later."""
    for name in filter(counts.get, counts):
        check_kind(f"actors.nodes.{name.split()[0]}", settings.nodes.get(name.split()[0]), offers)
    home, learners = settings.nodes.get("learner"), counts["learner"]
    widest = max(1, *(int(offer.get("CPU", 0)) for offer in offers if home is None or home in offer))
    threads = {"learner": max(1, min(widest // -(-learners // len(offers)), 8)), **settings.threads}
    models = {"sampler", "captioner", "learner", *(name for name, on_gpu in rewards.items() if on_gpu)}
    if gpus and settings.device != "cpu" and 1 < learners > gpus:
        raise ValueError(f"actors.learners is {learners} and each needs a GPU of its own, but there are {gpus}")
    roles = []
    for name, count in counts.items():
        if count:
            kind = name.split()[0]
            on_gpu, wide = bool(gpus) and settings.device != "cpu" and name in models, threads.get(kind, 1)
            alone = float(on_gpu and settings.placement == "spread")
            roles.append(
                Role(name, count, float(wide), alone, wide, "cuda" if on_gpu else "cpu", settings.nodes.get(kind))
            )
    return roles


def _has_room(card: Bundle, role: Role) -> bool:
    """Whether a card's shares allow one more; no card has two of several learners."""
    if role.name == "learner" and role in card.roles:
        return False
    return sum(other.gpus for other in card.roles) + role.gpus <= 1 + 1e-9


def _with_parts_of_cards(roles: Sequence[Role], bundles: Sequence[Bundle]) -> list[Role]:
    """``roles`` with the part of a GPU that each actor has: all of a role have that of the most crowded."""
    apart = any(role.name == "learner" and role.count > 1 for role in roles)
    parts: dict[str, float] = {}
    for card in bundles:
        for role in card.roles if card.on_card else ():
            others, learning = len(card.roles) - 1, apart and "learner" in card.names()
            part = 1 / (others + 1)
            if learning:
                part = _LEARNERS_SHARE if role.name == "learner" else (1 - _LEARNERS_SHARE) / others
            parts[role.name] = min(parts.get(role.name, 1.0), int(1e4 * part) / 1e4)
    return [replace(role, gpus=parts.get(role.name, 0.0)) for role in roles]
