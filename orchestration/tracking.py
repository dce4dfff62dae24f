"""One run in MLflow: opened once, continued after a resume, closed with the name of how it ended.

A new run needs its store at the start. From then on everything goes through an outbox in the run's directory, so a
server that is away holds up nothing and loses nothing, and what is said again after a resume is there once.
"""

import contextlib
import copy
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from orchestration.mlflow_store import MlflowStore, TrackingError
from orchestration.outbox import Outbox, Record, undelivered
from policies.settings import Settings

Ending = Literal["FINISHED", "KILLED", "FAILED"]

_MONITOR_SECONDS = 5  # between two system metrics
_GOODBYE_SECONDS = 3  # at the end of a run, the longest wait for a server that does not answer
_STOP_SECONDS = 5.0  # after Ctrl-C, the longest wait for what is still to be delivered
_DONE_SECONDS = 30.0  # after the end, the longest wait for the next part of it
FIRST_LOOK = "A first look"  # what matters most: a name that MLflow sorts before all others, whatever their case
_VIEW = "?workflowType=machine_learning"  # without it, MLflow shows a new visitor its pages for agents, which are empty
_LOOK = f"look at *Model metrics* first, which begin with *{FIRST_LOOK}*, and at `report.html` among the artifacts"
_EXPERIMENTS = {
    "ddpo": f"**DDPO**: a reward teaches a diffusion model. Of a run, {_LOOK}. Filter by `tags.reward`, `tags.model`.",
    "mad": "**MAD**: generators trained on their own samples. Below a run are its arms', below these their seeds'. "
    f"Of an arm, {_LOOK} of its experiment. Filter by `tags.goes_mad`, `tags.rule`, `tags.family`.",
    "sweep": "**Sweeps**: below a run are its trials'. Compare these by their parameters.",
}
_SMALL = 256  # pixels: what MLflow shows of an image before it is asked for all of it


class TrackingSettings(Settings):
    """Where a run is recorded."""

    model_config = ConfigDict(hide_input_in_errors=True)

    uri: str | None = Field(None, description="http://server or sqlite:///file; null: SQLite in the run directory")
    experiment: str | None = Field(default=None, min_length=1, description="null: the loop's name")
    system_metrics: bool = Field(default=True, description="record the driver machine's processor, memory and GPU")
    parent: str | None = Field(default=None, description="MLflow run that this one is listed below; sweeps set it")

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

    ``directory`` is the run directory; ``run_id`` continues a run that is already in the store; ``loop`` names the
    experiment unless the settings do; ``say`` tells people of a store that is away. Raises TrackingError if a new run's
    store cannot be reached, or a known run's store does not know it; one whose server is away goes on without it.
    """

    def __init__(
        self,
        directory: Path,
        settings: TrackingSettings,
        run_name: str,
        run_id: str | None = None,
        loop: str = "ddpo",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory, self._say = directory, say
        self._store = open_store(directory, settings)
        self.uri = self._store.uri
        self._experiment_id = ""
        try:
            self._store.check()
        except TrackingError:
            if run_id is None:
                raise
        else:
            with self._store.named("opening the store"):
                if run_id is None:
                    self._experiment_id = self._store.experiment(settings.experiment or loop, _EXPERIMENTS.get(loop))
                    run_id = self._new(run_name, settings.parent)
                self._experiment_id = self._store.client.get_run(run_id).info.experiment_id
        self._outbox = Outbox(directory / "outbox", self._store.deliver, say)
        self._begin(run_id)
        self._monitor = _SystemMetrics(self) if settings.system_metrics else None

    def child(self, name: str, run_id: str | None = None) -> "Tracker":
        """A run below this one in the same store, new or continued. Close it with :meth:`finish`, as any."""
        child = copy.copy(self)
        child._monitor = None
        if run_id is None:
            with self._store.named(f"opening {name}"):
                run_id = child._new(name, self.run_id)
        child._begin(run_id)
        child._is_root = False
        return child

    def _new(self, name: str, parent: str | None) -> str:
        from mlflow.tracking.context.registry import resolve_tags

        tags = resolve_tags({"mlflow.parentRunId": parent} if parent else None)  # and who started it, and where
        return str(self._store.client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id)

    def _begin(self, run_id: str) -> None:
        self.run_id = run_id
        self._is_root = True
        self._finished = False
        self._put("status", status="RUNNING", timestamp_ms=_now())

    def describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str], note: str = "") -> None:
        """Record what the run is: ``parameters`` under dotted names, and ``tags``.

        MLflow's parameters cannot change: one that differs from what the run holds (a resume on another
        machine) is recorded as the tag ``changed/<name>``. ``note`` is its description unless somebody wrote one.
        """
        self._put("describe", parameters=flatten(parameters), tags=dict(tags), note=note)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of what they said."""
        self._put("tags", tags=dict(tags))

    def metrics(self, step: int, values: Mapping[str, float], timestamp_ms: int) -> None:
        """Record a step's numbers. Once told they stand: the same names at the same step again add nothing."""
        self.many_metrics([(step, values, timestamp_ms)])

    def many_metrics(self, steps: Sequence[tuple[int, Mapping[str, float], int]]) -> None:
        """Record (step, values, timestamp_ms) of many steps at once."""
        records = []
        for step, values, timestamp_ms in steps:
            if values:
                once = f"metrics {step} {_digest(*sorted(values))}"
                numbers = {name: float(value) for name, value in values.items()}
                record = {"run": self.run_id, "kind": "metrics", "once": once, "step": step, "values": numbers}
                records.append(record | {"timestamp_ms": timestamp_ms})
        self._outbox.put(*records)

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Put ``image`` (height, width, 3) uint8 on the dashboard's step slider, unless the step has one."""
        once = f"image {key} {step}"
        if self._outbox.knows(self.run_id, once):
            return
        from PIL import Image

        name = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.run_id} {once}")
        safe = re.sub(r"[^\w\-. ]", "~", key, flags=re.ASCII)
        stem = str(self._outbox.directory / f"{safe}+step+{step}+timestamp+{_now()}+{name}")  # as MLflow's log_image
        picture = Image.fromarray(image)
        picture.save(f"{stem}.png")
        picture.thumbnail((_SMALL, _SMALL))
        picture.save(f"{stem}+compressed.webp")
        self._put("image", once=once, files=[f"{stem}.png", f"{stem}+compressed.webp"])

    def artifact(self, path: Path, under: str = "") -> None:
        """Store a file or a directory as ``under/<its name>``, in place of what was there."""
        if not path.exists():
            raise TrackingError(f"MLflow at {self.uri}: artifact {path.name} failed: there is no {path}")
        self._put("artifact", path=str(path.absolute()), under=under)

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
        try:
            self._store.check(_GOODBYE_SECONDS)
            most = float("inf") if status == "FINISHED" else _STOP_SECONDS
            self._outbox.drain(min(_DONE_SECONDS, most), most)
        except TrackingError:
            pass  # the outbox has told, and what waits is told below
        self._outbox.close()
        if self._outbox.waiting:
            self._say(f"{self._outbox.waiting} records wait for MLflow; deliver: ouroboros sync {self._directory}")

    def open_command(self) -> str:
        """What opens the dashboard: the run's page on a server, or the command that serves this store."""
        if self._store.is_server:
            return f"{self.uri}/#/experiments/{self._experiment_id}/runs/{self.run_id}{_VIEW}"
        program = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", self.uri])
        return f"{program} --host 127.0.0.1 --port 5000"

    def _put(self, kind: str, **content: Any) -> None:
        self._outbox.put({"run": self.run_id, "kind": kind, **content})


class _SystemMetrics(threading.Thread):
    """The machine's processor, memory, disk, network and GPU, every few seconds, by MLflow's own collectors."""

    def __init__(self, tracker: Tracker) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        super().__init__(name="SystemMetrics", daemon=True)
        self._tracker, self._ended = tracker, threading.Event()
        # MLflow's own thread gives up for good at the first answer that does not come.
        self._source: Any = SystemMetricsMonitor(
            tracker.run_id, sampling_interval=_MONITOR_SECONDS, tracking_uri=tracker.uri
        )
        self.start()

    def run(self) -> None:
        while not self._ended.wait(self._source.sampling_interval):
            self._source.collect_metrics()
            values = {f"system/{name}": value for name, value in self._source.aggregate_metrics().items()}
            for monitor in self._source.monitors:
                monitor.clear_metrics()
            step = int((time.time() - self._tracker._outbox.began) / self._source.sampling_interval)
            with contextlib.suppress(OSError):  # on a full disk the run itself has more to say
                self._tracker.metrics(step, values, _now())

    def end(self) -> None:
        self._ended.set()
        self.join(_GOODBYE_SECONDS)


def deliver_rest(
    directory: Path, settings: TrackingSettings, say: Callable[[str], None], more: Sequence[Record] = ()
) -> int:
    """Deliver what the outbox of a run that is over still holds, and ``more``. Returns how many records are left."""
    if not more and not undelivered(directory / "outbox"):
        return 0
    store = open_store(directory, settings)
    outbox = Outbox(directory / "outbox", store.deliver, say)
    outbox.put(*more)
    outbox.drain(_DONE_SECONDS)
    outbox.close()
    return outbox.waiting


def open_store(directory: Path, settings: TrackingSettings) -> MlflowStore:
    """The store of a run in ``directory``: a server, or a database whose folder is made if need be."""
    if settings.uri and settings.uri.startswith("http"):
        return MlflowStore(settings.uri.rstrip("/"))
    database = Path((settings.uri or str(directory / "mlflow.db")).removeprefix("sqlite:///")).resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowStore(f"sqlite:///{database}")


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


def _digest(*texts: str) -> str:
    return sha256("\n".join(texts).encode()).hexdigest()[:12]


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)
