"""DDPO as commands, jobs and sweeps see it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestration.cluster import forks
from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.experiment import DIFFUSION, SweptExperiment
from orchestration.experiments.metric_names import EVALUATED, ddpo_metrics
from orchestration.runs.browse import RunInfo
from pipelines.storage.atomic import read_lines


class Ddpo(SweptExperiment):
    """Train a diffusion model with a reward (DDPO)."""

    name = "ddpo"
    schema = DdpoConfig
    end = "max"
    reports_steps = asks_rewards = leaves_pipeline = True

    def resume(self, directory: Path, trusted: bool, changes: bool) -> Path:
        """See :class:`Experiment`: on from its last commit."""
        from orchestration.experiments.ddpo.loop import resume_ddpo

        forks.begin(self.imports(None))
        return resume_ddpo(directory, trusted, changes)

    def imports(self, config: DdpoConfig | None) -> tuple[str, ...]:
        """See :class:`Experiment`."""
        return DIFFUSION

    def rows(self, run: RunInfo) -> list[dict[str, Any]]:
        """See :class:`Experiment`: a row a step."""
        return run.steps()

    def seeded(self, seed: int) -> dict[str, Any]:
        """See :class:`SweptExperiment`."""
        return {"seed": seed}

    def device(self, config: DdpoConfig) -> str:
        """See :class:`SweptExperiment`."""
        return config.actors.device

    def default_metric(self, config: DdpoConfig) -> str:
        """See :class:`SweptExperiment`."""
        return "evaluator/full"

    def check(self, config: DdpoConfig, machine: Machine) -> list[str]:
        """See :class:`SweptExperiment`."""
        from orchestration.experiments.ddpo.preflight import preflight_ddpo

        plan = preflight_ddpo(config, machine)
        watched = plan.guard.settings.output and config.captioner.path
        return [*ddpo_metrics(config, plan.prompts, plan.unseen), *(["guard/unasked"] if watched else [])]

    def reads(self, config: DdpoConfig) -> tuple[dict[str, str], set[str]]:
        """See :class:`SweptExperiment`."""
        from orchestration.experiments.ddpo.inputs import paths_of

        return paths_of(config), {name for name in config.reward.functions if ":" in name}

    def models(self, config: DdpoConfig) -> frozenset[tuple[str, str]]:
        """See :class:`SweptExperiment`."""
        paths, _ = self.reads(config)
        return frozenset((key, path) for key, path in paths.items() if key.partition(".")[0] != "prompts")

    def steps(self, config: DdpoConfig) -> int:
        """See :class:`SweptExperiment`."""
        return config.training.steps

    def period(self, config: DdpoConfig, metric: str) -> int:
        """See :class:`SweptExperiment`: what is reported is measured and committed."""
        measured = config.evaluation.every or config.training.steps
        return math.lcm(config.checkpoint.every, measured if metric.startswith(EVALUATED) else 1)

    def reports(self, directory: Path, manifest: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
        """See :class:`SweptExperiment`."""
        lines = read_lines(directory / "metrics.jsonl", ["step"])
        each = manifest["config"]["training"]["images_per_step"] if lines else 0
        last = manifest.get("committed_step", 0)
        found = [line for line in lines if line["step"] <= last and metric in line]
        return [{metric: line[metric], "step": line["step"], "images": line["step"] * each} for line in found]

    def run_trial(
        self, config: Any, begun: bool, changes: bool, committed: Callable[[int, Path], None], copied: Path | None
    ) -> None:
        """See :class:`SweptExperiment`."""
        from orchestration.experiments.ddpo.loop import resume_ddpo, run_ddpo
        from orchestration.experiments.ddpo.run import DdpoRun

        def on_step(run: DdpoRun) -> None:
            if run.step < config.training.steps:
                committed(run.step, run.store.path(run.step))

        if copied is not None:
            DdpoRun.adopt(config, copied)
        if begun or copied is not None:
            resume_ddpo(Path(str(config.output_dir)), trusted=True, changes=changes, on_step=on_step)
        else:
            run_ddpo(config, on_step)
