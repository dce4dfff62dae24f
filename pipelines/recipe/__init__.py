"""How the default models are made, from scikit-learn's digits alone: one short file a model, ``pretrain``
joins them."""

from pathlib import Path
from typing import Any

import yaml


def configuration(network: str) -> dict[str, Any]:
    """What a library is given to build an untrained ``network`` of ``models.yaml``."""
    content: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
    return content[network]
