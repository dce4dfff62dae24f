"""One run in MLflow: opened once, continued after a resume, closed with the name of how it ended.

A new run needs its store at the start, and asks for it a while. From then on everything goes through an outbox in the
run's directory, so a server that is away holds up nothing and loses nothing, and what is said again after a resume is
there once.
"""

import contextlib
import copy
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from orchestration.tracking.delivery import Delivery
from orchestration.tracking.outbox import Content, Outbox, undelivered
from orchestration.tracking.store import KEY, MlflowStore, Refused, Say, TrackingError, settle
from policies.rl.settings import OF_THE_PROGRAM, Settings

Ending = Literal["FINISHED", "KILLED", "FAILED"]

_MONITOR_SECONDS = 5  # between two system metrics
_NEW_SECONDS, _KNOWN_SECONDS = 20.0, 3.0  # a store is asked so long whether it takes a new run, a known one
_GOODBYE_SECONDS = 3  # at the end of a run, the longest wait for a server that does not answer
_STOP_SECONDS = 5.0  # after Ctrl-C, the longest wait for what is still to be delivered
_DONE_SECONDS = 30.0  # after the end, the longest wait for the next part of it
FIRST_LOOK = "A first look"  # what matters most: a name that MLflow sorts before all others, whatever their case
_VIEW = "?workflowType=machine_learning"  # without it, MLflow shows a new visitor its pages for agents, which are empty
_NOTES = Path(__file__).with_name("notes")  # what MLflow shows of each experiment
_KEY_IN_FILE = 100  # characters of an image's key in the names of its files
_SMALL = 256  # pixels: what MLflow shows of an image before it is asked for all of it


class TrackingSettings(Settings):
    """Where a run is recorded."""

    model_config = ConfigDict(hide_input_in_errors=True)

    uri: str | None = Field(None, description="http://server or sqlite:///file; null: SQLite in the run directory")
    experiment: str | None = Field(default=None, min_length=1, description="MLflow's; null: the loop's name")
    system_metrics: bool = Field(default=True, description="record the driver machine's processor, memory and GPU")
    parent: str | None = Field(default=None, json_schema_extra=OF_THE_PROGRAM)  # of a sweep's trials: its MLflow run

    @field_validator("uri")
    @classmethod
    def _same_from_everywhere(cls, uri: str | None) -> str | None:
        """A run is resumed from other directories than the one it was begun in."""
        path = (uri or "").removeprefix("sqlite:///")
        return uri if path in ("", uri) else f"sqlite:///{Path(path).absolute()}"

    @model_validator(mode="after")
    def _can_be_used(self) -> Self:
        """Of the whole block: an error of ``uri`` alone would be shown with its value, which may hold a password."""
        if self.uri and names_user(self.uri):
            raise ValueError(
                "uri is shown and stored, so it may hold no user and password: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD where the run starts"
            )
        if self.uri is not None and not re.match(r"https?://[^/]|sqlite:///.", self.uri):
            raise ValueError(
                f"uri {self.uri!r} is neither a server (http://host:port) nor a database (sqlite:///path/mlflow.db)"
            )
        return self


class Tracker:
    """One MLflow run, the same one before and after a resume.

    ``directory`` is the run directory; ``run_id`` continues a run that is already in the store, or begins another in
    its place if it was deleted there; ``loop`` names the experiment unless the settings do; ``key`` is the run's own
    name, by which the store's runs of it are found whose ids were lost on the way; ``say`` reports a store that is
    away. Raises TrackingError if a new run's store cannot be reached; a known run goes on without it.
    """

    def __init__(
        self,
        directory: Path,
        settings: TrackingSettings,
        run_name: str,
        run_id: str | None = None,
        loop: str = "ddpo",
        say: Say = lambda _: None,
        key: str = "",
    ) -> None:
        self._directory, self._say = directory, say
        self._store = open_store(directory, settings)
        self.uri = self._store.uri
        note = _NOTES / f"{loop}.md"
        described = note.read_text("utf-8").strip().format(first_look=FIRST_LOOK) if note.exists() else None
        self._experiment, self._experiment_id = (settings.experiment or loop, described), ""
        self._key = key or uuid.uuid4().hex
        self._is_away, self._is_root, self._may_be_there = False, True, bool(key)
        self._open(run_name, settings.parent, run_id)
        if run_id not in (None, self.run_id):
            say(f"warning: MLflow at {self.uri} has no run {run_id} any longer: going on in a new one, {self.run_id}")
        self._delivery = Delivery(self._store, directory, self.run_id)
        self._outbox = Outbox(directory / "outbox", self._delivery, say)
        self._put("status", status="RUNNING", timestamp_ms=_now())
        self._monitor = _SystemMetrics(self, self._outbox.began) if settings.system_metrics else None

    def child(self, name: str, run_id: str | None = None) -> "Tracker":
        """A run below this one in the same store, new or continued. Close it with :meth:`finish`, as any."""
        child = copy.copy(self)
        child._monitor, child._is_root = None, False
        child._may_be_there = self._was_there
        # What is below a run that was deleted is not below its successor.
        child._open(name, self.run_id, run_id if self._is_known else None)
        self._delivery.admit(child.run_id)
        child._put("status", status="RUNNING", timestamp_ms=_now())
        return child

    def _open(self, name: str, parent: str | None, run_id: str | None) -> None:
        """Find the run, or make one. A known run whose store is away is not waited for."""
        self.run_id, self._finished, self._was_there = run_id or "", False, run_id is not None

        def attempt() -> None:
            found = self._store.find(run_id) if run_id else None
            if found is None:
                self._experiment_id = self._experiment_id or self._store.experiment(*self._experiment)
                self._was_there = False
                found = self._new(name, parent)
            self.run_id, self._experiment_id = str(found.info.run_id), found.info.experiment_id

        if not (self._is_away and run_id):
            patience = _NEW_SECONDS if self._store.is_server and run_id is None else _KNOWN_SECONDS
            try:
                self._store.insist(f"opening {name}", attempt, self._say, patience)
            except TrackingError as error:
                if run_id is None or isinstance(error, Refused):
                    raise
                self._is_away = True  # so those below it are not asked for one by one
        self._is_known = self.run_id == run_id  # and what hangs below it, too

    def _new(self, name: str, parent: str | None) -> Any:
        """Make a run, unless it was made before and its id was lost: with the answer, or with the process."""
        from mlflow.tracking.context.registry import resolve_tags

        if self._may_be_there:
            for found in self._store.runs_of(self._key, self._experiment_id):
                if found.info.run_name == name and found.data.tags.get("mlflow.parentRunId") == parent:
                    self._was_there = True
                    return found
        self._may_be_there = True
        tags = resolve_tags({KEY: self._key} | ({"mlflow.parentRunId": parent} if parent else {}))  # and who, and where
        return self._store.client.create_run(self._experiment_id, run_name=name, tags=tags)

    def describe(
        self, parameters: Mapping[str, Any], tags: Mapping[str, str], note: str = "", former: str = ""
    ) -> None:
        """Record what the run is: ``parameters`` under dotted names, and ``tags``.

        MLflow's parameters cannot change: one that differs from what the run holds (a resume on another
        machine) is recorded as the tag ``changed/<name>``. ``note`` is its description unless a person wrote one;
        it takes the place of the ``former`` note.
        """
        self._put("describe", parameters=flatten(parameters), tags=dict(tags), note=note, former=former)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of what they said."""
        self._put("tags", tags=dict(tags))

    def metrics(self, step: int, values: Mapping[str, float], timestamp_ms: int) -> None:
        """Record a step's numbers. Once recorded they stand: the same names at the same step again add nothing."""
        self.many_metrics([(step, values, timestamp_ms)])

    def many_metrics(self, steps: Sequence[tuple[int, Mapping[str, float], int]]) -> None:
        """Record (step, values, timestamp_ms) of many steps at once."""
        records = []
        for step, values, timestamp_ms in steps:
            names = sha256("\n".join(sorted(values)).encode()).hexdigest()[:12]
            numbers = {name: float(value) for name, value in values.items()}
            record = {"run": self.run_id, "kind": "metrics", "once": f"metrics {step} {names}", "step": step}
            records += [record | {"values": numbers, "timestamp_ms": timestamp_ms}] if values else []
        self._outbox.put(*records)

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Put ``image`` (height, width, 3) uint8 on the dashboard's step slider, unless the step has one."""
        once = f"image {key} {step}"
        if self._outbox.knows(self.run_id, once):
            return
        from PIL import Image

        name = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.run_id} {once}")
        safe = re.sub(r"[^\w\-. ]", "~", key, flags=re.ASCII)[:_KEY_IN_FILE]
        stem = f"{safe}+step+{step}+timestamp+{_now()}+{name}"  # as MLflow's log_image
        picture = Image.fromarray(image)
        picture.save(self._outbox.directory / f"{stem}.png")
        picture.thumbnail((_SMALL, _SMALL))
        picture.save(self._outbox.directory / f"{stem}+compressed.webp")
        self._put("image", once=once, files=[f"{stem}.png", f"{stem}+compressed.webp"])

    def artifact(self, path: Path, under: str = "") -> None:
        """Store a file or a directory of the run's as ``under/<its name>``, in place of what was there."""
        inside = Path(os.path.relpath(path, self._directory))
        if ".." in inside.parts or not path.exists():
            place = f"there is no {path} in the run's directory {self._directory}"
            raise TrackingError(f"MLflow at {self.uri}: artifact {path.name} failed: {place}")
        self._put("artifact", path=inside.as_posix(), under=under)

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record what was trained on: ``digest`` identifies it, ``source`` is its place, ``profile`` what it holds."""
        once = f"dataset {name} {digest}"
        self._put("dataset", once=once, name=name, digest=digest, source=source, profile=dict(profile))

    def drain(self, patience: float = _DONE_SECONDS) -> bool:
        """Wait until MLflow knows all, or heard nothing for ``patience`` seconds. Returns whether it knows all."""
        return self._outbox.drain(patience)

    def finish(self, status: Ending) -> None:
        """Close the run; if it is no child, deliver what waits, or say that it waits. Only the first call counts.

        After Ctrl-C it takes seconds, whatever waits and even if the server is away.
        """
        if self._finished:
            return
        self._finished = True
        if self._monitor is not None:
            self._monitor.end()
        self._put("status", status=status, timestamp_ms=_now())
        if not self._is_root:
            return
        with contextlib.suppress(TrackingError):  # the outbox has said so, and what waits is said below
            self._store.check(_GOODBYE_SECONDS)
            most = float("inf") if status == "FINISHED" else _STOP_SECONDS
            self._outbox.drain(min(_DONE_SECONDS, most), most)
        self._outbox.close()
        if refused := self._outbox.refused:
            self._say(f"{refused} records could not be delivered; again: ouroboros sync {self._directory}")
        if waiting := self._outbox.waiting:
            self._say(f"{waiting} records wait for MLflow; deliver: ouroboros sync {self._directory}")

    @property
    def page(self) -> str:
        """The run's page, by its place at a server; empty while MLflow has not said which it is."""
        return f"#/experiments/{self._experiment_id}/runs/{self.run_id}" if self._experiment_id else ""

    def open_command(self) -> str:
        """What opens the run's page: its address at a server, or first the command that serves this store."""
        if self._store.is_server:
            return f"{self.uri}/{self.page}{_VIEW}"
        words = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", self.uri]
        # MLflow's own numbers of processes, some of them for jobs that nobody gives it, take a minute to start.
        program = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(words)} --workers 1"
        return f"{program} --host 127.0.0.1 --port 5000\n           then http://127.0.0.1:5000/{self.page}{_VIEW}"

    def _put(self, kind: str, **content: Any) -> None:
        self._outbox.put({"run": self.run_id, "kind": kind, **content})


class _SystemMetrics(threading.Thread):
    """The machine's processor, memory, disk, network and GPU, every few seconds, by MLflow's own collectors."""

    def __init__(self, tracker: Tracker, began: float) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        super().__init__(name="SystemMetrics", daemon=True)
        self._tracker, self._began, self._ended = tracker, began, threading.Event()
        # MLflow's own thread gives up for good at the first answer that does not come.
        interval, uri = _MONITOR_SECONDS, tracker.uri
        self._source: Any = SystemMetricsMonitor(tracker.run_id, sampling_interval=interval, tracking_uri=uri)
        self.start()

    def run(self) -> None:
        interval = self._source.sampling_interval
        while not self._ended.wait(interval):
            self._source.collect_metrics()
            values = {f"system/{name}": value for name, value in self._source.aggregate_metrics().items()}
            for monitor in self._source.monitors:
                monitor.clear_metrics()
            with contextlib.suppress(OSError):  # on a full disk the run itself has more to say
                self._tracker.metrics(int((time.time() - self._began) / interval), values, _now())

    def end(self) -> None:
        self._ended.set()
        self.join(_GOODBYE_SECONDS)


def deliver_rest(
    directory: Path, settings: TrackingSettings, say: Say, run_id: str | None, more: Sequence[Content] = ()
) -> int:
    """Deliver what the outbox of a run that is over still holds, once more what was refused, and ``more``. ``run_id``
    is the run in MLflow. Returns how many records are left, refused ones among them."""
    if run_id is None or not (more or undelivered(directory / "outbox", "refused")):
        _settle(directory, settings)
        return 0
    delivery = Delivery(open_store(directory, settings), directory, run_id)
    outbox = Outbox(directory / "outbox", delivery, say, again=True)
    outbox.put(*more)
    outbox.drain(_DONE_SECONDS)
    outbox.close()
    return outbox.waiting + outbox.refused


def lost_runs(directory: Path, settings: TrackingSettings, loop: str, key: str) -> list[str]:
    """Ids of the runs that MLflow calls running of the run with ``key``, whether or not its directory knows of them:
    first its own, then those below it. Raises TrackingError if the store cannot be asked."""
    store = open_store(directory, settings)

    def attempt() -> list[str]:
        experiment = store.client.get_experiment_by_name(settings.experiment or loop)
        found = store.runs_of(key, experiment.experiment_id) if experiment else []
        own_first = sorted(found, key=lambda each: each.data.tags.get("mlflow.parentRunId") != settings.parent)
        return [each.info.run_id for each in own_first if each.info.status == "RUNNING"]

    return store.insist("looking for the run", attempt, lambda _: None, _KNOWN_SECONDS)


def open_store(directory: Path, settings: TrackingSettings) -> MlflowStore:
    """The store of a run in ``directory``: a server, or a database whose folder is made if need be."""
    if settings.uri and settings.uri.startswith("http"):
        return MlflowStore(settings.uri.rstrip("/"))
    database = _settle(directory, settings) or Path((settings.uri or "").removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowStore(f"sqlite:///{database}")


def _settle(directory: Path, settings: TrackingSettings) -> Path | None:
    """The database in a run's directory, or for a sweep's trial in the sweep's, with what it says of places set right
    if the directory was moved; None if the run keeps none."""
    if settings.uri is not None:
        return None
    home = directory.resolve()
    if settings.parent and home.parent.name == "trials" and (home.parents[1] / "records").is_dir():
        home = home.parents[1]
    settle(home / "mlflow.db")
    return home / "mlflow.db"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def names_user(uri: str) -> bool:
    """Whether ``uri`` names a user, as in http://user:password@host."""
    return "@" in urlsplit(uri).netloc


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)
