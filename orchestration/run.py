"""A run's directory: its lock, its manifest, its MLflow run, its clock, and what it shows while it lives."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import psutil

from actors.worker import Span
from orchestration.config import Config, ConfigError, validate
from orchestration.display import Display
from orchestration.seal import check_seal, seal
from orchestration.tracking import Ending, Tracker, TrackingSettings, deliver_rest, open_store
from pipelines.atomic import write_json
from pipelines.locations import CHECKOUT

TEMPLATES = Path(__file__).with_name("templates")  # of what people are told
_PACKAGES = ["ray", "torch", "diffusers", "transformers", "peft", "sentence-transformers", "datasets", "scikit-learn"]
_PACKAGES += ["scipy", "optuna", "mlflow", "numpy"]
_KEPT = ("created", "mlflow_run_id", "mlflow_children", "wall_seconds")  # of the manifest, when a run goes on
_LOSSES = 3  # a run that is thrown back so often to the same place is not going to get past it
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # what a disk can refuse with


class DiskError(RuntimeError):
    """The disk takes no more of a run: it is full, over a quota, broken, or no longer ours to write."""


class Run:
    """One run of either loop, new or resumed. Leaving it closes its MLflow run with the status it ended in.

    ``total`` and ``done`` are its steps; ``shown`` goes to its display.
    """

    config: Any

    def __init__(
        self, directory: Path, config: Any, manifest: dict[str, Any], total: int, done: int = 0, **shown: Any
    ) -> None:
        self.directory = directory
        self._lock = _lock(directory)
        self.config = config
        self.manifest = manifest
        self.display = Display(f"{config.name} · {directory}", total, done, **shown)
        self.seconds_by_stage: dict[str, float] = defaultdict(float)
        self.spans: list[Span] = []  # the stages since they were last written
        self._losses: list[int] = []  # where the run stood at each loss since it last came further
        self._wall_before = manifest.get("wall_seconds", 0.0)

    def __enter__(self) -> Self:
        self.display.__enter__()
        try:
            known = self.manifest.get("mlflow_run_id")
            name, loop, say = self.directory.name, self.manifest["loop"], self.display.say
            self.tracker = Tracker(self.directory, self.config.tracking, name, known, loop, say)
            self.manifest["mlflow_run_id"] = self.tracker.run_id
            self._status("RUNNING")
            self.opened()
        except BaseException:
            self.display.__exit__(None, None, None)
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = ending(kind)
        refused = self._refused(error)
        error = refused or error
        if error is not None and status == "FAILED":
            self.manifest["error"] = f"{type(error).__name__}: {error}"
        try:
            try:  # in this order: a run that its manifest calls finished is not opened again to be closed
                self.tracker.finish(status)
            finally:
                self._status(status)
            if status != "FINISHED":
                self.display.say(f"{status.lower()}; {self.progress()}")
                self.display.say(f"go on with: ouroboros resume {self.directory}")
        except OSError as unsaid:
            if refused is None:
                raise
            self.display.say(f"warning: how the run ended could not be noted: {unsaid}; {self.progress()}")
        finally:
            self.display.__exit__(None, None, None)
            self._lock.close()
        if refused:
            raise refused

    def _refused(self, error: BaseException | None) -> DiskError | None:
        """What the disk would not take, in words; None if ``error`` is another."""
        if not isinstance(error, OSError) or error.errno not in _DISK:
            return None
        free = shutil.disk_usage(self.directory).free
        what = f"{error.filename or self.directory}: {error.strerror} ({free / 1e9:.1f} GB free)"
        return DiskError(f"{what}; the last commit stands: mend that, then 'ouroboros resume {self.directory}'")

    def introduce(self, parameters: Mapping[str, Any], tags: Mapping[str, str], note: str = "") -> None:
        """Tell MLflow what this run is."""
        common = {key: self.manifest[key] for key in ("loop", "git_commit")} | {"run_directory": str(self.directory)}
        self.tracker.describe(parameters, common | dict(tags), note)

    def opened(self) -> None:
        """What a loop does once its tracker is there."""

    def progress(self) -> str:
        """How far the run has come, in words."""
        raise NotImplementedError

    def withstand(self, lost: Exception, at: int) -> None:
        """Note a loss at ``at`` of the run's way. Raises ``lost`` if the run comes no further."""
        self._losses = [place for place in self._losses if place == at]
        if len(self._losses) == _LOSSES:
            raise lost
        self._losses.append(at)

    def _abandon(self) -> None:
        """Leave no trace of a run that could not begin, so that the same command may be given again."""
        self._lock.close()
        if not (self.directory / "manifest.json").exists():
            for begun in (".lock", "mlflow.db"):
                (self.directory / begun).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # whatever else is in there is not this run's
                self.directory.rmdir()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to a stage's account."""
        started, began = time.monotonic(), time.time()
        try:
            yield
        finally:
            self.seconds_by_stage[name] += time.monotonic() - started
            self.spans.append((name, began, time.time()))

    def wall_seconds(self) -> float:
        """Wall time of this run, from the start of the process, over all its sessions."""
        return self._wall_before + time.time() - psutil.Process().create_time()

    def summarise(self, content: Mapping[str, Any], indent: int | None = 2) -> Path:
        """Write summary.json: ``content``, and what there is to say of every run. Returns its path."""
        about = {
            "seconds_by_stage": {name: round(value, 2) for name, value in self.seconds_by_stage.items()},
            "wall_seconds": round(self.wall_seconds(), 2),
            "git_commit": self.manifest["git_commit"],
            "mlflow_run_id": self.tracker.run_id,
        }
        path = self.directory / "summary.json"
        write_json(path, {**content, **about}, indent=indent)
        return path

    def _status(self, status: Ending | Literal["RUNNING"]) -> None:
        self.manifest |= {"status": status, "wall_seconds": self.wall_seconds()}
        write_json(self.directory / "manifest.json", self.manifest)


def ending(kind: type[BaseException] | None) -> Ending:
    """The name of how a run ended, by the exception it ended with."""
    stopped = KeyboardInterrupt, SystemExit  # a person's Ctrl-C, and Ray Tune's way to end a trial
    return "FINISHED" if kind is None else "KILLED" if issubclass(kind, stopped) else "FAILED"


def check_output(output_dir: str | None) -> None:
    """Raise ValueError unless a new run can be put there."""
    if output_dir is None:
        return
    directory = Path(output_dir).expanduser()
    if (directory / "manifest.json").exists():
        raise ValueError(f"output_dir {directory} holds a run already: continue it with 'ouroboros resume {directory}'")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output_dir {directory} is not an empty directory")
    parent = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir {directory} cannot be created: {parent} is not writable")


def new_directory(config: Any, seed: str = "") -> Path:
    """Make a run's directory: the configuration's, or one under runs/ named for people. Nothing is made before."""
    name = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}{seed}"
    directory = Path(config.output_dir).expanduser() if config.output_dir else Path("runs") / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def new_manifest(loop: str, config: Any, held: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run is made of, and with what. ``held`` is the manifest of what it goes on with, if it does."""
    content = config.model_dump(mode="json")
    return {
        "name": config.name,
        "loop": loop,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "packages": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "config": content,
        "seal": seal(content),
        **{key: held[key] for key in _KEPT if held and key in held},
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a run. Raises ConfigError if ``directory`` holds none."""
    try:
        return json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} is not a run directory: no readable manifest.json; see 'ouroboros runs list'"
        ) from error


def known_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a run; empty before it has begun."""
    return read_manifest(directory) if (directory / "manifest.json").exists() else {}


def stored_config(directory: Path, schema: type[Config], trusted: bool) -> Config:
    """The configuration to go on with what ``directory`` holds. Raises ConfigError if it is a stranger's that names
    code, and not ``trusted``."""
    manifest = read_manifest(directory)
    check_seal(directory, manifest, trusted)
    return validate(schema, manifest["config"] | {"output_dir": str(directory)})


def sync(directory: Path, say: Callable[[str], None], tags: Mapping[str, str] | None = None) -> int:
    """Deliver to MLflow what a run that is over left, a sweep's with its trials'. Returns how many records are left.

    One whose process died is closed as KILLED. ``tags`` are added. Raises ConfigError if it is still being run.
    """
    manifest = read_manifest(directory)
    with contextlib.closing(_lock(directory)):
        left = sum(sync(trial.parent, say) for trial in sorted(directory.glob("trials/*/manifest.json")))
        died = manifest.get("status") == "RUNNING"
        ids = [*manifest.get("mlflow_children", {}).values(), manifest.get("mlflow_run_id")]
        news: list[dict[str, Any]] = [{"kind": "tags", "tags": dict(tags)}] if tags else []
        news += [{"kind": "status", "status": "KILLED", "timestamp_ms": int(time.time() * 1000)}] if died else []
        settings = TrackingSettings.model_validate(manifest["config"]["tracking"])
        more = [{"run": run, **each} for run in ids if run for each in news]
        left += deliver_rest(directory, settings, say, manifest.get("mlflow_run_id"), more)
        if died:
            write_json(directory / "manifest.json", manifest | {"status": "KILLED"})
    return left


def register(
    directory: Path, name: str, alias: str, say: Callable[[str], None], tags: Mapping[str, str] | None = None
) -> str:
    """Make the pipeline of a finished DDPO run a version of the MLflow model ``name``, tagged with what it gained and
    with ``tags``. Returns its models:/ address."""
    manifest, pipeline = read_manifest(directory), directory / "pipeline"
    if manifest.get("status") != "FINISHED" or not pipeline.exists():
        raise ConfigError(f"{directory} has no pipeline to register: it is not a finished DDPO run")
    sync(directory, say)
    summary = json.loads((directory / "summary.json").read_text())
    gained = {key: str(value) for key, value in summary.items() if key.endswith(("_before", "_after", "_sha256"))}
    settings = TrackingSettings.model_validate(manifest["config"]["tracking"])
    store = open_store(directory, settings)
    return store.register(name, manifest["mlflow_run_id"], "pipeline", alias, gained | dict(tags or {}))


def git_commit() -> str:
    """The checkout's commit, with "-dirty" if it was changed; "unknown" outside git."""
    try:
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def is_free(directory: Path) -> bool:
    """Whether no process is running what ``directory`` holds."""
    try:
        _lock(directory).close()
    except FileNotFoundError:  # there is nothing to run yet
        return True
    except ConfigError:
        return False
    return True


def _lock(directory: Path) -> TextIO:
    """Hold ``directory`` for this process; the system lets go of it however the process ends. Raises ConfigError."""
    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{directory} is being run by another process: wait for it or stop it") from error
    return file
