"""How long a step of the DDPO loop takes, from what its stages cost: a discrete-event simulation of the driver's page.

Actors work off their queues in the order in which the driver asked. Calls that run at once on one processor share it:
on more threads than cores each slows down, on one GPU they take turns. The driver is simulated as it is written
(orchestration/experiments/ddpo/loop.py), so what overlaps there overlaps here.
"""

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from policies.rl.settings import Settings

_COMPARED = 16  # images of an evaluation that are compared with the base model's, as in actors/roles/sampler.py
PARTS = {  # what a step can be limited by, and the costs that make it up
    "sampling": ("sample",),
    "captioning": ("caption",),
    "rewards": ("rewards",),
    "learning": ("gradient",),
    "optimiser": ("update", "learn"),
    "network": ("latency", "bus", "link"),
    "taking weights": ("publish",),
    "driver": ("driver", "dispatch"),
    "commits": ("commit",),
}


class Cost(Settings):
    """Seconds of one call for n items: ``call + each · n``."""

    call: float = Field(0.0, ge=0)
    each: float = Field(0.0, ge=0)

    def __call__(self, items: float) -> float:
        return self.call + self.each * items

    def __mul__(self, factor: float) -> "Cost":
        return Cost(call=factor * self.call, each=factor * self.each)


class Costs(Settings):
    """Seconds of each stage where nothing else runs, and what moves between processors."""

    sample: Cost = Field(description="a denoising step of n images, guidance included, and its part of the decoding")
    caption: Cost = Field(Cost(), description="n images")
    rewards: dict[str, Cost] = Field({}, description="each function, n images")
    gradient: Cost = Field(description="forward and backward of n transitions")
    update: float = Field(0.0, ge=0, description="one optimiser update")
    learn: float = Field(0.0, ge=0, description="what a step of learning takes besides")
    publish: float = Field(0.0, ge=0, description="a sampler takes new weights")
    commit: float = Field(0.0, ge=0)
    driver: float = Field(0.0, ge=0, description="the driver's own work in a step")
    dispatch: float = Field(0.0, ge=0, description="the driver asks an actor for one call")
    latency: float = Field(0.0, ge=0, description="of one exchange between learners")
    bus: float = Field(0.0, ge=0, description="seconds a byte inside a node")
    link: float = Field(0.0, ge=0, description="seconds a byte between nodes")
    tensors: int = Field(1, ge=1, description="trained tensors: so many exchanges an update")
    gradient_bytes: float = Field(0.0, ge=0)
    weight_bytes: float = Field(0.0, ge=0, description="what samplers are sent")
    latent_bytes: float = Field(0.0, ge=0, description="of an image at one denoising step: learners get them all")

    def scaled(self, names: Iterable[str], factor: float) -> "Costs":
        """The same with the costs ``names`` so many times as large."""
        old = {name: getattr(self, name) for name in names}
        rewards = {"rewards": {name: cost * factor for name, cost in old.pop("rewards", {}).items()} or self.rewards}
        return self.model_copy(update=rewards | {name: cost * factor for name, cost in old.items()})

    def exchange(self, learners: int, nodes: int) -> float:
        """All-reduce of an update's gradients: a ring moves 2 (n − 1) / n of them through its slowest link."""
        ring = 2 * (learners - 1) / learners * self.gradient_bytes * (self.link if nodes > 1 else self.bus)
        return ring + self.tensors * self.latency * (learners > 1)


@dataclass(frozen=True)
class Processor:
    """CPU cores, or a GPU. ``coupling``: a call of several threads, which wait for one another, makes share^coupling of
    its share of the cores."""

    cores: float = 1.0
    coupling: float = 1.0

    def rate(self, threads: int, wanted: int) -> float:
        """Speed of a call with ``threads`` while all want so many, against its speed alone."""
        share = min(1.0, self.cores / wanted) / min(1.0, self.cores / threads)
        return share**self.coupling if threads > 1 else share


@dataclass(frozen=True)
class Seat:
    """Where an actor computes, and with how many threads."""

    processor: str
    threads: int = 1


@dataclass(frozen=True)
class Cast:
    """Who takes part: role → the seats of its actors, the driver's among them. Each reward function is a role."""

    seats: Mapping[str, Sequence[Seat]]
    processors: Mapping[str, Processor]
    nodes: int = 1


@dataclass(frozen=True)
class Work:
    """What a step is made of. ``transitions`` of each update; evaluations and commits every so many steps, 0: never."""

    images: int
    images_per_call: int
    denoising_steps: int
    transitions: int
    updates: int
    micro_batch: int
    trained_on: Sequence[str] = ()  # rewards
    depth: int = 0
    commit_every: int = 0
    evaluate_every: int = 0
    evaluation_images: int = 0


@dataclass(frozen=True)
class Forecast:
    """``seconds`` of a step; ``waits``: what the driver waits for in it; ``busy``: share of the time that a role's
    actors are at work; ``images_per_second`` are reward queries a second."""

    seconds: float
    images_per_second: float
    waits: Mapping[str, float]
    busy: Mapping[str, float]


@dataclass(eq=False)
class Actor:
    """It works off its calls in order: each waits for the ``last`` one before it."""

    seat: Seat
    last: "Call | None" = None
    busy: float = 0.0


@dataclass(eq=False)
class Call:
    """``left``: seconds of work at the actor's own speed; ``awaited``: how many calls have to be done before."""

    actor: Actor
    left: float
    awaited: int = 0
    followers: "list[Call]" = field(default_factory=list)
    began: float = 0.0
    done: bool = False


class Timeline:
    """Simulated time. Who calls :meth:`wait` is the driver."""

    def __init__(self, processors: Mapping[str, Processor]) -> None:
        self.now = 0.0
        self._processors = processors
        self._running: dict[str, list[Call]] = defaultdict(list)
        self._settled: dict[str, float] = defaultdict(float)  # until when the work that is left is up to date
        self._events: list[tuple[float, str]] = []
        self._next: dict[str, float] = {}  # when a processor's event that counts is; others of it are void

    def submit(self, actor: Actor, seconds: float, after: Iterable[Call] = ()) -> Call:
        """Ask the actor for a call. It begins once the actor's earlier ones and ``after`` are done."""
        call = Call(actor, seconds)
        for other in (*after, actor.last):
            if other and not other.done:
                other.followers.append(call)
                call.awaited += 1
        actor.last = call
        if not call.awaited:
            self._turn(actor.seat.processor, call)
        return call

    def wait(self, calls: Iterable[Call]) -> float:
        """Let time pass until ``calls`` are done. Returns how much did."""
        began = self.now
        for call in calls:
            while not call.done:
                time, name = heapq.heappop(self._events)
                if time == self._next[name]:
                    self.now = time
                    self._turn(name)
        return self.now - began

    def _turn(self, name: str, new: Call | None = None) -> None:
        """Bring a processor's calls up to now, let those that are done make way for their followers and ``new`` begin,
        and plan the next turn."""
        running = self._running[name]
        passed, self._settled[name] = self.now - self._settled[name], self.now
        for call, rate in self._rates(name):
            call.left -= passed * rate
        # Rounding may leave a little, and what is too little to move the clock would stop it.
        ended = [call for call in running if call.left <= 1e-12 + 1e-12 * self.now]
        self._running[name] = [call for call in running if call not in ended]
        if new:
            new.began = self.now
            self._running[name].append(new)
        if self._running[name]:
            self._next[name] = self.now + max(0.0, min(call.left / rate for call, rate in self._rates(name)))
            heapq.heappush(self._events, (self._next[name], name))
        for call in ended:
            call.done = True
            call.actor.busy += self.now - call.began
            for follower in call.followers:
                follower.awaited -= 1
                if not follower.awaited:
                    self._turn(follower.actor.seat.processor, follower)

    def _rates(self, name: str) -> list[tuple[Call, float]]:
        running, processor = self._running[name], self._processors[name]
        wanted = sum(call.actor.seat.threads for call in running)
        return [(call, processor.rate(call.actor.seat.threads, wanted)) for call in running]


def simulate(work: Work, costs: Costs, cast: Cast, steps: int = 6) -> Forecast:
    """Means over ``steps`` steps in the steady state."""
    line = Timeline(cast.processors)
    crew = {role: [Actor(seat) for seat in seats] for role, seats in cast.seats.items()}
    driver, learners, samplers = crew["driver"][0], crew["learner"], crew["sampler"]
    waits: dict[str, float] = defaultdict(float)
    moved = work.images * (work.denoising_steps + 1) * costs.latent_bytes * costs.link * (cast.nodes > 1)
    sent = costs.weight_bytes * costs.link * math.ceil(math.log2(cast.nodes))  # nodes that have them pass them on

    def pause(seconds: float) -> None:
        waits["driver"] += line.wait([line.submit(driver, seconds)])

    def draw(images: int, rewards: Collection[str], compared: int = 0) -> tuple[list[Call], list[Call]]:
        """Calls that end with the images, and those that end with their scores."""
        starts, drawn, scored = range(0, images, work.images_per_call), list[Call](), list[Call]()
        pause(costs.dispatch * len(starts) * (2 + len(rewards)))
        for number, start in enumerate(starts):

            def ask(role: str, seconds: float, *after: Call, number: int = number) -> Call:
                return line.submit(crew[role][number % len(crew[role])], seconds, after)

            size = min(work.images_per_call, images - start)
            made = [ask("sampler", work.denoising_steps * costs.sample(size))]
            drawn += made
            if "captioner" in crew:
                made.append(ask("captioner", costs.caption(size), *made))
            scored += [ask(name, costs.rewards[name](size), *made) for name in rewards]
        if compared:  # by the weights of both
            scored.append(line.submit(samplers[0], 2 * work.denoising_steps * costs.sample(compared), drawn[:1]))
        return drawn, scored

    def learning() -> float:
        own = -(-work.transitions // len(learners))
        calls = -(-own // work.micro_batch)
        update = calls * costs.gradient(own / calls) + costs.update + costs.exchange(len(learners), cast.nodes)
        # At depth 1 the updates after the first ask the weights that the step began with, too.
        stale = work.depth * (work.updates - 1) * calls * costs.sample(own / calls)
        return costs.learn + work.updates * update + stale

    ahead, receipts, began = deque([draw(work.images, work.trained_on)]), list[Call](), 0.0
    for step in range(1, steps + 3):
        if step == 3:  # the first fill the pipeline
            began = line.now
            waits.clear()
            for actor in itertools.chain.from_iterable(crew.values()):
                actor.busy = 0.0
        if work.depth or not ahead:
            ahead.append(draw(work.images, work.trained_on))
        drawn, scored = ahead.popleft()
        waits["sample"] += line.wait([*drawn, *receipts])
        waits["reward"] += line.wait(scored)
        pause(costs.driver + costs.dispatch * (len(learners) + len(samplers)))
        waits["learn"] += line.wait([line.submit(each, moved + learning()) for each in learners])
        receipts = [line.submit(each, sent + costs.publish) for each in samplers]
        if not work.depth:
            waits["publish"] += line.wait(receipts)
        if work.evaluate_every and step % work.evaluate_every == 0:
            compared = min(_COMPARED, work.images_per_call, work.evaluation_images)
            waits["evaluate"] += line.wait(draw(work.evaluation_images, costs.rewards, compared)[1])
        if work.commit_every and step % work.commit_every == 0:
            # Everybody is asked for the CPU time used, behind what is being drawn.
            waits["commit"] += line.wait([line.submit(actor, 0.0) for actors in crew.values() for actor in actors])
            waits["commit"] += line.wait([line.submit(driver, costs.commit)])
    total = line.now - began
    busy = {role: sum(actor.busy for actor in actors) / len(actors) / total for role, actors in crew.items()}
    means = {name: each / steps for name, each in waits.items()}
    return Forecast(total / steps, work.images * steps / total, means, busy)


def bottlenecks(work: Work, costs: Costs, cast: Cast) -> dict[str, float]:
    """How far each part limits the throughput, most first: d log seconds / d log cost, by making it a tenth cheaper.
    They add up to 1; what is hidden behind another has 0."""
    whole = simulate(work, costs, cast).seconds
    cheaper = {part: simulate(work, costs.scaled(names, 0.9), cast).seconds for part, names in PARTS.items()}
    return dict(sorted(((part, (1 - less / whole) / 0.1) for part, less in cheaper.items()), key=lambda each: -each[1]))
