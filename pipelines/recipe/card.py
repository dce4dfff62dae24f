"""Fills the model card, ``card.md``, with what ``pretrain`` measured; no number in it is typed by hand."""

from pathlib import Path
from typing import Any

from pipelines.digits import SPLIT_SIZES, all_prompts
from pipelines.pages import fill


def model_card(measurements: dict[str, Any]) -> str:
    """The card's Markdown."""
    curve, target = measurements["pipeline"]["curve"], measurements["target_accuracy"]
    first = min(curve, key=lambda point: abs(point["full"] - target))
    captions, template = len(all_prompts()), Path(__file__).with_suffix(".md")
    return fill(template, **measurements, first=first, captions=captions, split=SPLIT_SIZES)
