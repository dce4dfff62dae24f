"""Text for people, made from templates: pages, cards, and what a terminal shows."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def fill(template: Path, **values: Any) -> str:
    """The text of a Jinja template. Values are escaped where it is HTML; one that is missing is an error, no blank."""
    return _environment(template.parent, template.suffix == ".html").get_template(template.name).render(**values)


@cache
def _environment(directory: Path, escaped: bool) -> "Environment":
    """The templates of a directory, each read once."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(directory),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
