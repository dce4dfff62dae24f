"""How the default models are made, from scikit-learn's digits alone: ``models`` trains each, ``pretrain`` joins them.
Networks and hyperparameters are in ``models.yaml``, and what the second pipeline, with attention at 8 x 8, has of its
own in ``attention.yaml``."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


def configuration(name: str = "models") -> dict[str, Any]:
    """What ``models.yaml`` says, or this with what another file has in its place: what libraries are given to build
    each untrained network, and how it is trained."""
    return _read(name)


@cache
def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    return found if name == "models" else _read("models") | found
