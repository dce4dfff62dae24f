"""Where models come from: a directory (relative to the working directory or to the checkout) or a hub name."""

import os
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def find(path: str) -> Path | None:
    """The file or directory ``path`` names, or None."""
    for candidate in (Path(path).expanduser(), CHECKOUT / path):
        if candidate.exists():
            return candidate.resolve()
    return None


def resolve_model(path: str) -> str:
    """An absolute directory, or a hub name left as it is."""
    found = find(path)
    return str(found) if found else path


def check_model(path: str, marker: str, what: str) -> None:
    """Raise ValueError unless ``path`` is a directory holding ``marker`` or could be a hub name that can be reached."""
    found = find(path)
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
