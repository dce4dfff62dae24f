"""Fills the model card, ``card.md``, with what ``pretrain`` measured; no number in it is typed by hand."""

from pathlib import Path
from typing import Any

from pipelines.digits import SPLIT_SIZES, all_prompts


def model_card(measurements: dict[str, Any]) -> str:
    """The card's Markdown."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    curve, target = measurements["pipeline"]["curve"], measurements["target_accuracy"]
    first = min(curve, key=lambda point: abs(point["full"] - target))
    template = page.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    return template.render(**measurements, first=first, captions=len(all_prompts()), split=SPLIT_SIZES)
