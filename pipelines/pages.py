"""Text for people, made from templates: pages, cards, and what a terminal shows."""

from pathlib import Path
from typing import Any


def fill(template: Path, **values: Any) -> str:
    """The text of a Jinja template. Values are escaped where it is HTML; one that is missing is an error, no blank."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=template.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template(template.name).render(**values)
