"""The tasks of a self-consuming loop."""
