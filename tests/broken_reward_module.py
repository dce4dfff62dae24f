"""A module whose author made a mistake: it fails while it is imported."""

SETTINGS: dict[str, float] = {}
SCALE = SETTINGS["scale"]
