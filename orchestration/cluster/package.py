"""What of a working tree Ray ships to a cluster. Whatever it would wait for, follow out of the tree or stumble over is
left out, with a reason."""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# In .gitignore's language. What .gitignore names is not shipped either.
JUNK = ("/.git", "/.venv", "/venv", "/runs", "/mlruns", "/mlflow", "mlflow.db", "__pycache__", ".*_cache", ".env")


def shipped_files(tree: Path) -> tuple[dict[Path, int], dict[Path, str]]:
    """The files that go, by relative path, with their sizes, and what does not, with the reason. What ``.gitignore``
    and ``.rayignore`` name is in neither. Raises ValueError if one of those cannot be read."""
    from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

    files: dict[Path, int] = {}
    left_out: dict[Path, str] = {}

    def travel(path: Path, excludes: list[Any]) -> None:
        here, reason = path.relative_to(tree), _reason(path, tree)
        excludes = excludes if reason else [*excludes, *get_excludes_from_ignore_files(path, include_gitignore=True)]
        if any(excluded(path) for excluded in excludes):
            return
        if reason and path != tree:
            left_out[here] = reason
        elif path.is_dir():
            for below in sorted(path.iterdir()):
                travel(below, excludes)
        else:
            files[here] = path.stat().st_size

    try:
        travel(tree, [_get_excludes(tree, list(JUNK))])
    except ValueError as error:
        raise ValueError(f"a .gitignore or .rayignore of {tree} cannot be read: {error}") from error
    return files, left_out


def excludes(left_out: Iterable[Path]) -> list[str]:
    """Patterns by which Ray leaves out the same."""
    names = ("".join(letter if letter.isprintable() else "?" for letter in str(path)) for path in left_out)
    return [*JUNK, *("/" + re.sub(r"([*\[\]!#\\ ])", r"\\\1", name) for name in names)]


def _reason(path: Path, tree: Path) -> str | None:
    """Why ``path`` is not shipped; None if it is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.exists():
            return "a link to nothing"
        if target.is_dir():
            return "a link to a directory"
        if not target.is_relative_to(os.path.realpath(tree)):
            return "a link out of the tree"
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "neither a file nor a directory"
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        return "it cannot be read"
    return None
