"""Telling MLflow what an outbox holds. Every call is bounded, and the same record told twice leaves one trace."""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestration.outbox import Record, Refused

HEALTH_SECONDS = 5  # a server answers /health within this, or it counts as away
NOTE = "mlflow.note.content"  # the tag that MLflow shows as a description
_VALUE_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 5000, 250  # MLflow's limits
_BATCH, _METRIC_BATCH = 100, 1000
_HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "MALFORMED_REQUEST"}
_NEVER_PASS = FileNotFoundError, TypeError, KeyError, AttributeError


class TrackingError(RuntimeError):
    """MLflow could not be reached, or refused what it was given."""


class MlflowStore:
    """A store by its address: a server (http://…), or a database (sqlite:///…)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        _configure_mlflow()
        from mlflow import MlflowClient

        with self.named("opening the store"):
            self.client = MlflowClient(tracking_uri=uri)
        self._checked = False

    @property
    def is_server(self) -> bool:
        """Whether there is somebody who may be away."""
        return self.uri.startswith("http")

    def check(self, seconds: float = HEALTH_SECONDS) -> None:
        """Raise TrackingError unless the store can be asked."""
        if self.is_server:
            check_server(self.uri, seconds)

    def deliver(self, records: Sequence[Record]) -> None:
        """Tell MLflow some records of one run and kind. Raises Refused, or TrackingError if it may go well later."""
        kind, run = records[0]["kind"], records[0]["run"]
        if not self._checked:
            self.check()  # a server that is away is found out in a moment, where MLflow's calls take a minute
        self._checked = False
        with self.named(kind, refusing=True):
            if kind == "metrics":
                self._metrics(run, records)
            else:
                for record in records:
                    content = {key: value for key, value in record.items() if key not in ("run", "kind", "once")}
                    getattr(self, f"_{kind}")(run, **content)
        self._checked = True

    def _metrics(self, run: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(_key(name), float(value), record["timestamp_ms"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        self._log(run, "metrics", points, _METRIC_BATCH)

    def _describe(self, run: str, parameters: Mapping[str, Any], tags: Mapping[str, str], note: str) -> None:
        from mlflow.entities import Param

        wanted = {_key(name): _text(value, _VALUE_LENGTH) for name, value in parameters.items()}
        data = self.client.get_run(run).data
        held = data.params
        changed = {f"changed/{k}": v for k, v in wanted.items() if k in held and held[k] != v}
        self._log(run, "params", [Param(k, v) for k, v in wanted.items() if k not in held], _BATCH)
        self._tags(run, {**tags, **changed, **({NOTE: note} if note and NOTE not in data.tags else {})})

    def _tags(self, run: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log(run, "tags", [RunTag(_key(k), _text(v, _TAG_LENGTH)) for k, v in tags.items()], _BATCH)

    def _image(self, run: str, files: Sequence[str]) -> None:
        """Files named as MLflow's own ``log_image`` names them; told twice, they are overwritten."""
        for file in files:
            self.client.log_artifact(run, file, "images")
        self._tags(run, {"mlflow.loggedImages": "True"})
        for file in files:
            Path(file).unlink(missing_ok=True)

    def _artifact(self, run: str, path: str, under: str) -> None:
        self.client.log_artifact(run, path, under or None)

    def _dataset(self, run: str, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:36], "local", source, profile=json.dumps(profile))
        self.client.log_inputs(run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _status(self, run: str, status: str, timestamp_ms: int) -> None:
        if status == "RUNNING":
            self.client.update_run(run, status=status)
        else:
            self.client.set_terminated(run, status=status, end_time=timestamp_ms)

    def _log(self, run: str, kind: str, entities: list[Any], most: int) -> None:
        """Log ``params``, ``tags`` or ``metrics``, at ``most`` so many in a call."""
        for start in range(0, len(entities), most):
            batch: dict[str, Any] = {kind: entities[start : start + most]}
            self.client.log_batch(run, **batch)

    def experiment(self, name: str, note: str | None) -> str:
        """The experiment's id; a new one is described by ``note``, and on SQLite has its artifacts by the database."""
        from mlflow.exceptions import MlflowException

        existing = self.client.get_experiment_by_name(name)
        if existing is None:
            database = Path(self.uri.removeprefix("sqlite:///"))
            place = None if self.is_server else (database.parent / "artifacts").as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=place, tags={NOTE: note} if note else {})
            except MlflowException:
                existing = self.client.get_experiment_by_name(name)  # another run made it in the meantime
                if existing is None:
                    raise
        if existing.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow at {self.uri}: experiment {name!r} was deleted; "
                "restore it or set tracking.experiment to another"
            )
        return existing.experiment_id

    def register(self, name: str, run: str, path: str, alias: str, tags: Mapping[str, str]) -> str:
        """Make a run's artifacts at ``path`` its version of the model ``name``. Returns that version's address."""
        from mlflow.exceptions import MlflowException

        with self.named(f"registering {name}"):
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self.client.get_run(run).info.artifact_uri}/{path}"
            known = self.client.search_model_versions(f"name='{name}' and run_id='{run}'")
            version = (known or [self.client.create_model_version(name, source, run, tags=dict(tags))])[0].version
            self.client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}/{version}"

    @contextmanager
    def named(self, what: str, *, refusing: bool = False) -> Iterator[None]:
        """Turn any failure into a TrackingError that says what failed, where, and why; into Refused if it is final."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            final = isinstance(error, _NEVER_PASS) or getattr(error, "error_code", None) in _HOPELESS
            kind = Refused if refusing and final else TrackingError
            raise kind(f"MLflow at {self.uri}: {what} failed: {reason}") from error


def check_server(uri: str, seconds: float = HEALTH_SECONDS) -> None:
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


def _configure_mlflow() -> None:
    """Before MLflow is imported: no telemetry, no chatter on the terminal, a call takes a minute at most."""
    import logging

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


def _key(name: str) -> str:
    """``name`` in the characters MLflow allows."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)[:_KEY_LENGTH]


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
