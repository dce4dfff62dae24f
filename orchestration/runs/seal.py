"""Whose word a run's manifest is, and whether it still says what was written there.

A manifest carries a digest of each of its parts, by which a change is named, and a seal over these digests, made with a
key that its user alone can read. What comes from elsewhere has no such seal, and a command that would act on it asks
for ``--trust`` first: it could name code to import, servers to ask, and files to read, send or delete.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.runs.config import ConfigError

_LASTING = "/var/tmp"  # where every user may write, and what is written outlives a restart


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest`` with its digests, and with this user's seal; without one if there is no place for a key."""
    digests = _digests(manifest)
    keys = [*_keys()] or [*_keys(make=True)]
    return manifest | {"digests": digests, "seal": _sign(keys[0], digests) if keys else None}


def check_seal(directory: Path, manifest: dict[str, Any], trusted: bool) -> None:
    """Raise ConfigError if the run in ``directory`` was not begun by this user, or its manifest was changed since it
    was written, and it is not ``trusted``. A run that has no digests is older than these: its seal is the config's."""
    digests, given = manifest.get("digests"), manifest.get("seal")
    said = manifest["config"] if digests is None else digests
    known = isinstance(given, str) and any(hmac.compare_digest(_sign(key, said), given) for key in _keys())
    if trusted:
        return
    path = directory / "manifest.json"
    if not known:
        named = sorted(_outside(manifest["config"]))
        what = f" names code to import or a server to ask ({', '.join(named)}) and" if named else ""
        raise ConfigError(
            f"{directory}{what} was not begun by you on this machine (as far as {_places()[0]} tells): look at {path}, "
            "then give the command again with --trust"
        )
    if digests is not None and (changed := differing(digests, _digests(manifest))):
        raise ConfigError(
            f"{path} was changed since the run wrote it: {', '.join(changed)}. Undo that, or give the command again "
            "with --trust to go on with it as it is"
        )


def altered(manifest: dict[str, Any]) -> list[str]:
    """The parts of a manifest that are not what was written."""
    digests = manifest.get("digests")
    return [] if digests is None else differing(digests, _digests(manifest))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two mappings differ."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _digests(manifest: dict[str, Any]) -> dict[str, str]:
    """Of each part of a manifest, and of each block of its configuration."""
    parts = {key: value for key, value in manifest.items() if key not in ("config", "digests", "seal")}
    parts |= {f"config.{key}": value for key, value in manifest["config"].items()}
    return {key: hashlib.sha256(_text(value)).hexdigest()[:16] for key, value in parts.items()}


def _outside(config: dict[str, Any]) -> set[str]:
    """Each text that could be an import path or an address, key or value, and the file of a sweep's base, which may
    name some. A module is imported before its function is looked for, so no form of the name is left out."""
    texts = [json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(config, default=str))]
    base = config.get("config")
    return {text for text in texts if ":" in text} | ({base} if isinstance(base, str) else set())


def _sign(key: bytes, content: Any) -> str:
    return hmac.new(key, _text(content), "sha256").hexdigest()


def _text(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _places() -> list[Path]:
    """Where this user's key may lie: with the user's other state, or where that cannot be written, in a directory of
    the system that lasts."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return [Path(state) / "ouroboros" / "key", Path(_LASTING) / f"ouroboros-{os.getuid()}" / "key"]


def _keys(make: bool = False) -> Iterator[bytes]:
    """This user's keys, at most one a place; with ``make`` one is made in the first place that takes it."""
    for path in _places():
        with contextlib.suppress(OSError):
            if make and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with tempfile.NamedTemporaryFile(dir=path.parent) as aside:  # readable by this user alone
                    aside.write(secrets.token_bytes(32))
                    aside.flush()
                    with contextlib.suppress(FileExistsError):  # another process was first
                        os.link(aside.name, path)
            about, parent = path.lstat(), path.parent.lstat()
            if {about.st_uid, parent.st_uid} == {os.getuid()} and not about.st_mode & 0o077:
                yield path.read_bytes()
                if make:
                    return
