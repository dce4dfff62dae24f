"""A DDPO run: its journal of metrics and its commits.

Order is what makes a commit atomic: the journal is flushed, then the checkpoint is renamed into place, and only then
are the metrics sent to MLflow. A resumed run cuts the journal back to the last commit and sends its lines again;
MLflow drops points it knows, so each is there once.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from actors.allocation import Role
from actors.worker import Account
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.inputs import ddpo_inputs, placed
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import ConfigError, override, validate
from orchestration.runs.inputs import accept, changed_inputs
from orchestration.runs.manifest import ids, new_manifest, open_run, write_manifest
from orchestration.runs.run import Run, new_directory
from orchestration.runs.timeline import append_spans
from orchestration.tracking.tracker import FIRST_LOOK
from pipelines.storage.atomic import append_durably, as_lines, cut_lines, read_lines, with_digest, write_durably
from pipelines.storage.checkpoint import CheckpointStore, LearnerState
from policies.common.user_code import IN_PROCESS
from policies.rl.health import DegenerateBatch
from policies.rl.ratio import RatioBound

StepCallback = Callable[["DdpoRun"], None]  # called after each step; a sweep looks on, and may end the run in it

_FIRST_LOOK = {"accuracy": "evaluator/full", "diversity": "images/diversity", "reward": "reward/mean"}


class DdpoRun(Run):
    """One DDPO run, new or resumed."""

    config: DdpoConfig

    def __init__(self, directory: Path, config: DdpoConfig, manifest: dict[str, Any], profile: bool = False) -> None:
        super().__init__(directory, config, manifest, config.training.steps)
        self.profile = profile
        self.store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep, ids(manifest))
        self.journal = directory / "metrics.jsonl"  # one finished step a line
        self.damaged: list[str] = []  # lines of the journal
        self._stand_at_commit()
        before = self.checkpoint.state if self.checkpoint else {}  # what earlier sessions used
        self._wall_before = before.get("wall_seconds", 0.0)
        self._cpu_before = before.get("cpu_seconds", 0.0) - (self.began[1] if self.began else 0.0)
        if names := ", ".join(each.rpartition(":")[2] for each in config.reward.functions if IN_PROCESS in each):
            self.display.remedy = f"run_ddpo(resume={str(directory)!r}, reward={names}) in Python"
        self.seconds_by_stage.update(before.get("seconds_by_stage", {}))
        self.peaks: dict[str, dict[str, int]] = before.get("peaks", {})
        self._began = time.time()  # the step in progress

    @classmethod
    def create(cls, config: DdpoConfig, profile: bool = False) -> Self:
        """A new run. Its directory appears here, and nothing before."""
        progress = {"total_steps": config.training.steps, "committed_step": 0, "resolved": {}}
        manifest = new_manifest("ddpo", config, inputs=ddpo_inputs(config)) | progress
        return cls(new_directory(config, f"-seed{config.seed}"), config, manifest, profile)

    @classmethod
    def resume(cls, manifest: dict[str, Any], config: DdpoConfig, changes: bool) -> Self:
        """The run of ``config.output_dir``, from its last commit or its start. Raises ConfigError if it is finished, or
        would read other things than it began with and no ``changes`` are accepted."""
        directory = Path(str(config.output_dir))
        if manifest.get("status") == "FINISHED":
            raise ConfigError(f"{directory} is finished; start a new run, or generate from it")
        accept(directory, manifest, manifest, ddpo_inputs(config, manifest.get("inputs")), changes)
        manifest = {"committed_step": 0, "resolved": {}, **manifest}  # a damaged one may lack them
        return cls(directory, _as_resolved(config, manifest["resolved"]), manifest)

    @staticmethod
    def adopt(config: DdpoConfig, commit: Path) -> None:
        """Put another run's ``commit`` and ``config`` in place of what ``config.output_dir`` last committed.

        Population based training does this to a run that does worse. The manifest keeps when it was done.
        """
        directory = Path(config.output_dir or "")
        manifest, content = open_run(directory), config.model_dump(mode="json")
        step = CheckpointStore(directory / "checkpoints", owners=ids(manifest)).adopt(commit)
        if content != manifest["config"]:
            manifest.setdefault("adopted", []).append({"step": step, "before": manifest["config"]})
        write_manifest(directory, manifest | {"config": content, "committed_step": step})

    @staticmethod
    def fork(source: Path, overrides: Sequence[str], step: int | None = None, trusted: bool = False) -> Path:
        """Make a run that begins at the commit of ``source`` after ``step`` steps, by default the newest, with settings
        that may differ from there on. Returns its directory.

        Raises ConfigError if ``source`` is no DDPO run, has no such commit, is given settings it cannot go on with, or
        is another person's and is not ``trusted``.
        """
        manifest = open_run(source, trusted)
        store = CheckpointStore(source / "checkpoints", owners=ids(manifest))
        if manifest["loop"] != "ddpo":
            remedy = "only DDPO runs are forked; MAD's go on with more arms"
            raise ConfigError(f"{source} is a {manifest['loop']} run: {remedy}")
        steps, wanted = store.steps(), "" if step is None else f"of step {step} "
        step = max(steps, default=None) if step is None else step
        if step not in steps or step is None:
            raise ConfigError(f"{source} has no commit {wanted}(there are: {steps})")
        content = placed(manifest["config"], manifest.get("inputs", {})) | {"output_dir": None}
        model = validate(DdpoConfig, content).model
        for each in overrides:
            override(content, each)
        config = validate(DdpoConfig, content)
        if config.model != model:
            raise ConfigError("a fork goes on with the weights of its source: model.* cannot be changed")
        if config.training.steps <= step:
            given = f"training.steps is {config.training.steps}, but the commit stands after {step} already"
            raise ConfigError(f"{given}: give more steps, or an earlier commit with --step (there are: {steps})")
        preflight_ddpo(config)
        inputs = ddpo_inputs(config, manifest.get("inputs"))
        if changed := changed_inputs(manifest.get("inputs", {}), inputs).get("model.path"):
            raise ConfigError(f"a fork goes on with the weights of its source, but model.path: {changed}")

        directory = new_directory(config, f"-seed{config.seed}")
        (directory / "evaluations").mkdir()
        for path in (source / "evaluations").glob("step-*"):
            if int(path.stem.removeprefix("step-")) <= step:
                shutil.copy2(path, directory / "evaluations")
        past = [line for line in read_lines(source / "metrics.jsonl", ["step"]) if line["step"] <= step]
        write_durably(directory / "metrics.jsonl", as_lines(map(with_digest, past)))
        store.load(step)  # raises DamagedFiles if it is not this run's, or not whole
        resolved = dict(manifest["resolved"])
        resolved.pop("ratio_bound", None)  # which follows from settings that may be others now
        stand = {"total_steps": config.training.steps, "committed_step": step, "resolved": resolved}
        origin = {"forked_from": {"run": str(source.resolve()), "step": step}, "status": "FORKED"}
        manifest = new_manifest("ddpo", config, inputs=inputs) | stand | origin
        CheckpointStore(directory / "checkpoints", owners=ids(manifest)).adopt(store.path(step))
        write_manifest(directory, manifest)
        return directory

    def roll_back(self, lost: Exception) -> None:
        """Go back to the last commit. Raises ``lost`` if the run comes no further."""
        from actors.failures import MicroBatchTooLarge  # which imports Ray

        self.withstand(lost, at=self.manifest["committed_step"])
        self._stand_at_commit()
        if self.checkpoint:  # processor time of the driver counts once, that of lost work not at all
            self._cpu_before = self.checkpoint.state["cpu_seconds"] - time.process_time()
        if isinstance(lost, MicroBatchTooLarge):
            self.manifest["resolved"]["micro_batch"] = -(-self.manifest["resolved"]["micro_batch"] // 2)
        self.config = _as_resolved(self.config, self.manifest["resolved"])
        self.display.say(f"{lost}; going back to {f'step {self.step}' if self.step else 'the start'}")

    def _stand_at_commit(self) -> None:
        """Be where the newest commit is, or at the start."""
        self.checkpoint = self.store.newest()
        self.step = self.display.done = self.checkpoint.step if self.checkpoint else 0
        # What MLflow has stands: a step that is done again, from an older commit, gives the same numbers. Lines that
        # were never committed, as when the learner was lost in the middle of a commit, will be written again.
        committed = max(self.step, self.manifest["committed_step"])
        self.history = cut_lines(self.journal, lambda line: line["step"] <= committed, ["step"], self.damaged)
        self._pending: list[dict[str, Any]] = []
        self.spans = []
        self._discard()

    def _discard(self) -> None:
        """Count what samplers were asked for, as far as the manifest knows, and nothing is learned from."""
        lost = max(0, self.manifest.get("asked_steps", 0) - self.step) * self.config.training.images_per_step
        self.manifest["discarded_images"] = self.manifest.get("discarded_images", 0) + lost
        self.manifest["asked_steps"] = self.step

    def on_start(self) -> None:
        """Send again what MLflow may have missed, and name what is damaged."""
        for damage in self.store.damaged:
            self.display.say(f"warning: {damage}; the commit before it is used")
        for damage in self.damaged:
            self.display.say(f"warning: {damage}; that step is left out of the journal, what MLflow knows of it stands")
        if self.manifest["resolved"] and (self.begins_in_mlflow or self.manifest.get("adopted")):
            self._log_params()
        for line in self.history:
            self._deliver(line)

    def progress(self) -> str:
        """The last committed step."""
        return f"last committed step: {self.manifest['committed_step']}"

    @property
    def ratio_bound(self) -> RatioBound | None:
        """What the ratio of a first update is held to; None if that was not found yet."""
        known = self.manifest["resolved"].get("ratio_bound")
        return RatioBound(**known) if known else None

    @ratio_bound.setter
    def ratio_bound(self, bound: RatioBound) -> None:
        self.manifest["resolved"]["ratio_bound"] = bound._asdict()

    def describe(self, prompts: list[str], roles: Sequence[Role], micro_batch: int, bound: RatioBound) -> None:
        """Record what was resolved at the start, and send MLflow what this run is."""
        learner = next(role for role in roles if role.name == "learner")
        resolved = {"micro_batch": micro_batch, "learners": learner.count, "learner_threads": learner.threads}
        self.manifest["resolved"] = {**resolved, "actors": {role.name: vars(role) for role in roles}}
        self.ratio_bound = bound
        if bound.recomputes:
            moved = f"rounding moves log-probabilities by {bound.noise:.1e} nats" if bound.noise else "as asked"
            what = "the learner computes the old ones itself, a pass forward more for all but a step's first update"
            self.display.say(f"{moved}: {what}")
        self._status("RUNNING")
        self._log_params()
        digest = sha256("\n".join(prompts).encode()).hexdigest()
        self.tracker.dataset("prompts", digest, self.config.prompt_files["path"], {"prompts": len(prompts)})

    def _log_params(self) -> None:
        config = self.config
        tags = {"model": config.model.path, "reward": config.reward.title, "seed": str(config.seed)}
        size = f"{config.training.steps} steps of {config.training.images_per_step} images"
        note = f"**{config.name}**: {size} and `{config.reward.title}` teach `{config.model.path}`."
        resolved = {key: value for key, value in self.manifest["resolved"].items() if key != "actors"}  # too many
        self.log_params({**self.manifest["config"], "resolved": resolved}, tags, note)

    def remaining_steps(self) -> Iterator[int]:
        """Steps still to do, counted from 0."""
        self._seconds_before, self._began = dict(self.seconds_by_stage), time.time()
        yield from range(self.step, self.config.training.steps)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a finished step. They become durable with the next commit."""
        before, self._seconds_before = self._seconds_before, dict(self.seconds_by_stage)
        spent = {name: total - before.get(name, 0.0) for name, total in self.seconds_by_stage.items()}
        training = sum(spent.get(name, 0.0) for name in ("sample", "reward", "learn", "publish"))
        line = {
            "step": step + 1,
            "timestamp_ms": int(time.time() * 1000),
            **metrics,
            **{f"seconds/{name}": seconds for name, seconds in spent.items() if seconds},
            "images_per_second": self.config.training.images_per_step / training,
            "discarded_images": float(self.manifest["discarded_images"]),
        }
        self.spans.append(("step", self._began, time.time()))
        self._began = time.time()
        if line["step"] not in {each["step"] for each in (*self.history, *self._pending)}:
            self._pending.append(line)
        self.step = step + 1
        for name in ("micro_batch", "learners"):
            known = self.manifest["resolved"].setdefault(name, 1)  # learners, in a run that began before there were any
            now = self.manifest["resolved"][name] = int(metrics.get(f"policy/{name}", known))
            if now != known:
                change = f"warning: from step {self.step} on {name} is {now}, no longer {known}"
                self.display.say(f"{change}: what follows is equal up to rounding")
        self.display.step(self.step, line)

    def skip_update(self, sick: DegenerateBatch) -> dict[str, float]:
        """Metrics of a step whose numbers allow no update. Raises ``sick`` unless such steps are to be skipped."""
        if self.config.training.on_sick_numbers == "stop":
            raise sick
        self.display.say(f"warning: step {self.step + 1} made no update: {sick}")
        return {"sick": 1.0}

    def commit_due(self) -> bool:
        """Whether the finished step is one to commit after: every so many, and whenever it was evaluated."""
        measured = self.config.evaluation.size_after(self.step, self.config.training.steps)  # the last step always is
        return bool(measured) or self.step % self.config.checkpoint.every == 0

    def commit(self, learner: LearnerState, state: Mapping[str, Any], accounts: Mapping[str, Account]) -> None:
        """Make everything up to the finished step durable, then deliver it."""
        used = self._used(accounts)
        lanes = {name: each.spans for name, each in accounts.items()} | {"driver": self.spans}
        append_spans(self.directory, self.step, lanes)
        self.spans = []
        append_durably(self.journal, as_lines(map(with_digest, self._pending)))
        clocks = {"seconds_by_stage": dict(self.seconds_by_stage), "wall_seconds": self.wall_seconds(), **used}
        self.store.commit(self.step, learner.tensors, {"weights_version": learner.weights_version, **state, **clocks})
        self.manifest["committed_step"] = max(self.step, self.manifest["committed_step"])
        self._status("RUNNING")
        for line in self._pending:
            self._deliver(line)
        self.history += self._pending
        self._pending = []

    def _used(self, accounts: Mapping[str, Account]) -> dict[str, Any]:
        """Processor time, and each process's memory at its highest, over all sessions."""
        for name, account in accounts.items():
            known = self.peaks.get(name, {"memory": 0, "gpu_memory": 0})
            self.peaks[name] = {kind: max(known[kind], getattr(account, kind)) for kind in known}
        cpu = self._cpu_before + sum(each.cpu_seconds for each in accounts.values())
        return {"cpu_seconds": cpu, "peaks": self.peaks}

    def totals(self, accounts: Mapping[str, Account]) -> dict[str, Any]:
        """What the whole run took, for its summary."""
        used = self._used(accounts)
        self._discard()
        return {
            "images": self.step * self.config.training.images_per_step,
            "steps": self.step,
            "discarded_images": self.manifest["discarded_images"],
            "cpu_seconds": round(used["cpu_seconds"], 2),
            "peak_memory_bytes": used["peaks"],
            "seed": self.config.seed,
        }

    def _deliver(self, line: Mapping[str, Any]) -> None:
        values = {key: value for key, value in line.items() if key not in ("step", "timestamp_ms")}
        self.tracker.metrics(line["step"], first_look(values) | values, line["timestamp_ms"])


def first_look(values: Mapping[str, float]) -> dict[str, float]:
    """What matters most, for the charts that come first."""
    return {f"{FIRST_LOOK}/{name}": values[key] for name, key in _FIRST_LOOK.items() if key in values}


def _as_resolved(config: DdpoConfig, resolved: Mapping[str, Any]) -> DdpoConfig:
    """``config`` with what the program chose at the start: it decides floating-point order, so a resume replays it."""
    if not resolved:
        return config
    training = config.training.model_copy(update={"micro_batch": resolved["micro_batch"]})
    threads = {**config.actors.threads, "learner": resolved["learner_threads"]}
    actors = config.actors.model_copy(update={"threads": threads})
    return config.model_copy(update={"training": training, "actors": actors})


def ignore(run: DdpoRun) -> None:
    """The step callback that does nothing."""
