"""What a run's directory says of itself against its JSON schemas, as any reader of these would check it."""

import json
from pathlib import Path
from typing import Any

import jsonschema

from orchestration.runs.manifest import SCHEMAS


def checked(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and summary of a run that is done. Raises jsonschema.ValidationError unless they keep to them."""
    found = []
    for name in ("manifest", "summary"):
        content = json.loads((directory / f"{name}.json").read_text())
        jsonschema.validate(content, json.loads((SCHEMAS / f"{name}.json").read_text()))
        assert content["schema_version"] == 1
        found.append(content)
    return found[0], found[1]
