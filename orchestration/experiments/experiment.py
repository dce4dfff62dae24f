"""What commands, jobs, sweeps and reports ask of a kind of experiment. Light to import: methods import the rest."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from orchestration.cluster import forks
from orchestration.cluster.ray_cluster import Machine
from orchestration.runs.browse import RunInfo

# What workers with a diffusion model import. What only one kind of actor needs is its own affair.
DIFFUSION = (
    "torch",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
    "transformers.models.blip.modeling_blip",
    "transformers.models.blip.processing_blip",
    "pipelines.rl.policy",
    "pipelines.rl.learning",
    "pipelines.captioner",
    "pipelines.measures.evaluator",
)
Committed = Callable[[int, Path], None]


class Experiment(ABC):
    """A kind of experiment: its configuration, and how it is planned, run and resumed.

    That is done by the functions of its package that are named for it: of the experiment ``mad`` by ``preflight_mad``
    and ``describe_mad`` in ``preflight.py``, and by ``run_mad`` in ``loop.py``, which runs it or goes on with it.
    """

    name: ClassVar[str]  # its command, and ``loop`` in the manifest of its runs

    @property
    @abstractmethod
    def schema(self) -> type[BaseModel]:
        """The type of its configuration."""

    def plan(self, config: Any, machine: Machine | None = None) -> str:
        """Check everything that can be checked before a run, and describe the run: what a dry run prints.

        ``machine``: the one to run on, by default what is found. Raises ConfigError.
        """
        return str(self._own("preflight", "describe")(config, self._own("preflight", "preflight")(config, machine)))

    def run(self, config: Any, **options: Any) -> Path:
        """Run it, with ``options`` of its own. Returns the path of summary.json. Raises ConfigError before anything is
        started."""
        forks.begin(self.imports(config))
        return Path(self._own("loop", "run")(config, **options))

    def imports(self, config: Any) -> Sequence[str]:
        """The modules that its workers will need, whatever takes longest first."""
        return ()

    def resume(self, directory: Path, trusted: bool, changes: bool) -> Path:
        """Go on with the run in ``directory``. Raises ConfigError if another person began it and it is not ``trusted``,
        or if its inputs have changed and no ``changes`` are accepted."""
        from orchestration.runs.run import going_on

        with going_on(directory, self.schema, trusted) as (_, config):
            return self.run(config, trusted=trusted, changes=changes)

    def rows(self, run: RunInfo) -> list[dict[str, Any]]:
        """The numbers of a run: of arms one row for each arm, seed and step; none before its end."""
        found: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
        for arm, held in run.summary.get("arms", {}).items():
            for metric, each in held["metrics"].items():
                for seed, values in zip(run.summary["seeds"], each["values"], strict=True):
                    for step, value in enumerate(values if isinstance(values, list) else [values], start=1):
                        found[arm, seed, step][metric] = value
        return [{"arm": arm, "seed": seed, "step": step, **row} for (arm, seed, step), row in found.items()]

    def _own(self, module: str, verb: str) -> Any:
        package = type(self).__module__.rpartition(".")[0]
        return getattr(import_module(f"{package}.{module}"), f"{verb}_{self.name}")


class SweptExperiment(Experiment):
    """An experiment whose settings a sweep can search; each trial is one of its runs."""

    end: ClassVar[Literal["max", "min"]]  # of the default metric: which is better
    reports_steps: ClassVar[bool]  # False: a trial reports once, at its end, so that nothing can stop or copy it before
    asks_rewards: ClassVar[bool]
    leaves_pipeline: ClassVar[bool]

    @abstractmethod
    def seeded(self, seed: int) -> dict[str, Any]:
        """The settings of a trial with this one seed."""

    @abstractmethod
    def device(self, config: Any) -> str:
        """The device that a trial asks for: auto, cpu or cuda."""

    @abstractmethod
    def default_metric(self, config: Any) -> str:
        """What trials are compared by if the sweep does not say."""

    @abstractmethod
    def check(self, config: Any, machine: Machine) -> Sequence[str]:
        """Check a trial's configuration. Returns the metrics that it reports. Raises ConfigError."""

    @abstractmethod
    def reads(self, config: Any) -> tuple[dict[str, str], set[str]]:
        """The paths that a trial reads, by key, and the import paths of a user's own code."""

    def models(self, config: Any) -> frozenset[Any]:
        """The models that a trial loads, as a dry run has to try them out; empty if there is nothing to try."""
        return frozenset()

    def period(self, config: Any, metric: str) -> int:
        """Steps between two reports of ``metric``."""
        return self.steps(config)

    def steps(self, config: Any) -> int:
        """Steps of a trial."""
        return 1

    @abstractmethod
    def reports(self, directory: Path, manifest: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
        """What a trial has committed so far: ``metric``, "step" and "images", in order."""

    @abstractmethod
    def run_trial(self, config: Any, begun: bool, changes: bool, committed: Committed, copied: Path | None) -> None:
        """In a trial's process: run it, or go on with one that has ``begun``.

        ``committed(step, commit)`` is called after each step but the last; ``copied`` is a commit of another trial to
        start from.
        """
