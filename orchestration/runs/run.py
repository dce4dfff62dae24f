"""A run while it lives: its lock, its MLflow run, its clock, what it shows, and how it ends."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TextIO

import psutil

from actors.worker import Span
from orchestration.runs.config import Config, ConfigError, validate
from orchestration.runs.display import Display
from orchestration.runs.manifest import (
    LOG,
    SCHEMA,
    clear_beginning,
    has_only_begun,
    ids,
    known_manifest,
    open_run,
    original,
    read_manifest,
    read_summary,
    working_directory,
    write_manifest,
)
from orchestration.tracking.store import Say, TrackingError
from orchestration.tracking.tracker import Ending, Tracker, TrackingSettings, deliver_rest, lost_runs, open_store
from pipelines.storage.atomic import DamagedFiles, not_through_a_link, remove, write_json

TEMPLATES = Path(__file__).with_name("templates")  # of what is printed
_LOSSES = 3  # a run that is thrown back so often to the same place is not going to get past it
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # what a disk can refuse with


class DiskError(RuntimeError):
    """The disk takes no more of a run: it is full, over a quota, broken, or no longer ours to write."""


class Run:
    """One run of either loop, new or resumed. Leaving it closes its MLflow run with the status it ended in.

    ``total`` and ``done`` are its steps; ``shown`` goes to its display.
    """

    config: Any
    began: ClassVar[tuple[float, float] | None] = None  # time and processor time to count from; None: as the process

    def __init__(
        self, directory: Path, config: Any, manifest: dict[str, Any], total: int, done: int = 0, **shown: Any
    ) -> None:
        self.directory = directory
        self._lock = _lock(directory)
        self.config = config
        self.manifest = manifest
        self._is_new = not (directory / "manifest.json").exists()
        self._copied_from = _own_if_copy(directory, manifest)
        self.display = Display(f"{config.name} · {directory}", total, done, **shown)
        self.display.remedy = f"ouroboros resume {directory}"
        self.seconds_by_stage: dict[str, float] = defaultdict(float)
        self.spans: list[Span] = []  # the stages since they were last written
        self._losses: list[int] = []  # where the run stood at each loss since it last came further
        self._wall_before = manifest.get("wall_seconds", 0.0)

    def __enter__(self) -> Self:
        self.display.log = self.directory / LOG
        self.display.__enter__()
        try:
            self.display.announce(self.display.title)
            if self._copied_from:
                self.display.say(f"this is a copy of {self._copied_from}: it goes on as a run of its own in MLflow")
            self.manifest.pop("error", None)
            self.manifest["directory"] = str(self.directory)
            if self._is_new:  # from here on the directory says whose it is
                self._status("RUNNING")
            known = self.manifest.get("mlflow_run_id")
            name, loop, say = self.directory.name, self.manifest["loop"], self.display.say
            self.tracker = Tracker(self.directory, self.config.tracking, name, known, loop, say, self.manifest["id"])
            self.manifest["mlflow_run_id"] = self.tracker.run_id
            self.begins_in_mlflow = self.tracker.run_id != known
            self._status("RUNNING")
            self.on_start()
            if changes := self.manifest.get("changes"):
                self.tracker.tags({f"changed/after step {each['step']}": str(each) for each in changes})
        except BaseException as error:
            if hasattr(self, "tracker"):
                Run.__exit__(self, type(error), error, error.__traceback__)
            else:
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
        self._keep_traceback(error)
        try:
            try:  # in this order: a run that its manifest calls finished is not opened again to be closed
                self.tracker.finish(status)
            finally:
                self._status(status)
            if status != "FINISHED":
                again = f"nothing is committed: {'correct it and ' * (status == 'FAILED')}give the same command again"
                self.display.say(f"{status.lower()}; {self.progress()}")
                self.display.say(again if has_only_begun(self.directory) else f"go on with: {self.display.remedy}")
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
        free = shutil.disk_usage(self.directory).free / 1e9
        return DiskError(
            f"{error.filename or self.directory}: {error.strerror} ({free:.1f} GB free); the last commit stands: mend "
            f"that, then 'ouroboros resume {self.directory}'"
        )

    def log_params(self, parameters: Mapping[str, Any], tags: Mapping[str, str], note: str = "") -> None:
        """Describe this run in MLflow."""
        common = {key: self.manifest[key] for key in ("loop", "git_commit")} | {"run_directory": str(self.directory)}
        self.tracker.describe(parameters, common | dict(tags))
        if note and self.begins_in_mlflow:
            self.write_note(note)

    def write_note(self, text: str) -> None:
        """Have MLflow show ``text`` on the run's page, in place of what was written here before, not of a person's."""
        self.tracker.describe({}, {}, text, former=self.manifest.get("note", ""))
        self.manifest["note"] = text

    def on_start(self) -> None:
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

    def _keep_traceback(self, error: BaseException | None) -> None:
        """Write error.txt, with where the run was when it ended; nothing is left of a run that went well."""
        path = self.directory / "error.txt"
        with contextlib.suppress(OSError):
            remove(path)
            if error is not None:
                path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
                self.display.say(f"where it was: {path}")

    def _abandon(self) -> None:
        """Leave no trace of a run that could not begin, so that the same command may be given again."""
        if self._is_new:
            clear_beginning(self.directory)
            remove(self.directory / ".lock")  # while it is held: who waits for it looks whether it is still there
            with contextlib.suppress(OSError):  # whatever else is in there is not this run's
                self.directory.rmdir()
        self._lock.close()

    @staticmethod
    def begins_now() -> None:
        """Leave what this process did so far out of the time of the next run."""
        Run.began = time.time(), time.process_time()

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
        """Wall time of this run, over all its sessions."""
        return self._wall_before + time.time() - (self.began[0] if self.began else psutil.Process().create_time())

    def summarise(self, content: Mapping[str, Any], indent: int | None = 2) -> Path:
        """Write summary.json: ``content``, and what there is to say of every run. Returns its path."""
        about = {
            "seconds_by_stage": {name: round(value, 2) for name, value in self.seconds_by_stage.items()},
            "wall_seconds": round(self.wall_seconds(), 2),
            "git_commit": self.manifest["git_commit"],
            "mlflow_run_id": self.tracker.run_id,
        }
        path = self.directory / "summary.json"
        write_json(path, {"schema_version": SCHEMA, **content, **about}, indent=indent)
        return path

    def _status(self, status: Ending | Literal["RUNNING"]) -> None:
        self.manifest |= {"status": status, "wall_seconds": self.wall_seconds()}
        write_manifest(self.directory, self.manifest)


def ending(kind: type[BaseException] | None) -> Ending:
    """The name of how a run ended, by the exception it ended with."""
    stopped = KeyboardInterrupt, SystemExit  # a person's Ctrl-C, and Ray Tune's way to end a trial
    return "FINISHED" if kind is None else "KILLED" if issubclass(kind, stopped) else "FAILED"


def check_output(output_dir: str | None) -> None:
    """Raise ValueError unless a new run can be put there."""
    if output_dir is None:
        return
    if has_only_begun(directory := Path(output_dir).expanduser()):
        return
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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be created ({error.strerror}): set output_dir to another place"
        ) from error
    if has_only_begun(directory):
        begun = known_manifest(directory)
        if begun.get("status") == "RUNNING" and original(directory, begun) is None:
            sync(directory, lambda _: None)  # it was killed: MLflow is not to show it as running for ever
        with contextlib.closing(_lock(directory)):
            clear_beginning(directory)
    return directory.resolve()


@contextlib.contextmanager
def going_on(directory: Path, schema: type[Config], trusted: bool) -> Iterator[tuple[dict[str, Any], Config]]:
    """The manifest and the configuration to go on with what ``directory`` holds, where it was begun. Raises ConfigError
    if it is a stranger's and not ``trusted``."""
    directory = directory.resolve()
    manifest = open_run(directory, trusted)
    with working_directory(manifest):
        yield manifest, validate(schema, manifest["config"] | {"output_dir": str(directory)})


def sync(directory: Path, say: Say, tags: Mapping[str, str] | None = None, trusted: bool = False) -> int:
    """Deliver to MLflow what a run that is over left, a sweep's with its trials'. Returns how many records are left.

    One whose process died is closed as KILLED. ``tags`` are added. Raises ConfigError if it is still being run, is a
    copy, or is a stranger's and not ``trusted``.
    """
    directory = directory.resolve()
    manifest = open_run(directory, trusted)
    if (source := original(directory, manifest)) is not None:
        raise ConfigError(f"{directory} is a copy of {source}, whose run in MLflow it is: sync that")
    with contextlib.closing(_lock(directory)):
        left = sum(sync(trial.parent, say, None, trusted) for trial in sorted(directory.glob("trials/*/manifest.json")))
        died = manifest.get("status") == "RUNNING"
        root = manifest.get("mlflow_run_id")
        known = {*manifest.get("mlflow_children", {}).values(), root} - {None}
        if died:
            try:
                lost = lost_runs(directory, _tracking(manifest), manifest["loop"], manifest.get("id", ""))
                root, known = root or next(iter(lost), None), {*known, *lost}
            except TrackingError as error:
                say(f"warning: {error}")
                left += 1
        news: list[dict[str, Any]] = [{"kind": "tags", "tags": dict(tags)}] if tags else []
        news += [{"kind": "status", "status": "KILLED", "timestamp_ms": int(time.time() * 1000)}] if died else []
        more = [{"run": run, **each} for run in known for each in news]
        left += deliver_rest(directory, _tracking(manifest), say, root, more)
        if died and not left:
            write_manifest(directory, manifest | {"status": "KILLED"})
    return left


def register(
    directory: Path, name: str, alias: str, say: Say, tags: Mapping[str, str] | None = None, trusted: bool = False
) -> str:
    """Make the pipeline of a finished DDPO run a version of the MLflow model ``name``, tagged with what it gained and
    with ``tags``. Returns its models:/ address. Raises ConfigError if it is a stranger's and not ``trusted``."""
    directory = directory.resolve()
    if read_manifest(directory).get("status") != "FINISHED" or not (directory / "pipeline").exists():
        raise ConfigError(f"{directory} has no pipeline to register: it is not a finished DDPO run")
    manifest = open_run(directory, trusted)
    sync(directory, say, None, trusted)
    try:
        summary = read_summary(directory)
    except DamagedFiles as error:
        raise ConfigError(f"{directory} cannot be registered: {error}") from error
    gained = {key: str(value) for key, value in summary.items() if key.endswith(("_before", "_after", "_sha256"))}
    store = open_store(directory, _tracking(manifest))
    return store.register(name, manifest["mlflow_run_id"], "pipeline", alias, gained | dict(tags or {}))


def _tracking(manifest: Mapping[str, Any]) -> TrackingSettings:
    return validate(TrackingSettings, manifest["config"].get("tracking", {}))


def _own_if_copy(directory: Path, manifest: dict[str, Any]) -> str | None:
    """Make a copied directory, and its trials', a run of its own, to begin anew in MLflow: what waits there for the
    original's run is the original's to deliver. Returns where the original is; None if this is no copy."""
    source = original(directory, manifest)
    if source is None:
        return None
    for trial in sorted(directory.glob("trials/*/manifest.json")):
        copied = open_run(trial.parent)
        _own_if_copy(trial.parent, copied)
        write_manifest(trial.parent, copied)
    remove(directory / "outbox")
    for key in ("mlflow_run_id", "mlflow_children"):
        manifest.pop(key, None)
    manifest |= {"former_ids": ids(manifest), "id": uuid.uuid4().hex}
    manifest |= {"copied_from": str(source), "directory": str(directory)}
    return str(source)


def is_free(directory: Path) -> bool:
    """Whether no process is running what ``directory`` holds."""
    with contextlib.suppress(OSError):  # it may not be looked at, or is no file: no run holds it
        try:
            if os.path.lexists(directory / ".lock"):
                _lock(directory).close()
        except ConfigError:
            return False
    return True


def _lock(directory: Path) -> TextIO:
    """Hold ``directory`` for this process; the system lets go of it however the process ends. Raises ConfigError."""
    path = directory / ".lock"
    while True:
        try:
            file = open(path, "a", encoding="utf-8", opener=not_through_a_link)  # noqa: SIM115
        except PermissionError as error:
            raise ConfigError(
                f"{directory} cannot be written to ({error.strerror}): go on with a copy of it"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ConfigError(f"{directory} is being run by another process: wait for it or stop it") from error
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()  # a run that could not begin took it away in the meantime
