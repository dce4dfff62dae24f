"""Which weights a training moved, and which concepts' neurons they are: what ``ouroboros runs compare --weights`` says.

Two networks of one shape are read a tensor at a time; nothing of them is loaded as a model.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orchestration.runs.browse import find_run
from orchestration.runs.config import ConfigError
from orchestration.runs.display import plain_table
from orchestration.runs.tables import ABSENT
from pipelines.storage.model_files import ModelFilesError, reading, weight_files

_STAGES = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")
_KINDS = ("attn1", "attn2", "attn", "ff", "resnets", "downsamplers", "upsamplers")
_MOVERS = 10  # tensors that are named
_MOVING, _SHARE = "‖Δθ‖ / ‖θ‖", "of the squared movement"


def find_pipeline(name: str, root: Path) -> Path:
    """The directory of a pipeline, or the one in a run. Raises ConfigError."""
    if (Path(name).expanduser() / "model_index.json").is_file():
        return Path(name).expanduser()
    directory = find_run(name, root).directory / "pipeline"
    if not (directory / "model_index.json").is_file():
        raise ConfigError(f"{directory} is no pipeline: name a run that has written one, or a pipeline's own directory")
    return directory


def moved(base: Path, trained: Path, masks: Sequence[Path] = ()) -> dict[str, Any]:
    """How far the network of the pipeline ``trained`` lies from that of ``base``, ‖Δθ‖ / ‖θ‖: by group of layers, and
    of the tensors that moved most.

    ``masks`` are files of positions by tensor, as the study ``neurons`` writes them. Of each: what share of the squared
    movement of the tensors that it names lies on its positions, beside what share of their weights these are.
    ``enrichment``, the quotient, is 1 of a movement that has nothing to do with the mask. Raises ConfigError.
    """
    try:
        with ExitStack() as held:
            return _moved(_tensors(base, held), _tensors(trained, held), {each: _mask(each) for each in masks})
    except ModelFilesError as error:
        raise ConfigError(str(error)) from error


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], masks: Mapping[Path, Mapping[str, Any]]) -> Any:
    if odd := sorted(before.keys() ^ after.keys()):
        raise ConfigError(f"these are networks of other shapes: {odd[0]} is in one of them alone")
    groups, tensors = defaultdict[str, Counter[str]](Counter), dict[str, Counter[str]]()
    of_masks: dict[Path, tuple[Counter[str], Counter[str]]] = {path: (Counter(), Counter()) for path in masks}
    for path, named in masks.items():
        if odd := sorted(named.keys() - before.keys()):
            raise ConfigError(f"{path} names {odd[0]}, which these networks have not: it is of another")
    for name in sorted(before):
        old, new = (each[name].get_tensor(name).double() for each in (before, after))
        if old.shape != new.shape:
            raise ConfigError(f"these are networks of other shapes: {name} is {[*old.shape]} and {[*new.shape]}")
        change = (new - old).square().flatten()
        tensors[name] = Counter(weights=len(change), squares=old.square().sum().item(), movement=change.sum().item())
        groups[_group(name)].update(tensors[name])
        for path, named in masks.items():
            if (at := named.get(name)) is not None:
                if len(at) and not 0 <= at.min() <= at.max() < len(change):
                    raise ConfigError(f"{path} names positions that {name}, of {len(change)} weights, has not")
                on, of = of_masks[path]
                on.update(weights=len(at), movement=change[at].sum().item())
                of.update(tensors[name])
    total, largest = sum(groups.values(), Counter())["movement"], sorted(tensors, key=lambda name: -_far(tensors[name]))
    return {
        "groups": [
            {
                "group": name,
                "weights": each["weights"],
                "relative": _far(each),
                "share": each["movement"] / (total or 1),
            }
            for name, each in groups.items()
        ],
        "movers": [{"tensor": name, "relative": _far(tensors[name])} for name in largest[:_MOVERS]],
        "masks": [_enrichment(str(path), *each) for path, each in of_masks.items()],
    }


def render_moved(known: Mapping[str, Any]) -> RenderableType:
    """What :func:`moved` found, as tables."""
    numbers = ["weights", _MOVING, _SHARE]
    parts = [_table(["layers", *numbers], known["groups"]), _table(["moved most", _MOVING], known["movers"])]
    if known["masks"]:
        parts.append(_table(["mask", "weights", "of its tensors' weights", _SHARE, "enrichment"], known["masks"]))
    return Group(*(line for part in parts for line in (part, "")))


def _table(headings: list[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Of whole numbers, shares (whose key begins so) and others."""
    cells = [[_cell(key, value) for key, value in row.items()] for row in rows]
    return plain_table(headings, cells, numbers=headings[1:])


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if "share" in key else f"{value:.4g}"


def _far(sums: Mapping[str, float]) -> float:
    """‖Δθ‖ / ‖θ‖; where all was 0, 1 if something has moved."""
    return (sums["movement"] / sums["squares"]) ** 0.5 if sums["squares"] else float(sums["movement"] > 0)


def _enrichment(mask: str, on: Mapping[str, float], of: Mapping[str, float]) -> dict[str, Any]:
    weights, share = on["weights"] / (of["weights"] or 1), on["movement"] / (of["movement"] or 1)
    found = {"mask": mask, "weights": on["weights"], "share_of_weights": weights, "share": share}
    return {**found, "enrichment": share / weights if weights and of["movement"] else None}


def _group(name: str) -> str:
    """Stage and kind of layer, such as "up_blocks attn2"."""
    parts = name.split(".")
    stage = next((each for each in _STAGES if each in parts), None)
    return f"{stage} {next((each for each in _KINDS if each in parts), 'other')}" if stage else "outside blocks"


def _tensors(directory: Path, held: ExitStack) -> dict[str, Any]:
    """By name of a tensor of a pipeline's network the open file that holds it."""
    from safetensors import safe_open

    network = next((each for each in ("transformer", "unet") if (directory / each).is_dir()), "unet")
    found: dict[str, Any] = {}
    for file in weight_files(directory / network):
        with reading(file):
            opened = held.enter_context(safe_open(file, "pt"))
            found |= dict.fromkeys(opened.keys(), opened)
    return found


def _mask(path: Path) -> dict[str, Any]:
    """Positions by tensor."""
    from safetensors.torch import load_file

    with reading(path):
        return {name: each.long().flatten() for name, each in load_file(path).items()}
