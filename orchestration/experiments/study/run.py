"""A study's run: the metrics, images, figures, sounds and products that come in, and where they go."""

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from orchestration.experiments.study.config import Study
from orchestration.experiments.study.preflight import Plan
from orchestration.experiments.task_run import TaskRun
from orchestration.runs.display import Row
from pipelines.storage.atomic import DamagedFiles, Files, commit_directory, read_directory, replace_durably
from pipelines.storage.names import file_name
from pipelines.storage.tasks import Task
from pipelines.studies import FIGURES, IMAGES, METRICS, SOUNDS, products
from policies.common.intervals import Scale, scale_of

_MOST_ROWS = 6  # of metrics on the display


class StudyRun(TaskRun):
    """One study. ``courses`` has every metric of an arm and a seed as the numbers of its steps, the last of which
    counts."""

    config: Study

    def __init__(self, config: Study, plan: Plan, *given: bool) -> None:
        claimed = list(dict.fromkeys(claim.metric for claim in plan.claims))
        rows = [Row(name, name, name.replace("{", "{{").replace("}", "}}") + " {}") for name in claimed[:_MOST_ROWS]]
        about = {"loop": "study", "total_steps": len(plan.order)}
        super().__init__(config, about, plan.inputs, rows, "task", *given)
        self.plan, self.first = plan, claimed
        self.courses: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(dict)
        self.products: dict[str, list[str]] = defaultdict(list)  # by arm, relative to the run's directory
        self._left = {pair: {task.key for task in tasks} for pair, tasks in plan.tasks.items()}
        self._latest: dict[str, int] = defaultdict(int)  # by arm, when its last result came, in ms

    def on_start(self) -> None:
        """Open the runs below this one: an arm each, and below it a seed each if they are few."""
        config, tags = self.config, {"study": self.config.study}
        size = f"{len(config.arms)} arms × {len(config.seed_list)} seeds, {self.manifest['total_steps']} tasks"
        note = f"**{config.name}** ({config.study}): {size}. Its claims are tags, and in the artifact `report.html`."
        self.log_params(self.manifest["config"], tags, note)
        self.open_arms({arm: ({"arm": arm}, tags) for arm in config.arms})

    def progress(self) -> str:
        """How many tasks are done."""
        return f"{self._done} of {self.manifest['total_steps']} tasks are done"

    def taken(self, task: Task, timestamp_ms: int) -> None:
        """The metrics and files of a task, for every arm and seed that reports them."""
        shown: dict[str, float] = {}
        pairs = [pair for pair, left in self._left.items() if task.key in left]
        files = self.store.load(task.key) if pairs else {}
        for arm, seed in pairs:
            courses = _courses(task, files)
            self.courses[arm, seed] |= courses
            shown = {name: course[-1] for name, course in courses.items()}
            for step in range(max(map(len, courses.values()), default=0)):
                there = {name: course[step] for name, course in courses.items() if step < len(course)}
                self.note(arm, seed, step, there, timestamp_ms)
            self._put_files(arm, seed, task, files)
            self._latest[arm] = max(self._latest[arm], timestamp_ms)
            self._left[arm, seed].remove(task.key)
            if not any(left for (of, _), left in self._left.items() if of == arm):
                self._note_all_means(arm)
        self.advance(shown, task.label)

    def scale(self, metric: str) -> Scale:
        """That on which its claims are judged, so that pictures and summary show the same interval, or the study's."""
        judged = [claim.scale for claim in self.plan.claims if claim.metric == metric and claim.scale]
        return judged[0] if judged else self.config.scale or scale_of(metric)

    def values(self) -> dict[str, dict[str, list[float]]]:
        """By arm and metric, one number a seed; nan where a seed has none."""
        found: dict[str, dict[str, list[float]]] = {}
        for arm in self.config.arms:
            of_seeds = [self.courses[arm, seed] for seed in self.config.seed_list]
            names = sorted({name for courses in of_seeds for name in courses})  # in whatever order they came
            found[arm] = {name: [courses.get(name, [np.nan])[-1] for courses in of_seeds] for name in names}
        return found

    def _put_files(self, arm: str, seed: int, task: Task, files: Files) -> None:
        """Images to MLflow; figures, sounds and a product into the run's directory."""
        place = file_name(f"{arm}-seed{seed}")
        if tracker := self.tracker_of(arm, seed):
            for name, _, content in _below(files, IMAGES, ".png"):
                image, _, step = name.rpartition("/")
                is_numbered = bool(image) and step.isdecimal()
                tracker.image(image if is_numbered else name, _pixels(content), int(step) if is_numbered else 0)
        for name, suffix, content in [*_below(files, FIGURES, ".png", ".gif"), *_below(files, SOUNDS, ".wav")]:
            shelf = self.directory / (SOUNDS if suffix == ".wav" else FIGURES)
            shelf.mkdir(exist_ok=True)
            replace_durably(shelf / f"{file_name(f'{name}_{place}')}{suffix}", content)
        for name, product in products(files).items():
            target = self.directory / "products" / place / (file_name(name) if name else "")
            there = str(target.relative_to(self.directory))
            if any(f"{each}/".startswith(f"{there}/") or there.startswith(f"{each}/") for each in self.products[arm]):
                raise ValueError(f"task {task.label}: {there} holds another task's product: use product/NAME/")
            self.products[arm].append(there)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                same = read_directory(target)[0] == product
            except DamagedFiles:
                same = False
            if not same:
                commit_directory(target, product, {"arm": arm, "seed": seed, "task": task.key})

    def _note_all_means(self, arm: str) -> None:
        """An arm's means over its seeds, step by step, of what all of them have."""
        of_seeds = [self.courses[arm, seed] for seed in self.config.seed_list]
        for name in of_seeds[0]:
            courses = [courses.get(name, []) for courses in of_seeds]
            if len({*map(len, courses)}) == 1:
                for step, values in enumerate(np.transpose(courses)):
                    self.note_means(arm, step, {name: values}, self._latest[arm], {})


def _below(files: Files, place: str, *suffixes: str) -> Iterator[tuple[str, str, bytes]]:
    """The files of these kinds under a place: path from there, suffix, content."""
    for path, content in files.items():
        stem, dot, suffix = path.removeprefix(place).rpartition(".")
        if path.startswith(place) and dot + suffix in suffixes:
            yield stem, dot + suffix, content


def _courses(task: Task, files: Mapping[str, bytes]) -> dict[str, list[float]]:
    """A task's metrics, each as the numbers of its steps. Raises ValueError that names the task."""
    try:
        content = json.loads(files.get(METRICS, b"{}"))
        courses = {name: [*map(float, each if isinstance(each, list) else [each])] for name, each in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"task {task.label}: its {METRICS} holds no numbers by name: {error}") from error
    if empty := [name for name, course in courses.items() if not course]:
        raise ValueError(f"task {task.label}: {empty[0]} in its {METRICS} is a list of nothing")
    return courses


def _pixels(png: bytes) -> Any:
    """An image as (height, width, 3) uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
