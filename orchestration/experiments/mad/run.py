"""A MAD run: the values that come in, and how they go to the terminal and to MLflow."""

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from orchestration.experiments.mad.analysis import laws
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.preflight import Experiment, contents
from orchestration.experiments.task_run import TaskRun
from orchestration.runs.display import Row
from orchestration.runs.inputs import code_of
from orchestration.tracking.tracker import Tracker
from pipelines.mad.graph import TRAINED, Generation
from pipelines.mad.tasks import read_real_data, read_samples
from pipelines.storage.locations import fingerprint, portable
from pipelines.storage.tasks import Task

_ROWS = (
    Row("fid", "FID", "FID {}", colour="red"),
    Row("frechet", "Fréchet distance", "distance {}", colour="red"),
    Row("w2_squared", "W₂²", "W2² {}", colour="red"),
    Row("heterozygosity", "heterozygosity", "heterozygosity {}", colour="blue"),
    Row("prompt_accuracy", "prompt accuracy", "prompts {}", colour="green"),
    Row("precision", "precision", "precision {}", colour="green"),
    Row("recall", "recall", "recall {}", colour="blue"),
)
_GRID_IMAGES = 36  # square, as few are too: MLflow shows it 256 pixels wide

Values = dict[str, np.ndarray]  # metric → (seeds, generations), nan where there is nothing yet


class MadRun(TaskRun):
    """One MAD experiment. ``values`` holds every metric, by arm."""

    config: MadConfig

    def __init__(
        self, config: MadConfig, experiment: Experiment, generations: Sequence[Generation], *given: bool
    ) -> None:
        arms, images = config.resolved_arms, experiment.images
        inputs = code_of(path for arm in arms.values() for path in arm.code)
        about = {"loop": "mad", "total_steps": len(generations), "words": experiment.words}
        if images:
            about["real_images"] = images.described
            inputs["data.source"] = {"path": portable(config.data.source), "sha256": images.described["sha256"]}
            if images.look not in TRAINED:
                inputs["data.extractor"] = {"path": portable(str(config.data.extractor)), "sha256": images.look}
        inputs |= {name: fingerprint(path) for name, path in experiment.read.items()}
        super().__init__(config, about, inputs, _ROWS, "generation", *given)
        self.experiment, self.generations = experiment, generations
        for task in images.stored if images else ():
            if self.store.to_do([task]):
                self.store.commit(task, experiment.real_files[task.key], {})
        self.laws = {name: laws(arm, config.generations) for name, arm in arms.items()}
        self.values: dict[str, Values] = {name: {} for name in arms}
        self.histograms: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(dict)  # by (seed, generation)
        self._row = {seed: index for index, seed in enumerate(config.seed_list)}
        self._waiting: dict[str, list[Generation]] = defaultdict(list)  # by the key of the task that measures them
        for generation in generations:
            self._waiting[generation.measure.key].append(generation)
        self._measured: dict[tuple[str, int], int] = defaultdict(int)  # seeds by (arm, generation)

    def on_start(self) -> None:
        """Open the runs below this one: an arm each, and below it a seed each if they are few."""
        config, arms = self.config, self.config.resolved_arms
        kinds = {key: ", ".join(sorted({getattr(arm, key) for arm in arms.values()})) for key in ("family", "rule")}
        size = f"{len(arms)} arms × {len(config.seed_list)} seeds × {config.generations} generations"
        note = f"**{config.name}**: {size}. Each arm is a run below this one; `report.html` is among the artifacts."
        self.log_params(self.manifest["config"] | {"arms": ", ".join(arms)}, kinds, note)
        self.open_arms({name: (arm.described, {"rule": arm.rule, "family": arm.family}) for name, arm in arms.items()})
        for each in self.generations:
            if each.seeds[0] == config.seed_list[0] and (tracker := self.tracker_of(each.arm)):
                key, about = each.fit.key, {"training set": contents(each.manifest), "samples": each.manifest.size}
                tracker.dataset(f"generation {each.number:03d}", key, str(self.store.path(key)), about)

    def progress(self) -> str:
        """How many generations are measured."""
        return f"{self._done} of {len(self.generations)} generations are measured"

    def taken(self, task: Task, timestamp_ms: int) -> None:
        """The values of the generations that a task measures, to the terminal and to MLflow."""
        for generation in self._waiting.get(task.key, []):
            arm, number, seeds = generation.arm, generation.number, generation.seeds
            metrics, histogram = self.measured(task)
            held, rows = self.values[arm], [self._row[seed] for seed in seeds]
            for metric, values in metrics.items():
                empty = np.full((len(self._row), self.config.generations), np.nan)
                held.setdefault(metric, empty)[rows, number - 1] = values
            for index, seed in enumerate(seeds):
                if histogram:
                    self.histograms[arm][seed, number] = histogram
                of_seed = {metric: values[index] for metric, values in metrics.items()}
                self.note(arm, seed, number, of_seed, timestamp_ms)
                if tracker := self.tracker_of(arm, seed):
                    self._send_grid(tracker, generation)
            self._measured[arm, number] += len(seeds)
            if self._measured[arm, number] == len(self._row):
                exact = {f"exact/{metric}": float(values[number - 1]) for metric, values in self.laws[arm].items()}
                means = {metric: values[:, number - 1] for metric, values in held.items()}
                self.note_means(arm, number, means, timestamp_ms, exact)
            shown = {metric: float(np.mean(values)) for metric, values in metrics.items()}
            name = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]}–{seeds[-1]}"
            self.advance(shown, f"{arm}, {name}, G{number}")

    def measured(self, task: Task) -> tuple[dict[str, list[float]], list[float] | None]:
        """For each metric one value a universe, as a measuring task left them, and the shares of the classes."""
        result = json.loads(self.store.load(task.key)["metrics.json"])
        return result["metrics"], result["class_histogram"]

    def _send_grid(self, tracker: Tracker, generation: Generation) -> None:
        """The first evaluation images, the same latent seeds at every generation, on the dashboard's step slider.

        The slider begins at 0, so the real ones stand there.
        """
        real = self.experiment.sources[generation.arm].data
        if generation.evaluation is None or real is None:
            return
        from pipelines.figures.plots import image_grid

        drawn = read_samples(self.store.load(generation.evaluation.key), _GRID_IMAGES)
        sets = {generation.number: drawn.values[0]}
        if generation.number == 1:
            sets[0] = read_real_data(self.store.load(real.key))["reference"]
        for number, images in sets.items():
            tracker.image("samples", image_grid(images[:_GRID_IMAGES]), number)
