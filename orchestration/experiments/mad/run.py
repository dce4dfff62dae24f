"""A MAD run: the values that come in, and what of them goes to the terminal and to MLflow."""

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from orchestration.experiments.mad.analysis import laws
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.preflight import Experiment, contents
from orchestration.experiments.task_run import TaskRun
from orchestration.runs.display import Row
from orchestration.runs.inputs import accept, code_of
from orchestration.runs.manifest import new_manifest, open_run
from orchestration.runs.run import new_directory
from orchestration.tracking.tracker import FIRST_LOOK, Tracker
from pipelines.mad.graph import Generation
from pipelines.mad.tasks import read_real_data, read_samples
from pipelines.storage.locations import portable
from pipelines.storage.tasks import Task
from policies.common.intervals import interval, scale_of

_ROWS = (
    Row("fid", "FID", "FID {}", colour="red"),
    Row("frechet", "Fréchet distance", "distance {}", colour="red"),
    Row("w2_squared", "W₂²", "W2² {}", colour="red"),
    Row("heterozygosity", "heterozygosity", "heterozygosity {}", colour="blue"),
    Row("precision", "precision", "precision {}", colour="green"),
    Row("recall", "recall", "recall {}", colour="blue"),
)
_GRID_IMAGES, _GRID_COLUMNS = 36, 6  # square: MLflow shows it 256 pixels wide

Values = dict[str, np.ndarray]  # metric → (seeds, generations), nan where there is nothing yet


class MadRun(TaskRun):
    """One MAD experiment, new or the one that ``output_dir`` holds: its directory appears when it is made, nothing
    before. ``values`` holds every metric, by arm."""

    config: MadConfig

    def __init__(
        self,
        config: MadConfig,
        experiment: Experiment,
        generations: Sequence[Generation],
        trusted: bool = False,
        changes: bool = False,
    ) -> None:
        directory = new_directory(config)
        held = open_run(directory, trusted) if (directory / "manifest.json").exists() else {}
        manifest = new_manifest("mad", config, held)
        manifest |= {"total_steps": len(generations), "committed_step": 0}
        arms = config.resolved_arms.values()
        inputs = code_of(path for arm in arms for path in arm.code)
        images = next((source for source in experiment.sources.values() if source.data), None)
        if images and images.data:
            found = {"sha256": images.data.parameters["sha256"], "samples": images.samples}
            manifest["real_images"] = found | {"pool": images.pool, "classes": images.classes}
            inputs["data.source"] = {"path": portable(config.data.source), "sha256": found["sha256"]}
        accept(directory, manifest, held, inputs, changes)
        super().__init__(directory, config, manifest, len(generations), rows=_ROWS, unit="generation")
        self.experiment = experiment
        self.generations = generations
        if images and images.data and self.store.to_do([images.data]):
            self.store.commit(images.data, experiment.real_files[images.data.key], {})
        self.laws = {name: laws(arm, config.generations) for name, arm in config.resolved_arms.items()}
        self.values: dict[str, Values] = {name: {} for name in config.resolved_arms}
        self.histograms: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(dict)  # by (seed, generation)
        self._row = {seed: index for index, seed in enumerate(config.seed_list)}
        self._waiting: dict[str, list[Generation]] = defaultdict(list)  # by the key of the task that measures them
        for generation in generations:
            self._waiting[generation.measure.key].append(generation)
        self._measured: dict[tuple[str, int], int] = defaultdict(int)  # seeds by (arm, generation)

    def on_start(self) -> None:
        """Open the runs below this one: an arm each, and below it a seed each if they are few."""
        config = self.config
        flat = {key: value for key, value in self.manifest["config"].items() if key != "arms"}
        arms = config.resolved_arms.values()
        kinds = {key: ", ".join(sorted({getattr(arm, key) for arm in arms})) for key in ("family", "rule")}
        size = f"{len(arms)} arms × {len(config.seed_list)} seeds × {config.generations} generations"
        note = f"**{config.name}**: {size}. Each arm is a run below this one; `report.html` is among the artifacts."
        self.log_params(flat | {"arms": ", ".join(config.resolved_arms)}, kinds, note)
        self.open_arms(
            {
                name: (
                    arm.described,
                    {"rule": arm.rule, "family": arm.family},
                )
                for name, arm in config.resolved_arms.items()
            },
            config.seed_list,
        )
        for each in self.generations:
            if each.seeds[0] == config.seed_list[0] and (tracker := self.tracker_of(each.arm)):
                key, about = each.fit.key, {"training set": contents(each.manifest), "samples": each.manifest.size}
                tracker.dataset(f"generation {each.number:03d}", key, str(self.store.path(key)), about)

    def progress(self) -> str:
        """How many generations are measured."""
        return f"{self._done} of {len(self.generations)} generations are measured"

    def taken(self, task: Task, timestamp_ms: int) -> None:
        """The values of the generations that a task measures."""
        for generation in self._waiting.get(task.key, []):
            self._record_measure(generation, timestamp_ms)

    def metrics_of(self, task: Task) -> dict[str, list[float]]:
        """For each metric one value a universe, as a measuring task left them."""
        metrics: dict[str, list[float]] = json.loads(self.store.load(task.key)["metrics.json"])["metrics"]
        return metrics

    def _record_measure(self, generation: Generation, timestamp_ms: int) -> None:
        arm, number = generation.arm, generation.number
        result = json.loads(self.store.load(generation.measure.key)["metrics.json"])
        shape = len(self._row), self.config.generations
        rows = [self._row[seed] for seed in generation.seeds]
        for metric, values in result["metrics"].items():
            self.values[arm].setdefault(metric, np.full(shape, np.nan))[rows, number - 1] = values
        for index, seed in enumerate(generation.seeds):
            if result["class_histogram"]:
                self.histograms[arm][seed, number] = result["class_histogram"]
            of_seed = {metric: values[index] for metric, values in result["metrics"].items()}
            self.note(arm, seed, number, of_seed, timestamp_ms)
            if tracker := self.tracker_of(arm, seed):
                self._send_grid(tracker, generation)
        self._measured[arm, number] += len(generation.seeds)
        if self._measured[arm, number] == len(self._row):
            self.note(arm, None, number, self._means(arm, number), timestamp_ms)
        shown = {metric: float(np.mean(values)) for metric, values in result["metrics"].items()}
        first, last = generation.seeds[0], generation.seeds[-1]
        seeds = f"seed {first}" if first == last else f"seeds {first}–{last}"
        self.advance(shown, f"{arm}, {seeds}, G{number}")

    def _send_grid(self, tracker: Tracker, generation: Generation) -> None:
        """The first evaluation images, the same latent seeds at every generation, on the dashboard's step slider.

        The slider begins at 0, so the real ones stand there.
        """
        real = self.experiment.sources[generation.arm].data
        if generation.evaluation is None or real is None:
            return
        from pipelines.figures.plots import image_grid

        sets = {generation.number: read_samples(self.store.load(generation.evaluation.key)).values[0]}
        if generation.number == 1:
            sets[0] = read_real_data(self.store.load(real.key))["reference"]
        for number, images in sets.items():
            shown = images[:_GRID_IMAGES]
            rgb = np.broadcast_to(shown, (*shown.shape[:3], 3))
            tracker.image("samples", image_grid(rgb, _GRID_COLUMNS), number)

    def _means(self, arm: str, number: int) -> dict[str, float]:
        """An arm's means over its seeds, with their intervals and the exact laws' values."""
        found: dict[str, float] = {}
        for metric, values in self.values[arm].items():
            mean, low, high = interval(values[:, number - 1], scale_of(metric))
            ends = {f"interval/{metric}_low": float(low), f"interval/{metric}_high": float(high)}
            found |= {metric: float(mean), **ends}
        first = {f"{FIRST_LOOK}/{row.key}": found[row.key] for row in _ROWS if row.key in found}
        theory = {f"exact/{metric}": float(values[number - 1]) for metric, values in self.laws[arm].items()}
        return first | found | theory
