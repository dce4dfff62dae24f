"""``python -m orchestration.cli``, as ``ouroboros``."""

from orchestration.cli.main import program

program()
