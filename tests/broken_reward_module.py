"""A module whose author made a mistake: it fails while it is imported."""

CENTRE = {}["no such key"]
