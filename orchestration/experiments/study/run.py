"""A study's run: the metrics, images, figures and products that come in, and where they go."""

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
from orchestration.runs.inputs import accept
from orchestration.runs.manifest import new_manifest, open_run
from orchestration.runs.run import new_directory
from orchestration.tracking.tracker import FIRST_LOOK
from pipelines.storage.atomic import DamagedFiles, Files, commit_directory, read_directory, replace_durably
from pipelines.storage.names import file_name
from pipelines.storage.tasks import Task
from pipelines.studies import FIGURES, IMAGES, METRICS, products
from policies.common.intervals import interval, scale_of

_MOST_ROWS = 6  # of metrics on the display


class StudyRun(TaskRun):
    """One study. ``courses`` has every metric of an arm and a seed as the numbers of its steps, the last of which
    counts."""

    config: Study

    def __init__(self, config: Study, plan: Plan, trusted: bool = False, changes: bool = False) -> None:
        directory = new_directory(config)
        held = open_run(directory, trusted) if (directory / "manifest.json").exists() else {}
        manifest = new_manifest("study", config, held)
        manifest |= {"total_steps": len(plan.order), "committed_step": 0}
        accept(directory, manifest, held, plan.inputs, changes)
        claimed = list(dict.fromkeys(claim.metric for claim in plan.claims))[:_MOST_ROWS]
        rows = [Row(name, name, name.replace("{", "{{").replace("}", "}}") + " {}") for name in claimed]
        super().__init__(directory, config, manifest, len(plan.order), rows=rows, unit="task")
        self.plan = plan
        self.courses: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(dict)
        self.products: dict[str, list[str]] = defaultdict(list)  # by arm, relative to the run's directory
        self._waiting: dict[str, list[tuple[str, int]]] = defaultdict(list)  # by task: whose it is
        for pair, tasks in plan.tasks.items():
            for key in (task.key for task in tasks):
                self._waiting[key].append(pair)
        self._left = {pair: len(tasks) for pair, tasks in plan.tasks.items()}
        self._latest: dict[str, int] = defaultdict(int)  # by arm, when its last result came, in ms

    def on_start(self) -> None:
        """Open the runs below this one: an arm each, and below it a seed each if they are few."""
        config = self.config
        size = f"{len(config.arms)} arms × {len(config.seed_list)} seeds, {len(self.plan.order)} tasks"
        note = f"**{config.name}** ({config.study}): {size}. Its claims are tags, and in the artifact `report.html`."
        self.log_params(self.manifest["config"], {"study": config.study}, note)
        tags = {"study": config.study}
        self.open_arms({arm: ({"arm": arm}, tags) for arm in config.arms}, config.seed_list)

    def progress(self) -> str:
        """How many tasks are done."""
        return f"{self._done} of {len(self.plan.order)} tasks are done"

    def taken(self, task: Task, timestamp_ms: int) -> None:
        """The metrics and files of a task, for every arm and seed that reports them."""
        shown: dict[str, float] = {}
        files = self.store.load(task.key) if task.key in self._waiting else {}
        for arm, seed in self._waiting.get(task.key, []):
            courses = _courses(task, files)
            self.courses[arm, seed] |= courses
            shown = {name: course[-1] for name, course in courses.items()}
            for step in range(max(map(len, courses.values()), default=0)):
                there = {name: course[step] for name, course in courses.items() if step < len(course)}
                self.note(arm, seed, step, there, timestamp_ms)
            self._put_files(arm, seed, task, files)
            self._latest[arm] = max(self._latest[arm], timestamp_ms)
            self._left[arm, seed] -= 1
            if not any(left for (of, _), left in self._left.items() if of == arm):
                self._note_means(arm)
        self.advance(shown, task.label)

    def values(self) -> dict[str, dict[str, list[float]]]:
        """By arm and metric, one number a seed; nan where a seed has none."""
        found: dict[str, dict[str, list[float]]] = {}
        for arm in self.config.arms:
            of_seeds = [self.courses[arm, seed] for seed in self.config.seed_list]
            names = sorted({name for courses in of_seeds for name in courses})  # in whatever order they came
            found[arm] = {name: [courses.get(name, [np.nan])[-1] for courses in of_seeds] for name in names}
        return found

    def _put_files(self, arm: str, seed: int, task: Task, files: Files) -> None:
        """Images to MLflow, figures and a product into the run's directory."""
        place = file_name(f"{arm}-seed{seed}")
        tracker = self.tracker_of(arm, seed)
        if tracker:
            for name, content in _below(files, IMAGES):
                image, _, step = name.rpartition("/")
                is_numbered = bool(image) and step.isdecimal()
                tracker.image(image if is_numbered else name, _pixels(content), int(step) if is_numbered else 0)
        for name, content in _below(files, FIGURES):
            path = self.directory / "figures" / f"{file_name(f'{name}_{place}')}.png"
            path.parent.mkdir(exist_ok=True)
            replace_durably(path, content)
        for name, product in products(files).items():
            target = self.directory / "products" / place / (file_name(name) if name else "")
            there = str(target.relative_to(self.directory))
            if any(f"{each}/".startswith(f"{there}/") or there.startswith(f"{each}/") for each in self.products[arm]):
                raise ValueError(
                    f"task {task.label}: its product would replace another's at {there}: use product/NAME/"
                )
            self.products[arm].append(there)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                same = read_directory(target)[0] == product
            except DamagedFiles:
                same = False
            if not same:
                commit_directory(target, product, {"arm": arm, "seed": seed, "task": task.key})

    def _note_means(self, arm: str) -> None:
        """An arm's means over its seeds with their intervals, of what all of them have."""
        of_seeds = [self.courses[arm, seed] for seed in self.config.seed_list]
        for name in of_seeds[0]:
            lengths = {len(courses.get(name, ())) for courses in of_seeds}
            for step in range(lengths.pop() if len(lengths) == 1 else 0):
                values = np.array([courses[name][step] for courses in of_seeds])
                mean, low, high = map(float, interval(values, scale_of(name)))
                ends = {f"interval/{name}_low": low, f"interval/{name}_high": high}
                first = {f"{FIRST_LOOK}/{name}": mean} if name in self._claimed else {}
                self.note(arm, None, step, {name: mean, **ends, **first}, self._latest[arm])

    @property
    def _claimed(self) -> set[str]:
        return {claim.metric for claim in self.plan.claims}


def _below(files: Files, place: str) -> Iterator[tuple[str, bytes]]:
    """The PNG files under a place, by their paths from there without the suffix."""
    for path, content in files.items():
        if path.startswith(place) and path.endswith(".png"):
            yield path.removeprefix(place).removesuffix(".png"), content


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
