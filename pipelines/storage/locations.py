"""Where models come from: a directory (relative to the working directory or to the checkout) or a hub name.

Nodes of a cluster share no disk. What lies in the checkout is on each of them, as Ray ships the checkout; any other
directory has to be there already, at the same place.
"""

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
_UNREAD = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}  # of a model: only safetensors are loaded
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def find(path: str) -> Path | None:
    """The file or directory ``path`` names, or None."""
    for candidate in (Path(path).expanduser(), CHECKOUT / path) if path else ():
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


def fingerprint(path: str, known: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """What identifies what ``path`` names: its ``path`` on any day, the ``sha256`` of its content (of a hub model, its
    commit; None if there is nothing), and a ``stamp`` that changes with its files' sizes and times of change.

    What has the stamp of ``known`` is not read again. Of a directory, every file counts that models are loaded from.
    """
    found = find(path)
    if found is None:
        return {"path": path, "sha256": _hub_commit(path), "stamp": None}
    place = portable(path).removeprefix("./")
    files = [found] if found.is_file() else sorted(p for p in found.rglob("*") if p.is_file() and _is_read(p, found))
    about = {str(each.relative_to(found)): each.stat() for each in files}
    listed = "\n".join(f"{name} {each.st_size} {each.st_ctime_ns} {each.st_ino}" for name, each in about.items())
    stamp = hashlib.sha256(f"{found}\n{listed}".encode()).hexdigest()[:16]
    if known and known.get("stamp") == stamp:
        return {"path": place, "sha256": known["sha256"], "stamp": stamp}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads work
        digests = [*pool.map(_file_digest, files)]
    if found.is_file():
        return {"path": place, "sha256": digests[0], "stamp": stamp}
    whole = "\n".join(f"{name} {digest}" for name, digest in zip(about, digests, strict=True))
    return {"path": place, "sha256": hashlib.sha256(whole.encode()).hexdigest(), "stamp": stamp}


def _is_read(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
    return path.suffix not in _UNREAD and not hidden


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_commit(name: str) -> str | None:
    """The commit that a hub name stands for, asked of the hub or, without it, of what was fetched; None: unknown."""
    from huggingface_hub import HfApi, constants

    if not _HUB_NAME.match(name):
        return None
    with contextlib.suppress(Exception):  # the hub and its transport fail in their own ways
        if not constants.HF_HUB_OFFLINE:
            return HfApi().model_info(name, timeout=10).sha
    with contextlib.suppress(OSError):
        return (Path(constants.HF_HUB_CACHE) / _cache_name(name) / "refs" / "main").read_text(encoding="utf-8").strip()
    return None


def _cache_name(name: str) -> str:
    return "models--" + name.replace("/", "--")


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

    return (Path(HF_HUB_CACHE) / _cache_name(name)).is_dir()
