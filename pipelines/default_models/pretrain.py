"""Builds the default models from nothing: ``pretrain(directory)`` trains, measures, chooses and documents them.

What it promises: everything follows from ``seed``; finished parts are kept, so an interrupted build goes on with the
part it was at; and every number in the model card comes from ``measurements.json``, written by the measurements below.
The shipped diffusion model is deliberately **not** the best one, because reinforcement learning needs room: ``card.md``
says how it is made worse, and how its checkpoint is chosen by ``TARGET_ACCURACY``.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.data.digits import SPLIT_SIZES, all_prompts
from pipelines.pages import fill
from pipelines.sharing import sharing
from pipelines.storage.atomic import Files

RECIPES: dict[str, tuple[str, tuple[str, ...], str]] = {  # name → module, parts in order, template of the card
    "digits": ("models", ("evaluator", "captioner", "autoencoder", "pipeline"), "card.md"),
    "digits-attention": ("attention", ("autoencoder", "pipeline"), "attention_card.md"),
}
_PLACES = {"autoencoder": ".autoencoder"}  # until the pipeline holds it; any other part's directory has its name


def pretrain(output_dir: Path, seed: int = 0, progress: Callable[[str], None] = print, recipe: str = "digits") -> None:
    """Writes ``pipeline/``, ``measurements.json`` and ``README.md`` to ``output_dir``; of ``digits`` also
    ``captioner/`` and ``evaluator/``, which serve both recipes.

    Takes about twenty-five CPU minutes from nothing. Parts already there are skipped; delete a part's directory to
    build it again. Raises ValueError if ``output_dir`` holds parts built from another seed or by another recipe, cannot
    be made, or there is no such ``recipe``.
    """
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}: choose {' or '.join(RECIPES)}")
    make(output_dir)
    module, parts, _ = RECIPES[recipe]
    from pipelines.default_models import models

    how = import_module(f"{__package__}.{module}")
    record = output_dir / "measurements.json"
    measurements: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if measurements.setdefault("seed", seed) != seed:
        raise ValueError(
            f"{output_dir} was begun with seed {measurements['seed']}, not {seed}: use that seed or another directory"
        )
    if measurements.setdefault("recipe", recipe) != recipe:
        raise ValueError(f"{output_dir} holds {measurements['recipe']}, not {recipe}: name another directory")
    measurements["target_accuracy"] = models.TARGET_ACCURACY
    for name in parts:
        directory, partial = output_dir / _PLACES.get(name, name), output_dir / f".{name}.partial"
        held = directory.is_dir() or (name in _PLACES and (output_dir / "pipeline").is_dir())
        if held and name in measurements:
            progress(f"{name}: already there")
            continue
        start = time.process_time()
        for begun in (partial, directory):
            shutil.rmtree(begun, ignore_errors=True)
        measured = getattr(how, f"build_{name}")(partial, output_dir, seed, progress)
        progress(f"{name}: measured {measured.get('test') or measured['chosen']}")
        measured["cpu_seconds"] = round(time.process_time() - start)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        measured["megabytes"] = round(size / 1e6, 2)
        partial.rename(directory)
        measurements[name] = measured
        record.write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output_dir / _PLACES["autoencoder"], ignore_errors=True)
    (output_dir / "README.md").write_text(model_card(measurements), encoding="utf-8")
    progress(f"default models: ready in {output_dir}")


def make(output_dir: Path) -> None:
    """Have the directory. Raises ValueError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output_dir} cannot be made ({error.strerror}): name another directory") from error


def build(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: all of it, by several that share the trainings. The first builds in ``output``, which is there; what others
    build, beginning with the same parts, is thrown away."""
    output, group = Path(parameters["output"]), sharing().group
    with TemporaryDirectory() as aside:
        place = Path(shutil.copytree(output, aside, dirs_exist_ok=True)) if group.rank else output
        group.any(False)  # nobody changes what others still copy
        pretrain(place, parameters["seed"], recipe=parameters["recipe"])
    return {}


def model_card(measurements: dict[str, Any]) -> str:
    """The card's Markdown, filled with what was measured; no number in it is typed by hand."""
    curve, target = measurements["pipeline"]["curve"], measurements["target_accuracy"]
    first = min(curve, key=lambda point: abs(point["full"] - target))
    captions, template = len(all_prompts()), Path(__file__).with_name(RECIPES[measurements["recipe"]][2])
    return fill(template, **measurements, first=first, captions=captions, split=SPLIT_SIZES)
