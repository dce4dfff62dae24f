"""Telling MLflow what the outbox of one run holds. Every call is bounded; the same record told twice leaves one trace.

An outbox may come from a stranger: only plain files inside of the run's directory are read, only those in the outbox
are removed, and only the run and those below it are written to.
"""

import json
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestration.tracking.outbox import Gone, Refused
from orchestration.tracking.records import Artifact, DatasetUsed, Describe, Image, Metrics, Record, Status, Tags
from orchestration.tracking.store import NOTE, MlflowStore

_VALUE_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 5000, 250  # MLflow's limits
_BATCH, _METRIC_BATCH = 100, 1000
_DEPTH = 10  # of runs below runs
_CHECKED_SECONDS = 5.0  # a server that has just answered is not asked whether it is there


class Delivery:
    """Delivers records of the run with the id ``run``, whose directory is ``directory``, and of runs below it."""

    def __init__(self, store: MlflowStore, directory: Path, run: str) -> None:
        self._store, self._directory = store, directory.resolve()
        self._own = {run}
        self._repositories: dict[str, Any] = {}  # run → where its artifacts go
        self._answered = float("-inf")

    def admit(self, run: str) -> None:
        """Deliver records of ``run`` too."""
        self._own.add(run)

    def __call__(self, records: Sequence[Record]) -> None:
        """Tell MLflow some records of one run and kind. Raises Refused, or TrackingError if it may go well later."""
        if time.monotonic() - self._answered > _CHECKED_SECONDS:
            self._store.check()  # a server that is away is found out in a moment, where MLflow's calls take a minute
        self._answered = float("-inf")
        run = records[0].run
        try:
            with self._store.named(str(getattr(records[0], "kind", "record")), refusing=True):
                self._check_owner(run)
                self._deliver(run, records)
        except Refused as error:
            if not isinstance(error, Gone) and self._store.find(run) is None:
                raise self._gone(run) from error
            raise
        self._answered = time.monotonic()

    def _gone(self, run: str) -> Gone:
        return Gone(f"MLflow at {self._store.uri}: the run {run} was deleted")

    def _check_owner(self, run: str) -> None:
        above = run
        for _ in range(_DEPTH):
            if above in self._own:
                self._own.add(run)
                return
            if (found := self._store.find(above)) is None:
                raise self._gone(above)
            if not (above := found.data.tags.get("mlflow.parentRunId", "")):
                break
        raise Refused(f"the run {run} is not the one of {self._directory}, nor below it")

    def _deliver(self, run: str, records: Sequence[Any]) -> None:
        one_by_one: dict[Any, Callable[[str, Any], None]] = {
            Describe: self._describe,
            Tags: lambda run, record: _raise_all(self._tags(run, record.tags)),
            Status: self._status,
            DatasetUsed: self._dataset,
            Image: self._image,
            Artifact: self._artifact,
        }
        if isinstance(records[0], Metrics):
            return self._metrics(run, records)
        for record in records:
            one_by_one[type(record)](run, record)

    def _metrics(self, run: str, records: Sequence[Metrics]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, record.values[name], record.timestamp_ms, record.step)
            for record in records
            for name, key in _keys(record.values).items()
        ]
        _raise_all(self._log(run, "metrics", points, _METRIC_BATCH, alone=len(records) == 1))

    def _describe(self, run: str, record: Describe) -> None:
        from mlflow.entities import Param

        keys = _keys(record.parameters)
        wanted = {keys[name]: _text(value, _VALUE_LENGTH) for name, value in record.parameters.items()}
        data = self._store.client.get_run(run).data
        held = data.params
        changed = {f"changed/{k}": v for k, v in wanted.items() if k in held and held[k] != v}
        refused = self._log(run, "params", [Param(k, v) for k, v in wanted.items() if k not in held], _BATCH)
        note = {NOTE: record.note} if record.note and NOTE not in data.tags else {}
        _raise_all(refused + self._tags(run, {**record.tags, **changed, **note}))

    def _tags(self, run: str, tags: Mapping[str, Any]) -> list[str]:
        from mlflow.entities import RunTag

        keys = _keys(tags)
        return self._log(run, "tags", [RunTag(keys[k], _text(v, _TAG_LENGTH)) for k, v in tags.items()], _BATCH)

    def _status(self, run: str, record: Status) -> None:
        if record.status == "RUNNING":
            self._store.client.update_run(run, status=record.status)
        else:
            self._store.client.set_terminated(run, status=record.status, end_time=record.timestamp_ms)

    def _dataset(self, run: str, record: DatasetUsed) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(record.profile)
        dataset = Dataset(record.name, record.digest[:36], "local", record.source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self._store.client.log_inputs(run, datasets=inputs)

    def _image(self, run: str, record: Image) -> None:
        """Files named as MLflow's own ``log_image`` names them; told twice, they are overwritten."""
        files = [plain_file(self._directory, f"outbox/{name}") for name in record.files]
        for file in files:
            self._upload(run, file, "images")
        _raise_all(self._tags(run, {"mlflow.loggedImages": "True"}))
        for file in files:
            file.unlink()

    def _artifact(self, run: str, record: Artifact) -> None:
        """File by file: MLflow then looks where each is put, and no link among them is followed."""
        top = _inside(self._directory, record.path)
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        names = [str(path.relative_to(self._directory)) for path in found if path.is_symlink() or not path.is_dir()]
        for file in [plain_file(self._directory, name) for name in names]:
            place = posixpath.join(record.under, file.parent.relative_to(top.parent).as_posix())
            self._upload(run, file, posixpath.normpath(place))

    def _upload(self, run: str, file: Path, place: str) -> None:
        """Not by MLflow's client: what that remembers of a run is wrong once the run's directory is moved."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if run not in self._repositories:
            uri = self._store.client.get_run(run).info.artifact_uri
            self._repositories[run] = get_artifact_repository(uri, tracking_uri=self._store.uri)
        self._repositories[run].log_artifact(str(file), None if place == "." else place)

    def _log(self, run: str, kind: str, entities: list[Any], most: int, alone: bool = True) -> list[str]:
        """Log ``params``, ``tags`` or ``metrics``, at ``most`` so many in a call. If they stand ``alone``, those that
        MLflow refuses are found, returned with the reason, and the others are logged."""
        refused: list[str] = []
        for start in range(0, len(entities), most):
            batch: dict[str, Any] = {kind: entities[start : start + most]}
            try:
                with self._store.named(kind, refusing=True):
                    self._store.client.log_batch(run, **batch)
            except Refused as error:
                if not alone or self._store.find(run) is None:
                    raise
                if len(batch[kind]) == 1:
                    refused.append(f"{batch[kind][0].key}: {error}")
                else:
                    refused += self._log(run, kind, batch[kind], len(batch[kind]) // 2)
        return refused


def _raise_all(refused: Sequence[str]) -> None:
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise Refused(f"{refused[0]}{more}; all else of the record was taken")


def _inside(directory: Path, name: str) -> Path:
    """The path of what a record names. Raises Refused if it is not inside of ``directory``, links followed."""
    path = directory / name
    if not path.resolve().is_relative_to(directory) or path.resolve() == directory:
        raise Refused(f"{path} leads out of the run's directory: it is not sent")
    if not path.exists():
        raise Refused(f"there is no {path}")
    return path


def plain_file(directory: Path, name: str) -> Path:
    """The path of a file that a record names. Raises Refused if it is a link, no file, or outside of ``directory``."""
    path = _inside(directory, name)
    if path.is_symlink() or not path.is_file():
        raise Refused(f"{path} is no plain file: it is not sent")
    return path


def _keys(names: Iterable[str]) -> dict[str, str]:
    """Each name's key, different ones for different names: of the characters and the length that MLflow allows, no
    path that leads elsewhere, and told apart also by stores to which upper and lower case are the same."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        safe = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
        safe = "/".join("_" * len(part) or "_" if part in ("", ".", "..") else part for part in safe.split("/"))
        if len(safe) > _KEY_LENGTH or safe.casefold() in taken:
            safe = f"{safe[: _KEY_LENGTH - 9]}-{sha256(name.encode(errors='replace')).hexdigest()[:8]}"
        taken.add(safe.casefold())
        keys[name] = safe
    return keys


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"
