"""What a study's tasks are: plain functions from parameters and files to files, named by their import path. Those of
each study are in the module of its name.

A task function takes ``(parameters, inputs, device)`` and returns files by relative path. Of the tasks that a study
returns for an arm and a seed, these files are taken to people:

- ``metrics.json``: an object of numbers by name, or of lists of numbers, a step each (:func:`metrics`);
- ``images/NAME.png``: for MLflow's image panel; ``images/NAME/STEP.png`` a step on its slider;
- ``figures/NAME.png``, or ``.gif`` of what moves: for the run's ``figures`` and its report;
- ``sounds/NAME.wav``: for the run's ``sounds`` and its report, in which they can be heard;
- ``product/…``: a directory, such as a diffusers pipeline, put at ``RUN/products/ARM-seedN``; if there are no files but
  in sub-directories, each of these is a product, put at ``RUN/products/ARM-seedN/NAME``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.storage.atomic import Files, packed
from pipelines.storage.tasks import Task
from policies.common.user_code import import_function

METRICS, IMAGES, FIGURES, SOUNDS, PRODUCT = "metrics.json", "images/", "figures/", "sounds/", "product/"
TaskFunction = Callable[[Mapping[str, Any], list[Files], str], Files]


def task(
    function: TaskFunction,
    parameters: Mapping[str, Any],
    *inputs: Task,
    label: str = "",
    kept: bool = True,
    divisible: bool = False,
) -> Task:
    """The task of calling ``function`` with ``parameters`` and the files of other tasks. ``divisible``: several workers
    may call it at once, as its training is :mod:`pipelines.training`'s, which they share. Raises ValueError unless the
    function can be imported by its name: a worker does so."""
    if "<" in function.__qualname__ or "." in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is no function of a module: a task's is found by its import path")
    kind, label = f"{function.__module__}:{function.__name__}", label or function.__name__
    return Task(kind, parameters, inputs, label, kept, divisible)


def perform(kind: str, parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Do one task, whose kind is the import path of its function: only for graphs that a study's own code has made."""
    function: TaskFunction = import_function(kind, "task", ())
    return function(parameters, inputs, device)


def metrics(values: Mapping[str, float | Sequence[float]]) -> Files:
    """The file of a task's metrics: by name a number, or a list of them, a step each, of which the last counts."""
    content = {
        name: [float(each) for each in value] if isinstance(value, Sequence) else float(value)
        for name, value in values.items()
    }
    return {METRICS: json.dumps(content).encode()}


def product(pipeline: Any, name: str) -> Files:
    """The files of a diffusers pipeline as a product; equal ones are equal wherever they came from."""
    for part in (pipeline, *pipeline.components.values()):
        if hasattr(part, "register_to_config") and "_name_or_path" in part.config:
            part.register_to_config(_name_or_path="")
    files = packed(lambda directory: pipeline.save_pretrained(directory, safe_serialization=True))
    return {f"{PRODUCT}{name}/{path}": content for path, content in files.items()}


def products(files: Files) -> dict[str, Files]:
    """The products among a task's files, by name: one without a name, unless all are in directories of their own."""
    found = {path.removeprefix(PRODUCT): content for path, content in files.items() if path.startswith(PRODUCT)}
    if not found or any("/" not in path for path in found):
        return {"": found} if found else {}
    named: dict[str, Files] = defaultdict(dict)
    for path, content in found.items():
        name, _, rest = path.partition("/")
        named[name][rest] = content
    return named
