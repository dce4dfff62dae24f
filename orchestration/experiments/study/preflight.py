"""Everything that can be wrong with a study, found before anything is trained."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.study.config import Study, known_studies
from orchestration.experiments.task_run import check_same, short, task_resources
from orchestration.runs.config import about, validate
from orchestration.runs.inputs import Inputs, code_of, fingerprints
from orchestration.runs.run import TEMPLATES
from orchestration.runs.tables import wanted_of
from pipelines.pages import fill
from pipelines.storage.tasks import Task, in_order
from policies.common.claims import Claim

_FREE = {"seeds", "arms", "output_dir", "tracking", "workers"}  # what may differ when a run goes on


@dataclass(frozen=True)
class Plan:
    """A study that can be run: its graph, its claims, what it reads, and what its tasks take."""

    tasks: dict[tuple[str, int], tuple[Task, ...]]  # by arm and seed: those whose results are reported
    claims: tuple[Claim, ...]
    inputs: Inputs
    gpus: int
    resources: dict[str, Any]

    @property
    def reported(self) -> list[Task]:
        """The tasks whose results are reported, in the order of arms and seeds."""
        return [task for tasks in self.tasks.values() for task in tasks]

    @property
    def order(self) -> list[Task]:
        """All tasks and what they need, each once."""
        return list(in_order(self.reported))


def preflight_study(config: Study, machine: Machine | None = None) -> Plan:
    """Check ``config`` against its own study and a machine, by default the one it would run on. Raises ConfigError."""
    with about():
        config.preflight()
        check_same("study", config, lambda held: _differing(config, held))
        # Seed by seed, so that the first seeds of all arms can be looked at early.
        pairs = [(arm, seed) for seed in config.seed_list for arm in config.arms]
        tasks = {pair: tuple({task.key: task for task in config.tasks(*pair)}.values()) for pair in pairs}
        claims = tuple(config.claimed())
        divisible = any(task.divisible for found in tasks.values() for task in in_order(found))
        plan = Plan(tasks, claims, {}, *task_resources(config.workers, machine, True, divisible))
        if gone := next((task for task in plan.reported if not task.kept), None):
            raise ValueError(f"task {gone.label} is reported, so it has to be kept")
        known = {*type(config).model_fields["arms"].default, None}
        for claim in config.claims():
            if unknown := {claim.arm, claim.control} - known:
                raise ValueError(f"claim {claim.sentence!r} speaks of {unknown.pop()}, which is no arm")
        code = dict.fromkeys([known_studies().get(config.study, config.study), *(task.kind for task in plan.order)])
        plan.inputs.update(fingerprints(config.reads()) | code_of(code))
    return plan


def describe_study(config: Study, plan: Plan) -> str:
    """What a dry run prints: the tasks, by kind, and the claims."""
    kinds = Counter(short(task.kind) for task in plan.order)
    wanted = [f"{claim.sentence}: {wanted_of(asdict(claim))}" for claim in plan.claims]
    return fill(TEMPLATES / "study_plan.txt", config=config, plan=plan, kinds=kinds, wanted=wanted)


def _differing(config: Study, held: dict[str, Any]) -> list[str]:
    """In what a configuration that is ``held`` is no part of ``config``."""
    if held.get("study") != config.study:
        return [f"study is {held.get('study')!r}"]
    before = validate(type(config), held)
    differing = [key for key, value in before if key not in _FREE and getattr(config, key) != value]
    within = {*before.seed_list} <= {*config.seed_list} and {*before.arms} <= {*config.arms}
    return differing + ["fewer seeds or arms"] * (not within)
