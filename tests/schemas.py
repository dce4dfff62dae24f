"""The JSON schemas of what a run's directory says of itself: ``python -m tests.schemas`` writes docs/schemas."""

import json
from pathlib import Path
from typing import Any

import jsonschema

from orchestration.runs.manifest import Manifest, Summary

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


def checked(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and summary of a run that is done. Raises jsonschema.ValidationError unless they keep to them."""
    found = []
    for name in ("manifest", "summary"):
        content = json.loads((directory / f"{name}.json").read_text())
        jsonschema.validate(content, json.loads((SCHEMAS / f"{name}.json").read_text()))
        assert content["schema_version"] == 1
        found.append(content)
    return found[0], found[1]


if __name__ == "__main__":
    for each in (Manifest, Summary):
        text = json.dumps(each.model_json_schema(), indent=1) + "\n"
        (SCHEMAS / f"{each.__name__.lower()}.json").write_text(text)
