"""Fills the model card, ``card.md``, with what ``pretrain`` measured; no number in it is typed by hand."""

from pathlib import Path
from typing import Any

from pipelines.digits import SLOTS, SPLIT_SIZES, all_prompts

_PARTS = ("evaluator", "captioner", "autoencoder")


def model_card(measurements: dict[str, Any]) -> str:
    """The card's Markdown."""
    pipeline, target = measurements["pipeline"], measurements["target_accuracy"]
    parameters = pipeline["parameters"] | {"vae": measurements["autoencoder"]["parameters"]}
    parameters["pipeline"] = sum(parameters.values())
    parameters |= {part: measurements[part]["parameters"] for part in ("evaluator", "captioner")}
    seconds = {part: measurements[part]["cpu_seconds"] for part in ("evaluator", "captioner", "pipeline")}
    seconds["pipeline"] += measurements["autoencoder"]["cpu_seconds"]
    rows = {part: _cells(measurements[part]["test"]) for part in _PARTS}
    for model in ("chosen", "supervised"):
        rows |= {f"{model}_{scale}": _cells(pipeline[model][f"guidance_{scale}"]) for scale in (1, 2)}
    for phase in ("curve", "candidates"):
        rows[phase] = "\n".join(f"| {point['step']} | {_cells(point)} |" for point in pipeline[phase])
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return template.format(
        **measurements,
        captions=len(all_prompts()),
        split=SPLIT_SIZES,
        size={name: f"{count / 1e6:.2f} M" for name, count in parameters.items()},
        seconds=seconds | {"all": sum(seconds.values())},
        row=rows,
        first=min(pipeline["curve"], key=lambda point: abs(point["full"] - target)),
        chosen=pipeline["chosen"],
        supervised=pipeline["supervised"],
        error={name: f"{(0.25 / pipeline[f'{name}_images']) ** 0.5:.3f}" for name in ("fine", "curve", "candidate")},
    )


def _cells(accuracy: dict[str, float]) -> str:
    return " | ".join(f"{accuracy[column]:.3f}" for column in (*SLOTS, "full"))
