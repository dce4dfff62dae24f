"""Where models come from: a directory (relative to the working directory or to the checkout) or a hub name.

Nodes of a cluster share no disk. What lies in the checkout is on each of them, as Ray ships the checkout; any other
directory has to be there already, at the same place.
"""

import os
import platform
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def find(path: str) -> Path | None:
    """The file or directory ``path`` names, or None."""
    for candidate in (Path(path).expanduser(), CHECKOUT / path):
        if os.path.exists(candidate):  # what may not be looked at is not there either
            return candidate.resolve()
    return None


def portable(path: str) -> str:
    """The name by which every node finds what ``path`` names here: ./… in its own copy of the checkout, an absolute
    path, or a hub name left as it is."""
    found = find(path)
    if found is None:
        return path
    return f"./{found.relative_to(CHECKOUT)}" if found.is_relative_to(CHECKOUT) else str(found)


def resolve_model(path: str) -> str:
    """An absolute directory, or a hub name left as it is. Raises FileNotFoundError naming this node."""
    found = find(path)
    if found is None and path.startswith(("./", "/")):
        remedy = "files that git ignores are not shipped" if path.startswith("./") else "put it on every node"
        raise FileNotFoundError(f"there is no {path} on node {platform.node()}: {remedy}, or name a model of the hub")
    return str(found) if found else path


def check_model(path: str, marker: str, what: str) -> None:
    """Raise ValueError unless ``path`` is a directory holding ``marker`` or could be a hub name that can be reached.

    Without a marker it has to be a file.
    """
    found = find(path)
    if not marker and not (found and found.is_file()):
        raise ValueError(f"{what}: there is no file {path!r}")
    if found is not None:
        if not (found / marker).is_file():
            raise ValueError(f"{what}: {found} has no {marker}; point it at a directory that save_pretrained wrote")
        return
    if not _HUB_NAME.match(path) or find(path.split("/")[0]) is not None:  # models/digts is a slip, not a hub name
        raise ValueError(f"{what}: there is no directory {path!r}")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not _is_cached(path):
        raise ValueError(
            f"{what}: there is no directory {path!r}, and as a hub name it cannot be fetched: HF_HUB_OFFLINE is set"
        )


def _is_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / ("models--" + name.replace("/", "--"))).is_dir()
