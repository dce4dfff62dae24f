"""One run in MLflow: opened once, continued after a resume, closed with the name of how it ended.

Everything goes through the client by run id, so that several runs in one process do not meet. Every call is bounded: a
server that is away or hangs gives a :class:`TrackingError` within about a minute, never a silent loss. A repeated call
adds nothing: MLflow drops metric points it holds, a second image of a step is skipped, artifacts are overwritten.
"""

import copy
import getpass
import json
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from policies.settings import Settings

Ending = Literal["FINISHED", "KILLED", "FAILED"]

_HEALTH_SECONDS = 5  # a server answers /health within this, or it counts as away
_MONITOR_SECONDS = 5  # between two system metrics
_GOODBYE_SECONDS = 3  # at the end of a run, the longest wait for a server, and for the system metrics to stop
_VALUE_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 5000, 250  # MLflow's limits
_BATCH, _METRIC_BATCH = 100, 1000
FIRST_LOOK = "A first look"  # what matters most: a name that MLflow sorts before all others, whatever their case
_VIEW = "?workflowType=machine_learning"  # without it, MLflow shows a new visitor its pages for agents, which are empty
_NOTE = "mlflow.note.content"  # the tag that MLflow shows as a description
_LOOK = f"look at *Model metrics* first, which begin with *{FIRST_LOOK}*, and at `report.html` among the artifacts"
_EXPERIMENTS = {
    "ddpo": f"**DDPO**: a reward teaches a diffusion model. Of a run, {_LOOK}. Filter by `tags.reward`, `tags.model`.",
    "mad": "**MAD**: generators trained on their own samples. Below a run are its arms', below these their seeds'. "
    f"Of an arm, {_LOOK} of its experiment. Filter by `tags.goes_mad`, `tags.rule`, `tags.family`.",
    "sweep": "**Sweeps**: below a run are its trials'. Compare these by their parameters.",
}


class TrackingError(RuntimeError):
    """MLflow could not be reached, or refused what it was given."""


class TrackingSettings(Settings):
    """Where a run is recorded."""

    model_config = ConfigDict(hide_input_in_errors=True)

    uri: str | None = Field(
        default=None, description="MLflow server (http://…) or sqlite:///file; null: SQLite in the run directory"
    )
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
    experiment unless the settings do. Raises TrackingError if the store cannot be reached, or does not know the run.
    """

    def __init__(
        self, directory: Path, settings: TrackingSettings, run_name: str, run_id: str | None = None, loop: str = "ddpo"
    ) -> None:
        self._database: Path | None = None
        if settings.uri and settings.uri.startswith("http"):
            self.uri = settings.uri.rstrip("/")
            _check_server(self.uri)
        else:
            self._database = Path((settings.uri or str(directory / "mlflow.db")).removeprefix("sqlite:///")).resolve()
            self._database.parent.mkdir(parents=True, exist_ok=True)
            self.uri = f"sqlite:///{self._database}"
        _configure_mlflow()
        from mlflow import MlflowClient

        with self._named("opening the store"):
            self._client = MlflowClient(tracking_uri=self.uri)
            if run_id is None:
                self._experiment_id: str = self._experiment(settings.experiment or loop, _EXPERIMENTS.get(loop))
            self._open(run_id, run_name, _who() | ({"mlflow.parentRunId": settings.parent} if settings.parent else {}))
        if settings.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            with self._named("starting system metrics"):
                resumed = run_id is not None
                self._monitor: Any = SystemMetricsMonitor(
                    self.run_id, sampling_interval=_MONITOR_SECONDS, resume_logging=resumed, tracking_uri=self.uri
                )
                self._monitor.start()

    def child(self, name: str, run_id: str | None = None) -> "Tracker":
        """A run below this one in the same store, new or continued. Close it with :meth:`finish`, as any."""
        child = copy.copy(self)
        with self._named(f"opening {name}"):
            child._open(run_id, name, {**_who(), "mlflow.parentRunId": self.run_id})
        return child

    def _open(self, run_id: str | None, name: str, tags: dict[str, str]) -> None:
        """Be the run of this id, or a new one."""
        if run_id is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
        else:
            run = self._client.get_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run.info.run_id
        self._experiment_id = run.info.experiment_id
        self._images = self._logged_images() if run_id else set()
        self._monitor = None
        self._finished = False

    def describe(
        self, parameters: Mapping[str, Any], tags: Mapping[str, str], prompts: Sequence[str], note: str = ""
    ) -> None:
        """Record what the run is: ``parameters`` under dotted names, ``tags``, ``prompts`` as its dataset.

        MLflow's parameters cannot change: one that differs from what the run holds (a resume on another
        machine) is recorded as the tag ``changed/<name>``. ``note`` is its description unless somebody wrote one.
        """
        from mlflow.entities import Param

        wanted = {_key(name): _text(value, _VALUE_LENGTH) for name, value in flatten(parameters).items()}
        with self._named("describing the run"):
            data = self._client.get_run(self.run_id).data
            held = data.params
            changed = {f"changed/{k}": v for k, v in wanted.items() if k in held and held[k] != v}
            self._log("params", [Param(k, v) for k, v in wanted.items() if k not in held], _BATCH)
            self.tags({**tags, **changed, **({_NOTE: note} if note and _NOTE not in data.tags else {})})
            if prompts:
                import pandas
                from mlflow.data.pandas_dataset import from_pandas

                table = pandas.DataFrame({"prompt": list(prompts)})
                self._log_dataset(from_pandas(table, name="prompts")._to_mlflow_entity())

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of what they said."""
        from mlflow.entities import RunTag

        with self._named("tags"):
            self._log("tags", [RunTag(_key(k), _text(v, _TAG_LENGTH)) for k, v in tags.items()], _BATCH)

    def metrics(self, step: int, values: Mapping[str, float], timestamp_ms: int) -> None:
        """Record a step's numbers. The very same call again adds no point."""
        self.many_metrics([(step, values, timestamp_ms)])

    def many_metrics(self, steps: Sequence[tuple[int, Mapping[str, float], int]]) -> None:
        """Record (step, values, timestamp_ms) of many steps at once."""
        from mlflow.entities import Metric

        points = [Metric(_key(k), float(v), stamp, step) for step, values, stamp in steps for k, v in values.items()]
        with self._named("metrics of step " + ", ".join(str(step) for step, _, _ in steps[:3])):
            self._log("metrics", points, _METRIC_BATCH)

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Put ``image`` (height, width, 3) uint8 on the dashboard's step slider, unless the step has one."""
        key = _key(key)
        if (key, step) in self._images:
            return
        with self._named(f"image {key} of step {step}"):
            self._client.log_image(self.run_id, image, key=key, step=step, synchronous=True)
        self._images.add((key, step))

    def artifact(self, path: Path, under: str = "") -> None:
        """Store a file or a directory as ``under/<its name>``, in place of what was there."""
        with self._named(f"artifact {path.name}"):
            self._client.log_artifact(self.run_id, str(path), under or None)

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record what was trained on: ``digest`` identifies it, ``source`` is its place, ``profile`` what it holds."""
        from mlflow.entities import Dataset

        with self._named(f"dataset {name}"):
            self._log_dataset(Dataset(name, digest[:36], "local", source, profile=json.dumps(profile)))

    def finish(self, status: Ending) -> None:
        """Close the run and its system metrics, within 10 s even if the server is away. Only the first call counts."""
        if self._finished:
            return
        self._finished = True
        try:
            if self._database is None:
                _check_server(self.uri, _GOODBYE_SECONDS)
        finally:
            if self._monitor is not None:
                # Its thread (a daemon) may be waiting for a server that is away, so the wait for it has a bound.
                stopping = threading.Thread(target=self._monitor.finish, daemon=True)
                stopping.start()
                stopping.join(_GOODBYE_SECONDS)
        with self._named(f"closing the run as {status}"):
            self._client.set_terminated(self.run_id, status=status)

    def close(self, run_id: str, status: Ending, tags: Mapping[str, str]) -> None:
        """Close another run of this store that its own process could not close."""
        with self._named(f"closing run {run_id}"):
            for key, value in tags.items():
                self._client.set_tag(run_id, key, value)
            self._client.set_terminated(run_id, status=status)

    def register(self, name: str, run_id: str, path: str, alias: str, tags: Mapping[str, str]) -> str:
        """Make the artifacts of a run under ``path`` a version of the model ``name``. Returns its models:/ address."""
        from mlflow.exceptions import MlflowException

        with self._named(f"registering {name}"):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{path}"
            version = self._client.create_model_version(name, source, run_id, tags=dict(tags)).version
            self._client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}/{version}"

    def open_command(self) -> str:
        """What opens the dashboard: the run's page on a server, or the command that serves this store."""
        if self._database is None:
            return f"{self.uri}/#/experiments/{self._experiment_id}/runs/{self.run_id}{_VIEW}"
        return f"{_program()} ui --backend-store-uri {shlex.quote(self.uri)} --host 127.0.0.1 --port 5000"

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn any failure of the store into a TrackingError that says what failed, where, and why."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise TrackingError(f"MLflow at {self.uri}: {what} failed: {reason}") from error

    def _experiment(self, name: str, note: str | None) -> str:
        """The experiment's id; a new one is described by ``note``, and on SQLite has its artifacts by the database."""
        from mlflow.exceptions import MlflowException

        existing = self._client.get_experiment_by_name(name)
        if existing is None:
            place = (self._database.parent / "artifacts").as_uri() if self._database else None
            tags = {_NOTE: note} if note else {}
            try:
                return self._client.create_experiment(name, artifact_location=place, tags=tags)
            except MlflowException:
                existing = self._client.get_experiment_by_name(name)  # another run made it in the meantime
                if existing is None:
                    raise
        if existing.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow at {self.uri}: experiment {name!r} was deleted; "
                "restore it or set tracking.experiment to another"
            )
        return existing.experiment_id

    def _logged_images(self) -> set[tuple[str, int]]:
        """(key, step) of the stored images. The ``compressed`` file is written last: it vouches for both."""
        found = set()
        for file in self._client.list_artifacts(self.run_id, "images"):
            match = re.match(r"images/(.+?)[+%]step[+%](\d+)[+%].*compressed", file.path)
            if match:
                found.add((re.sub("[~#]", "/", match[1]), int(match[2])))
        return found

    def _log(self, kind: str, entities: list[Any], most: int) -> None:
        """Log ``params``, ``tags`` or ``metrics``, at ``most`` so many in a call."""
        for start in range(0, len(entities), most):
            batch: dict[str, Any] = {kind: entities[start : start + most]}
            self._client.log_batch(self.run_id, **batch)

    def _log_dataset(self, dataset: Any) -> None:
        from mlflow.entities import DatasetInput, InputTag

        tag = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags=[tag])])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _configure_mlflow() -> None:
    """Before MLflow is imported: no telemetry, no chatter on the terminal, a call takes a minute at most."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow  # noqa: F401  (it sets the levels of these loggers when it is imported)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    # Retries are told by the error in the end.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _check_server(uri: str, seconds: float = _HEALTH_SECONDS) -> None:
    """Raise TrackingError unless a server answers at ``uri``; what it answers, the next calls will judge."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=seconds):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return
        reason = f"it answers HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise TrackingError(
        f"MLflow at {uri} cannot be reached: {reason}. "
        "Start it, correct tracking.uri, or set tracking.uri to null for a database in the run directory"
    )


def names_user(uri: str) -> bool:
    """Whether ``uri`` names a user, as in http://user:password@host."""
    return "@" in urlsplit(uri).netloc


def _key(name: str) -> str:
    """``name`` in the characters MLflow allows."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)[:_KEY_LENGTH]


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _who() -> dict[str, str]:
    """The tags by which MLflow knows who started a run."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.type": "LOCAL"}


def _program() -> str:
    """The ``mlflow`` of this environment, as short as the shell will still find it."""
    own = Path(sys.executable).parent / "mlflow"
    if not own.exists() or shutil.which("mlflow") == str(own):
        return "mlflow"
    with_folder = os.path.relpath(own)
    return shlex.quote(str(own) if with_folder.startswith("..") else with_folder)
