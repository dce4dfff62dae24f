"""MAD as commands, jobs and sweeps see it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.experiment import Committed, SweptExperiment
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import read_summary
from pipelines.generators import OF_CLASSES
from pipelines.mad.graph import TRAINED


class Mad(SweptExperiment):
    """Train generators on their own samples (MAD). The same command again goes on with what output_dir holds."""

    name = "mad"
    schema = MadConfig
    end = "min"
    reports_steps = asks_rewards = leaves_pipeline = False

    def imports(self, config: MadConfig) -> list[str]:
        """See :class:`Experiment`."""
        arms = config.resolved_arms.values()
        images = [] if all(arm.generator.closed_form for arm in arms) else ["torch", "datasets", "sklearn.cluster"]
        networks = ["diffusers.models.unets.unet_2d"] if any(arm.family == "diffusion" for arm in arms) else []
        return [*networks, *images, "scipy.stats", "sklearn.mixture", "sklearn.neighbors", "pipelines.mad.tasks"]

    def seeded(self, seed: int) -> dict[str, Any]:
        """See :class:`SweptExperiment`."""
        return {"seeds": [seed]}

    def device(self, config: MadConfig) -> str:
        """See :class:`SweptExperiment`."""
        return config.workers.device

    def default_metric(self, config: MadConfig) -> str:
        """See :class:`SweptExperiment`: the distance of the family."""
        metric: str = config.generator.metrics[0]
        return metric

    def check(self, config: MadConfig, machine: Machine) -> list[str]:
        """See :class:`SweptExperiment`."""
        from orchestration.experiments.mad.preflight import preflight_mad

        if len(config.resolved_arms) > 1:
            raise ConfigError("the configuration has several arms: a trial runs one, so put what differs into space")
        images = preflight_mad(config, machine).images
        known = not images or images.classified
        return [metric for metric in config.generator.metrics if known or metric not in OF_CLASSES]

    def reads(self, config: MadConfig) -> tuple[dict[str, str], set[str]]:
        """See :class:`SweptExperiment`."""
        paths, extractor = {"data.source": config.data.source}, config.data.extractor
        paths |= {"data.extractor": extractor} if extractor not in (None, *TRAINED) else {}
        return paths, {path for arm in config.resolved_arms.values() for path in arm.code}

    def reports(self, directory: Path, manifest: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
        """See :class:`SweptExperiment`: the last generation's, once the experiment is finished."""
        if manifest.get("status") != "FINISHED":
            return []
        (arm,) = read_summary(directory)["arms"].values()
        values = arm["metrics"][metric]["mean"]
        return [{metric: values[-1], "step": len(values), "images": 0}]

    def run_trial(
        self, config: MadConfig, begun: bool, changes: bool, committed: Committed, copied: Path | None
    ) -> None:
        """See :class:`SweptExperiment`."""
        from orchestration.experiments.mad.loop import run_mad

        # The sweep was typed. Figures of every trial would take longer than the trials: resume draws them.
        run_mad(config, trusted=True, changes=changes, figures=False)
