"""All actors of a DDPO run, owned by one driver, and what it asks of them together."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Self, cast

import numpy as np
import ray
from ray import ObjectRef

from actors.allocation import cards_of
from actors.placement import Reservation
from actors.pool import Pool, wait_for
from actors.roles.captioner import CaptionerActor
from actors.roles.evaluator import EvaluatorActor
from actors.roles.learner import Learner, Update
from actors.roles.reward import reward_pools
from actors.roles.sampler import Chunk, PolicyVersion, Samplers
from actors.stuck_workers import StuckWorkerMonitor
from actors.worker import Account
from orchestration.cluster.ray_cluster import connected
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation, fixed_work
from orchestration.experiments.ddpo.preflight import Plan
from orchestration.runs.display import Display
from pipelines.storage.atomic import Content
from pipelines.storage.checkpoint import Checkpoint, LearnerState, WeightsKind
from pipelines.storage.locations import portable
from pipelines.storage.tensor_files import PART, StreamedTensors, outline_of, parts, sizes
from policies.common.seeding import derive_seed
from policies.rl.advantages import weighted_sum
from policies.rl.ratio import RatioBound


class WeightSyncError(RuntimeError):
    """Samplers did not receive what the learner sent, or received nothing new."""


@dataclass(frozen=True)
class Rollout:
    """What a step is trained on: n images (n, height, width, 3) uint8 and their prompts, in chunks as they were drawn
    (references to trajectories and scores)."""

    step: int
    chunks: list[Chunk]
    prompts: list[str]
    images: np.ndarray


def linkable(cards: Sequence[str | None]) -> bool:
    """Whether processes on these ``cards`` can exchange by them: NCCL wants one for each."""
    return None not in cards and len(set(cards)) == len(cards)


class WorkerGroup(ExitStack):
    """Samplers, captioners, rewards, evaluator and learner. Leaving it ends every actor."""

    def __init__(self, config: DdpoConfig, plan: Plan, display: Display, profile: bool = False) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self._display, self._profile = display, profile
        self._monitor = StuckWorkerMonitor()
        self._receipts: tuple[list[ObjectRef], bool] = [], False
        self._linked = False  # whether weights go from card to card

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        for note in self.plan.notes:
            self._display.say(f"warning: {note}")
        config, roles, offers = self.config, self.plan.roles, self.plan.offers
        self.enter_context(connected(sum(map(bool, cards_of(roles, offers))), self._display.remedy))
        self._reservation = Reservation(roles, offers)
        self.callback(self._reservation.release)
        stay, timeout = config.actors.on_node_loss == "wait", config.actors.timeout_seconds
        waiting = {"actors": "waiting for resources of the cluster"}
        self._reservation.wait(timeout, lambda: self._display.activity(waiting), for_new_nodes=stay)
        placed, seed = self._reservation.placed(), derive_seed(config.seed, "initialisation")
        # Under names that all nodes understand.
        model = config.model.model_copy(update={"path": portable(config.model.path)})
        captioner = config.captioner.model_copy(update={"path": portable(config.captioner.path or "")})
        judge = config.evaluation.evaluator and portable(config.evaluation.evaluator)
        if "learner" in placed:  # a check of rewards does without
            self.learner = Learner(placed["learner"], timeout, model, config.sampling, config.training, seed)
        self.samplers = Samplers(placed["sampler"], model, config.sampling, config.actors.images_per_call)
        half, frames = config.model.dtype != "float32", self.plan.frames
        self.rewards = reward_pools(placed, config.reward, half, frames)
        words = (CaptionerActor, captioner, half, frames)
        self.captioners = Pool(placed["captioner"], *words) if "captioner" in placed else None
        self.evaluators = Pool(placed["evaluator"], EvaluatorActor, judge, frames) if judge else None
        others = self.captioners, *self.rewards.values(), self.evaluators, getattr(self, "learner", None)
        self.pools: list[Pool] = [self.samplers, *(pool for pool in others if pool is not None)]
        self.callback(self._monitor.end)
        self.callback(lambda: [ray.kill(member) for pool in self.pools for member in pool.members])
        self.everyone("ready", "starting the actors")
        if "learner" in placed:
            self._link(timeout)
        if self._profile:
            self.everyone("profile", "preparing to profile")

    def _link(self, timeout: float) -> None:
        """Let weights go from the first learner's card to the samplers' if each of these has one to itself."""
        members = [self.learner.members[0], *self.samplers.members]
        if not linkable(self.wait([member.card.remote() for member in members], "asking for cards")):
            return
        from policies.rl.group import meeting_place

        self._meeting = store = meeting_place(ray.util.get_node_ip_address())  # as long as the actors
        outline = self.ask_learner("outline")
        link = store.host, store.port, len(members), self.learner.role.device, timeout
        joined = [*self.learner.everyone("link", *link)[:1], *self.samplers.link(outline, *link)]
        self._linked = all(self.wait(joined, "linking the learner with the samplers"))

    def everyone(self, method: str, what: str) -> list[Any]:
        """The answers of all actors, in the order of their pools."""
        return self.wait([answer for pool in self.pools for answer in pool.everyone(method)], what)

    def wait(self, references: Sequence[ObjectRef], what: str) -> list[Any]:
        """The values of ``references``, while the display shows what each actor does. Bounded; see ``wait_for``."""
        return wait_for(references, what, self.config.actors.timeout_seconds, self._look_after)

    def _look_after(self) -> None:
        """While waiting: show what each actor does, end those that are stopped, and see that their nodes are there."""
        self._display.activity({name: state for pool in self.pools for name, state in pool.activity().items()})
        for ended in self._monitor():
            self._display.say(f"{ended} had stopped: it was ended, to be replaced")
        if self.config.actors.on_node_loss == "continue":
            self._reservation.check()

    def begin_scoring(self, chunks: Sequence[Chunk], names: Iterable[str] | None = None) -> None:
        """Send chunks on to the captioners and rewards, by default those that are trained on, while the next ones are
        still being drawn: references only, nothing waits."""
        if self.captioners is not None:
            for chunk in chunks:
                chunk.captions = self.captioners.submit("caption", chunk.images)
        for name in self.config.reward.weights if names is None else names:
            for chunk in chunks:
                chunk.scores[name] = self.rewards[name].submit("score", chunk.images, chunk.prompts, chunk.captions)

    def scores(self, chunks: Sequence[Chunk], what: str) -> dict[str, np.ndarray]:
        """What each function that was asked says of the images (n,)."""
        names = chunks[0].scores
        values = self.wait([chunk.scores[name] for name in names for chunk in chunks], what)
        size = len(chunks)
        return {name: np.concatenate(values[i * size : (i + 1) * size]) for i, name in enumerate(names)}

    def score(self, rollout: Rollout) -> np.ndarray:
        """The reward (n,): the weighted sum of what is trained on. The images were sent to be scored as they came."""
        scores = self.scores(rollout.chunks, f"step {rollout.step + 1}: rewards")
        return weighted_sum(scores, self.config.reward.weights)

    def unasked(self, rollout: Rollout) -> dict[str, float]:
        """guard/unasked: share of a step's images whose captions name what the guard lets nobody ask for; nothing if
        it, or the run, does not look."""
        if self.captioners is None or not self.plan.guard.settings.output:
            return {}
        said = self.wait(
            [chunk.captions for chunk in rollout.chunks if chunk.captions is not None],
            f"step {rollout.step + 1}: captions",
        )
        return {"guard/unasked": self.plan.guard.unasked([caption for part in said for caption in part])}

    def train(self, rollout: Rollout, advantage: np.ndarray, seed: int) -> tuple[Update, ObjectRef]:
        """A step's updates of the learner from what was drawn and its ``advantage`` (n,), and the new weights."""
        trajectories = [chunk.trajectory for chunk in rollout.chunks]
        return self._learner(f"step {rollout.step + 1}: learning", "learn", advantage, seed, *trajectories)

    def _learner(self, what: str, method: str, *arguments: Any) -> tuple[Update, ObjectRef]:
        """The learner's answer to a call that gives weights."""
        updates, weights = zip(*self.learner.everyone(method, *arguments, returns=2), strict=True)
        return self.wait(updates, what)[0], weights[0]

    def ask_learner(self, method: str, *arguments: Any) -> Any:
        """The answer of the learner's first process to a call of all."""
        return self.wait(self.learner.everyone(method, *arguments), f"the learner's {method}")[0]

    def ratio_bound(self, known: RatioBound | None) -> RatioBound:
        """Hold the learner to what is ``known``, or to what it finds on one sampler's call. Returns it."""
        if known is not None:
            self.ask_learner("take_ratio_bound", known)
            return known
        size = min(self.config.actors.images_per_call, self.config.training.images_per_step)
        return cast(RatioBound, self.ask_learner("find_ratio_bound", list(islice(cycle(self.plan.prompts), size))))

    def learner_state(self) -> LearnerState:
        """What a learner goes on from; its tensors come part by part, when they are asked for."""
        outline, version = self.ask_learner("state_outline")
        return LearnerState(StreamedTensors(outline, lambda names: self.ask_learner("state_part", names)), version)

    def export(self) -> tuple[str, dict[str, Content]]:
        """The checksum of the final weights, averaged if they are, and a diffusers directory of them, whose files come
        piece by piece."""

        def pieces(name: str, size: int) -> Iterator[bytes]:
            for start in range(0, max(size, 1), PART):
                yield self.ask_learner("pipeline_part", name, start)

        checksum, sizes = self.ask_learner("checksum", "averaged"), self.ask_learner("pipeline")
        return checksum, {name: pieces(name, size) for name, size in sizes.items()}

    def update_weights(self, update: Update, weights: ObjectRef, *, restored: bool = False) -> None:
        """Give every sampler the learner's weights. Raises WeightSyncError unless all came whole and changed something;
        a step without an update, or a small one that is rounded to half precision, need not, nor one ``restored`` that
        nothing was learned before."""
        learned = update.version > 0 if restored else self.config.training.on_sick_numbers == "stop"
        expect_change = learned and self.config.model.dtype == "float32"
        self._send(PolicyVersion(update.version, update.checksum, weights), expect_change=expect_change)

    def _send(self, sent: PolicyVersion, kind: WeightsKind = "current", expect_change: bool = False) -> None:
        """Give every sampler ``sent``, of which the learner holds the ``kind``."""
        self.check_receipts()
        if self._linked:
            self.learner.everyone("send", kind)
        self._receipts = self.samplers.update_weights(sent, self._linked), expect_change
        if not self.config.training.depth:  # else samplers are drawing; what they do next waits for the weights anyway
            self.check_receipts()

    def check_receipts(self) -> None:
        """Wait for every sampler's receipt of what was sent last. Raises WeightSyncError."""
        (references, expect_change), sent = self._receipts, self.samplers.policy
        receipts = self.wait(references, "sending weights")
        if None in receipts:
            self._display.say("a broadcast of weights failed: from now on they go to all by the object store")
            self._linked = False
            references = self.samplers.update_weights(sent, to=[n for n, each in enumerate(receipts) if each is None])
            receipts = [each for each in receipts if each] + self.wait(references, "sending weights again")
        for number, receipt in enumerate(receipts):
            if receipt.checksum != sent.checksum:
                raise WeightSyncError(f"sampler {number} received other weights than version {sent.version}")
            if expect_change and not receipt.changed_tensors:
                raise WeightSyncError(f"weights version {sent.version} changed no tensor of sampler {number}")
        self._receipts = [], False

    @contextmanager
    def drawing_with(self, kind: WeightsKind) -> Iterator[None]:
        """In this block samplers are asked to draw with other weights of the learner's than those published."""
        usual = self.samplers.policy
        other, weights = self._learner(f"{kind} weights", "weights", kind)
        version = -other.version if kind == "averaged" else other.version
        self._send(PolicyVersion(version, other.checksum, weights), kind)
        yield
        self._send(usual)

    def evaluate(self, images: int, steps: int | None = None) -> Evaluation:
        """Draw, caption, score and judge the first so many of fixed (prompt, seed) pairs, with averaged weights if they
        are; in so many denoising ``steps``, if other than the settings'."""
        asked, seeds = fixed_work([*self.plan.prompts, *self.plan.unseen], images)
        prompts, _ = self.plan.guard.grounded(asked, seeds)
        unseen = {drawn for prompt, drawn in zip(asked, prompts, strict=True) if prompt in self.plan.unseen}
        sampling = self.config.sampling.at(0)  # the same at every step
        if steps is not None:
            sampling = sampling.model_copy(update={"steps": steps})
        others = self.config.training.ema_decay and self.samplers.policy.version
        with self.drawing_with("averaged") if others else nullcontext():
            chunks = self.samplers.rollout(prompts, seeds, sampling)
            if steps is not None:
                return self.measure(chunks, prompts, unseen=unseen)
            divergence = self.samplers.submit("divergence", chunks[0].drawn_with, chunks[0].trajectory)
            return self.measure(chunks, prompts, [divergence], unseen)

    def measure(
        self,
        chunks: Sequence[Chunk],
        prompts: Sequence[str],
        divergences: Sequence[ObjectRef] = (),
        unseen: Collection[str] = (),
    ) -> Evaluation:
        """Caption, score and judge chunks, drawn or being drawn; ``unseen`` prompts are those never trained on."""
        self.begin_scoring(chunks, self.rewards)
        if self.evaluators is not None:
            for chunk in chunks:
                chunk.verdicts = self.evaluators.submit("judge", chunk.images, chunk.prompts)
        scores = self.scores(chunks, "evaluation: rewards")

        def values(attribute: str) -> list[Any]:
            references = [getattr(chunk, attribute) for chunk in chunks]
            return [] if references[0] is None else self.wait(references, f"evaluation: {attribute}")

        found = values("images"), values("captions"), scores, values("verdicts")
        apart = self.wait(divergences, "evaluation: divergence")
        return Evaluation(prompts, *found, self.config.reward, unseen, apart)

    def restore(self, commit: Checkpoint) -> None:
        """Go on from a commit: its learner's state is the samplers' too."""
        for names in parts(sizes(outline_of(commit.tensors))):
            self.ask_learner("restore_part", ray.put({name: commit.tensors[name] for name in names}))
        self.ask_learner("restored", commit.state["weights_version"])
        restored = self._learner("the restored weights", "weights", "current")
        self.update_weights(*restored, restored=True)

    def accounts(self) -> dict[str, Account]:
        """What each actor has used so far, and the driver, whose spans are its run's."""
        names = [name for pool in self.pools for name in pool.names]
        used = zip(names, self.everyone("account", "accounts"), strict=True)
        return {"driver": Account.of_this_process([]), **dict(used)}

    @staticmethod
    def footprint() -> dict[str, float]:
        """What the cluster's object store holds, as Ray last reported: a moment ago, on other nodes a second."""
        kind = "object_store_memory"
        held = ray.cluster_resources().get(kind, 0.0) - ray.available_resources().get(kind, 0.0)
        return {"object_store_bytes": held}

    def score_images(self, images: np.ndarray, prompts: Sequence[str], names: Iterable[str]) -> dict[str, np.ndarray]:
        """What functions say of images from elsewhere (n,)."""
        size = self.config.actors.images_per_call
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        chunks = [Chunk(list(prompts[part]), [], ray.put(images[part]), ray.put(None)) for part in parts]
        self.begin_scoring(chunks, names)
        return self.scores(chunks, "calibration: rewards")
