"""How the default models are made, from scikit-learn's digits alone: ``models`` trains each, ``pretrain`` joins them.
Networks and hyperparameters are in ``models.yaml``."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def configuration() -> dict[str, Any]:
    """What ``models.yaml`` says: what libraries are given to build each untrained network, and how it is trained."""
    return yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
