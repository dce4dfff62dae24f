"""What a run will be like before there is one: time, memory, price, what limits it, and how many should draw and learn;
on the machine there is, or on GPUs there are not.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.allocation import Offer, Role, cards_of, reward_roles
from actors.settings import ActorSettings
from orchestration.cluster.ray_cluster import Machine, find_machine, imagine_machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.memory_plan import memory_lines, memory_of
from orchestration.experiments.ddpo.preflight import learnable_steps, place_roles, preflight_ddpo
from orchestration.planning.cost_model import Cast, Forecast, Processor, Seat, Work, bottlenecks, simulate
from orchestration.planning.stage_costs import StageCosts, assumed, measure
from orchestration.runs.config import ConfigError
from orchestration.runs.run import TEMPLATES
from pipelines.pages import fill
from pipelines.storage.atomic import write_json


@dataclass(frozen=True)
class Option:
    """A placement of the actors, and what comes of it."""

    config: DdpoConfig
    roles: Sequence[Role]
    offers: Sequence[Offer]
    work: Work
    cast: Cast
    forecast: Forecast

    @property
    def gpus(self) -> int:
        """How many there are."""
        return len(self.cast.processors) - 1


def work_of(config: DdpoConfig, micro_batch: int, depth: int) -> Work:
    """A step of ``config``."""
    training, evaluation = config.training, config.evaluation
    transitions = training.images_per_update * training.timesteps_per_image(learnable_steps(config))
    size, found = min(config.actors.images_per_call, training.images_per_step), training.micro_batch or micro_batch
    step = training.images_per_step, size, config.sampling.calls, transitions, training.updates, found
    often = config.checkpoint.every, evaluation.every, evaluation.interim_images
    return Work(*step, tuple(config.reward.weights), depth, *often)


def cast_of(config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer], coupling: float) -> Cast:
    """The actors and what they share: each GPU, and all CPUs together."""
    processors = {"cpu": Processor(sum(offer.get("CPU", 0) for offer in offers), coupling)}
    functions = dict(zip(reward_roles(config.reward), config.reward.functions, strict=True))
    seats: dict[str, list[Seat]] = {"driver": [Seat("cpu")]}
    for role in roles:
        if not role.gpus:
            seats[functions.get(role.name, role.name)] = [Seat("cpu", role.threads)] * role.count
    for number, names in enumerate(cards_of(roles, offers)):
        processors[f"gpu {number}"] = Processor()
        for name in names:
            seats.setdefault(functions.get(name, name), []).append(Seat(f"gpu {number}"))
    return Cast(seats, processors, len(offers))


def foresee(
    config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer], known: StageCosts, depth: int
) -> Option:
    """The forecast of ``config`` with these actors."""
    work = work_of(config, known.micro_batch, depth)
    cast = cast_of(config, roles, offers, known.coupling)
    steps = math.lcm(work.commit_every or 1, work.evaluate_every or 1)  # each comes as often as in the long run
    return Option(config, roles, offers, work, cast, simulate(work, known.costs, cast, min(60, max(6, steps))))


def splits(config: DdpoConfig, gpus: int, cpus: int, known: StageCosts) -> Iterator[ActorSettings]:
    """Ways to use a machine: learners and samplers on GPUs of their own, or both on each, to take turns; without GPUs,
    numbers of samplers. With as many captioners and reward actors as keep up with the samplers."""
    actors, costs, images = config.actors, known.costs, config.training.images_per_step
    if not gpus:
        yield from (actors.model_copy(update={"samplers": count}) for count in range(1, 1 + min(8, max(2, cpus))))
        return
    on_gpu = [costs.rewards[name] for name, options in config.reward.functions.items() if options.on_gpu]
    scoring = [*([costs.caption] if config.captioner.path else []), *on_gpu]  # one GPU each
    slowest = max((cost(actors.images_per_call) for cost in scoring), default=0.0)
    drawing = config.sampling.calls * costs.sample(actors.images_per_call)
    some = {2**power for power in range(gpus.bit_length())} | {gpus * eighth // 8 for eighth in range(1, 8)}
    for learners, places in [(gpus, gpus), *((n, gpus - n) for n in sorted(some) if 0 < n < gpus)]:
        scorers = max(1, math.ceil(places * slowest / (drawing + len(scoring) * slowest)))
        samplers = places - len(scoring) * scorers if gpus > 1 else 1
        if samplers > 0:
            helpers = scorers if on_gpu else min(gpus, -(-images // actors.images_per_call))
            yield actors.model_copy(
                update={"samplers": samplers, "learners": learners}
                | {"placement": "shared" if places == gpus else "spread"}
                | {"replicas": {**({"captioner": scorers} if config.captioner.path else {}), "reward": helpers}}
                | {"images_per_call": min(actors.images_per_call, -(-images // samplers))}
            )


def best(config: DdpoConfig, machine: Machine, known: StageCosts) -> list[Option]:
    """The fastest split of ``machine`` at depth 0, and at depth 1. Raises ConfigError if there is none."""
    found: list[list[Option]] = []
    reason = "no split leaves a GPU for a sampler"
    for actors in splits(config, machine.gpus, machine.cpus, known):
        chosen = config.model_copy(update={"actors": actors})
        try:
            roles, offers = place_roles(chosen, machine)
        except ValueError as error:
            reason = str(error)
            continue
        found.append([foresee(chosen, roles, offers, known, depth) for depth in (0, 1)])
    if not found:
        raise ConfigError(f"{machine.gpus} GPUs: {reason}")
    return [max(each, key=lambda option: option.forecast.images_per_second) for each in zip(*found, strict=True)]


def plan_run(
    config: DdpoConfig, gpus: Sequence[int], given: Path | None, save: Path | None, tflops: float
) -> tuple[list[Option], StageCosts]:
    """The options that ``ouroboros plan`` shows, and the costs behind them: those of the file ``given``, else measured
    here; where GPUs are asked for and there are none, assumed from ``tflops``. Raises ConfigError."""
    config = config.model_copy(update={"output_dir": None})
    machine = find_machine(config.actors.device)
    one = config.actors.model_copy(update={"samplers": 1, "learners": 1, "replicas": {}}) if gpus else config.actors
    measured = config.model_copy(update={"actors": one})
    plan = None if gpus and (given or not machine.gpus) else preflight_ddpo(measured, machine)
    known = StageCosts.read(given, config) if given else measure(config, plan) if plan else assumed(config, tflops)
    if save:
        write_json(save, known.model_dump())
    if gpus:
        return [option for count in gpus for option in best(config, imagine_machine(count), known)], known
    assert plan is not None
    as_given = foresee(config, plan.roles, plan.offers, known, config.training.depth)
    return [as_given, *best(config, machine, known)], known


def facts(options: Sequence[Option], known: StageCosts, price: float | None) -> dict[str, Any]:
    """All there is to say of the options and the costs behind them. ``price``: dollars an hour of a GPU."""
    found, names = [], ("samplers", "learners", "placement", "replicas", "images_per_call")
    for option in options:
        counts, speed = Counter({role.name: role.count for role in option.roles}), option.forecast.images_per_second
        row: dict[str, Any] = {
            "gpus": option.gpus,
            "depth": option.work.depth,
            "images_per_call": option.work.images_per_call,
        }
        row |= {f"{role}s": counts[role] for role in ("sampler", "captioner", "learner")}
        settings = {f"actors.{name}": getattr(option.config.actors, name) for name in names}
        best_of = max((o for o in options if o.gpus == option.gpus), key=lambda o: o.forecast.images_per_second)
        row |= {"settings": {"training.depth": option.work.depth} | settings, "fastest": option is best_of}
        row["dollars_per_1000_images"] = price and 1000 / speed / 3600 * price * max(1, option.gpus)
        row["limited_by"] = bottlenecks(option.work, known.costs, option.cast)
        found.append({**row, **vars(option.forecast), "memory": memory_of(option.config, option.roles, option.offers)})
    return {"machine": known.machine, "costs": known.costs.model_dump(), "price": price, "options": found}


def render(known: Mapping[str, Any]) -> str:
    """Costs, a row for each option, and of the fastest on so many GPUs all there is to say."""
    return fill(TEMPLATES / "forecast.txt", **known, memory_lines=memory_lines)
