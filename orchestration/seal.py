"""Whose word a run's manifest is: code is imported only by names that a person typed, here or for the job that runs.

A new run's manifest is sealed with a key that its user alone can read. What comes from elsewhere has no such seal, and
whoever goes on with it is told which code its configuration would import, before any is.
"""

import contextlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError


def seal(config: dict[str, Any]) -> str | None:
    """The seal of a configuration that was typed here; None if this user has no place for a key."""
    key = _key(make=True)
    return _digest(key, config) if key else None


def check_seal(directory: Path, manifest: dict[str, Any], trusted: bool) -> None:
    """Raise ConfigError if the run in ``directory`` names code, was not begun by this user, and is not ``trusted``."""
    key, given = _key(make=False), manifest.get("seal")
    known = key is not None and isinstance(given, str) and hmac.compare_digest(_digest(key, manifest["config"]), given)
    if trusted or known:
        return
    named = sorted(set(_imports(manifest["config"])))
    if named:
        raise ConfigError(
            f"{directory} names code to import or a server to ask ({', '.join(named)}) and was not begun by you on "
            "this machine: look at them, then give the command again with --trust"
        )


def _imports(content: Any) -> Iterator[str]:
    """Whatever could be an import path, key or value, outside of tracking's addresses, and the file of a sweep's base,
    which may name some. A module is imported before its function is looked for, so no form of the name is let through.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            if key != "tracking":
                yield from _imports(key)
                yield from [value] if key == "config" and isinstance(value, str) else _imports(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _imports(value)
    elif isinstance(content, str) and ":" in content:
        yield content


def _digest(key: bytes, config: dict[str, Any]) -> str:
    return hmac.new(key, json.dumps(config, sort_keys=True).encode(), "sha256").hexdigest()


def _key(make: bool) -> bytes | None:
    """This user's key, made the first time one is asked for; None if there is none."""
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ouroboros" / "key"
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            aside.touch(mode=0o600)
            aside.write_bytes(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(aside, path)
            aside.unlink()
        return path.read_bytes()
    except (OSError, RuntimeError):  # no such file, no room, no home
        return None
