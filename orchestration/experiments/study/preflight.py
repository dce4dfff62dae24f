"""Everything that can be wrong with a study, found before anything is trained."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestration.cluster.ray_cluster import Machine, find_machine
from orchestration.experiments.settings import task_resources
from orchestration.experiments.study.config import Study, known_studies
from orchestration.experiments.task_run import short
from orchestration.runs.config import about, validate
from orchestration.runs.inputs import Inputs, code_of, fingerprints
from orchestration.runs.manifest import has_only_begun, known_manifest
from orchestration.runs.run import TEMPLATES, check_output
from orchestration.runs.tables import wanted_of
from pipelines.pages import fill
from pipelines.storage.tasks import Task, in_order
from policies.common.claims import Claim

_FREE = {"seeds", "arms", "output_dir", "tracking", "workers"}  # what may differ when a run goes on


@dataclass(frozen=True)
class Plan:
    """A study that can be run: its graph, its claims, what it reads, and what its tasks take."""

    tasks: dict[tuple[str, int], tuple[Task, ...]]  # by arm and seed: those whose results are reported
    order: list[Task]  # all of them and what they need, each once
    claims: tuple[Claim, ...]
    inputs: Inputs
    gpus: int
    resources: dict[str, Any]

    @property
    def reported(self) -> list[Task]:
        """The tasks whose results are reported, in the order of arms and seeds."""
        return [task for tasks in self.tasks.values() for task in tasks]


def preflight_study(config: Study, machine: Machine | None = None) -> Plan:
    """Check ``config`` against its own study and a machine, by default the one it would run on. Raises ConfigError."""
    with about():
        config.preflight()
        _check_output(config)
        # Seed by seed, so that the first seeds of all arms can be looked at early.
        pairs = [(arm, seed) for seed in config.seed_list for arm in config.arms]
        tasks = {pair: tuple({task.key: task for task in config.tasks(*pair)}.values()) for pair in pairs}
        if gone := next((task for each in tasks.values() for task in each if not task.kept), None):
            raise ValueError(f"task {gone.label} is reported, so it has to be kept")
        order = list(in_order(task for each in tasks.values() for task in each))
        claims = tuple(config.claims())
        known = {*type(config).model_fields["arms"].default}
        for claim in claims:
            if unknown := {claim.arm, claim.control} - known - {None}:
                raise ValueError(f"claim {claim.sentence!r} speaks of {unknown.pop()}, which is no arm")
        gpus, resources = task_resources(config.workers, machine or find_machine(config.workers.device), True)
        code = dict.fromkeys([known_studies().get(config.study, config.study), *(task.kind for task in order)])
        inputs = fingerprints(config.reads()) | code_of(code)
    return Plan(tasks, order, claims, inputs, gpus, resources)


def describe_study(config: Study, plan: Plan) -> str:
    """What a dry run prints: the tasks, by kind, and the claims."""
    kinds = Counter(short(task.kind) for task in plan.order)
    wanted = [f"{claim.sentence}: {wanted_of(asdict(claim))}" for claim in plan.claims]
    return fill(TEMPLATES / "study_plan.txt", config=config, plan=plan, kinds=kinds, wanted=wanted)


def _check_output(config: Study) -> None:
    """A directory may hold the same study, of fewer seeds or arms; what is there is never overwritten by another."""
    directory = Path(config.output_dir or "").expanduser()
    manifest = known_manifest(directory) if config.output_dir else {}
    if not manifest or has_only_begun(directory):
        check_output(config.output_dir)
        return
    if manifest.get("loop") != "study":
        raise ValueError(f"output_dir {directory} holds a run of another kind: choose another directory")
    held = manifest["config"]
    if held.get("study") != config.study:
        raise ValueError(f"output_dir {directory} holds another study, {held.get('study')!r}: choose another directory")
    before = validate(type(config), held)
    differing = [key for key, value in before if key not in _FREE and getattr(config, key) != value]
    if not (set(before.seed_list) <= set(config.seed_list) and set(before.arms) <= set(config.arms)):
        differing.append("fewer seeds or arms")
    if differing:
        raise ValueError(
            f"output_dir {directory} holds the study with other settings (different: {', '.join(differing)}); choose "
            "another directory. More seeds or arms may be added to a study"
        )
