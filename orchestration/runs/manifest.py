"""A run's directory as what it says of itself: its manifest and summary, and the one way to act on what it holds.

Who only looks reads (:func:`read_manifest`, :func:`read_summary`). Who goes on, delivers, registers, forks or draws
opens (:func:`open_run`): nothing of a directory that this user did not begin is acted on without ``--trust``.
"""

import contextlib
import functools
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestration.runs.config import ConfigError
from orchestration.runs.seal import altered, check_seal, sealed
from pipelines.storage.atomic import DamagedFiles, read_json, remove, write_json
from pipelines.storage.locations import CHECKOUT

SCHEMA = 1  # of both; raised when a key comes to mean something else
_LARGEST = 1e300  # number that is read: what is printed has an end
SCHEMAS = Path(__file__).with_name("schemas")  # of both
_PACKAGES = ["ray", "torch", "diffusers", "transformers", "peft", "sentence-transformers", "datasets", "scikit-learn"]
_PACKAGES += ["scipy", "optuna", "mlflow", "numpy"]
_KEPT: tuple[str, ...] = ("id", "former_ids", "created", "directory", "mlflow_run_id", "mlflow_children")
_KEPT = (*_KEPT, "wall_seconds", "changes", "copied_from", "ends", "note")
# What a run leaves that has committed nothing; all of it is made again by the same command.
_BEGINNINGS = {".lock", "manifest.json", "error.txt", "mlflow.db", "artifacts", "outbox", "evaluations", "checkpoints"}
_BEGINNINGS |= {"tasks", "records", "trials", "metrics.jsonl", "spans.jsonl", "figures", "sounds", "report.html"}
_BEGINNINGS |= {"summary.json"}
LOG = "log.txt"  # the plain lines of all its sessions
_BEGINNINGS |= {LOG}
_COMMITS = {"checkpoints": "*step-*", "tasks": "*", "trials": "*"}


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a run says of itself, for who looks at it. Raises ConfigError naming the file."""
    try:
        return _checked(directory / "manifest.json")
    except DamagedFiles as error:
        raise ConfigError(f"{directory} is not a run directory: {error}; see 'ouroboros runs list'") from error


def read_summary(directory: Path) -> dict[str, Any]:
    """What came out of a run. Raises DamagedFiles naming the file."""
    return _checked(directory / "summary.json")


def _checked(path: Path) -> dict[str, Any]:
    """The content of a file that keeps to its schema."""
    content = read_json(path)
    for flaw in _schema(path.stem).iter_errors(content):
        wanted = f"not of {flaw.validator} {str(flaw.validator_value)[:80]}"
        lacking = (
            [key for key in flaw.validator_value if key not in flaw.instance] if flaw.validator == "required" else []
        )
        place = ".".join(map(str, [*flaw.absolute_path, *lacking[:1]])) or "it"
        raise DamagedFiles(f"{path} is damaged: {place} is {'missing' if lacking else wanted}")
    return content


@functools.cache
def _schema(name: str) -> Any:
    """A schema whose numbers are finite, and whose integers are written as such."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def is_number(_: object, value: object, kinds: Any = int | float) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < _LARGEST

    kinds = {"number": is_number, "integer": functools.partial(is_number, kinds=int)}
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(kinds)
    return extend(Draft202012Validator, type_checker=types)(read_json(SCHEMAS / f"{name}.json"))


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Put a manifest in place of the old one, sealed by this user."""
    manifest |= sealed(manifest)
    write_json(directory / "manifest.json", manifest)


def known_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a run; empty before it has begun."""
    return read_manifest(directory) if os.path.lexists(directory / "manifest.json") else {}


def open_run(directory: Path, trusted: bool = False) -> dict[str, Any]:
    """The manifest of a run that is to be acted on. Raises ConfigError if there is none, or if another began it or
    changed it, or links in it lead out of it, and it is not ``trusted``. What was changed is recorded in it."""
    manifest = read_manifest(directory)
    check_seal(directory, manifest, trusted)
    if not trusted:
        check_links(directory)
    if changed := altered(manifest):
        note = {"step": manifest.get("committed_step", 0), "manifest": changed}
        manifest["changes"] = [*manifest.get("changes", []), note]
    return manifest


def check_links(directory: Path) -> None:
    """Raise ConfigError if a link below ``directory`` leads out of it, or something is no file and no directory."""
    root = directory.resolve()
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ConfigError(f"{path} is a link that leads out of the run: remove it, or give --trust")
            if not (path.is_symlink() or path.is_file() or path.is_dir()):
                raise ConfigError(f"{path} is neither a file nor a directory: remove it, or give --trust")


def has_only_begun(directory: Path) -> bool:
    """Whether a directory holds nothing but what a beginning makes, by this user: no step, task or trial is kept in it,
    so the same command may be given again."""
    found = {_base(entry.name) for entry in directory.iterdir()} if directory.is_dir() else set()
    if "manifest.json" not in found:
        return ".lock" in found and found <= {".lock", LOG, "mlflow.db", "outbox"}
    kept = (path for place, form in _COMMITS.items() for path in (directory / place).glob(form))
    if not found <= _BEGINNINGS or any(map(_is_kept, kept)):
        return False
    try:
        return open_run(directory).get("status") != "FINISHED"
    except ConfigError:
        return False


def _is_kept(path: Path) -> bool:
    """Whether what lies where commits do is one, and not the real data that a MAD experiment begins with."""
    with contextlib.suppress(DamagedFiles):
        return path.parent.name != "tasks" or read_json(path / "manifest.json").get("kind") != "data"
    return False


def _base(name: str) -> str:
    """The file that a file aside or a journal of SQLite belongs to."""
    return name.removeprefix(".").removesuffix(".partial") if name.endswith(".partial") else name.split("-")[0]


def clear_beginning(directory: Path) -> None:
    """Remove what a run made that committed nothing."""
    for entry in [*directory.iterdir()] if has_only_begun(directory) else ():
        if entry.name != ".lock":
            remove(entry)


def new_manifest(loop: str, config: Any, held: Mapping[str, Any] | None = None, **about: Any) -> dict[str, Any]:
    """What a run is made of, and with what. ``held`` is the manifest of what it goes on with, if it does."""
    content = config.model_dump(mode="json")
    if (uri := content["tracking"]["uri"] or "").startswith("sqlite:///"):
        content["tracking"]["uri"] = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    here = Path.cwd()
    return {
        "schema_version": SCHEMA,
        "id": uuid.uuid4().hex,
        "name": config.name,
        "loop": loop,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "working_directory": str(here.relative_to(CHECKOUT) if here.is_relative_to(CHECKOUT) else here),
        "git_commit": git_commit(),
        "packages": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "config": content,
        **about,
        **{key: held[key] for key in _KEPT if held and key in held},
    }


@contextlib.contextmanager
def working_directory(manifest: Mapping[str, Any]) -> Iterator[None]:
    """Be where a run was started, so that its paths and modules mean what they meant; here, if that is gone."""
    place = CHECKOUT / manifest.get("working_directory", Path.cwd())
    with contextlib.chdir(place) if place.is_dir() else contextlib.nullcontext():
        yield


def original(directory: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The run that ``directory`` is a copy of; None if it is no copy, or if what it was copied from is gone: then it
    was moved."""
    place = Path(manifest.get("directory") or directory)
    try:
        is_other = place.exists() and not place.samefile(directory)
        return place if is_other and read_manifest(place).get("id") == manifest["id"] else None
    except (ConfigError, OSError):
        return None


def ids(manifest: Mapping[str, Any]) -> list[str]:
    """The ids that commits of a run may bear: its own first. Empty if it has none."""
    return [manifest["id"], *manifest.get("former_ids", [])] if manifest.get("id") else []


def git_commit() -> str:
    """The checkout's commit, with "-dirty" if it was changed; "unknown" outside git."""
    try:
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
