"""The tests: plain functions, run with ``python -m pytest``."""
