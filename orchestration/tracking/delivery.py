"""What MLflow can be sent of a run, and how: the kinds of records, what each may contain, and the calls it takes.

Every call is bounded, and a record that is sent twice leaves one trace. An outbox may come from a stranger: nothing
else is a record, only plain files inside of the run's directory are read, only those in the outbox are removed, and
only the run and those below it are written to.
"""

import json
import os
import posixpath
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orchestration.tracking.store import NOTE, Gone, MlflowStore, Refused

_VALUE_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 5000, 250  # MLflow's limits
_BATCHES = {"params": 100, "tags": 100, "metrics": 1000}  # in a call
_DEPTH = 10  # of runs below runs
_CHECKED_SECONDS = 5.0  # a server that has just answered is not asked whether it is there


def _downwards(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ValueError("it is no path below the run's directory")
    return path


_Path = Annotated[str, AfterValidator(_downwards)]
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Milliseconds = Annotated[int, Field(ge=0, lt=2**63)]  # since the epoch


class Record(BaseModel):
    """Something to send to the MLflow run with the id ``run``; what has a ``once`` is sent once."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    run: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z_\-]{0,255}$")
    once: str | None = None

    def send(self, delivery: "Delivery") -> None:
        """Make MLflow's run say this."""
        raise NotImplementedError


class Metrics(Record):
    """The numbers of a step."""

    kind: Literal["metrics"]
    step: _Int64
    values: dict[str, float]
    timestamp_ms: _Milliseconds

    def points(self) -> list[Any]:
        """As MLflow's entities."""
        from mlflow.entities import Metric

        keys = _keys(self.values)
        return [Metric(keys[name], value, self.timestamp_ms, self.step) for name, value in self.values.items()]


class Describe(Record):
    """What a run is. ``note`` is its description unless a person wrote one in place of none, or of the ``former``."""

    kind: Literal["describe"]
    parameters: dict[str, Any]
    tags: dict[str, Any]
    note: str
    former: str = ""

    def send(self, delivery: "Delivery") -> None:
        from mlflow.entities import Param

        keys = _keys(self.parameters)
        wanted = {keys[name]: _text(value, _VALUE_LENGTH) for name, value in self.parameters.items()}
        data = delivery.store.client.get_run(self.run).data
        new = [Param(key, value) for key, value in wanted.items() if key not in data.params]
        other = {key: value for key, value in wanted.items() if data.params.get(key, value) != value}
        changed = {f"changed/{key}": value for key, value in other.items() if key != "output_dir"}  # a run may be moved
        note = {NOTE: self.note} if self.note and data.tags.get(NOTE, self.former) == self.former else {}
        refused = delivery.log(self.run, "params", new)
        _raise_all(refused + delivery.tag(self.run, {**self.tags, **changed, **note}))


class Tags(Record):
    """Tags, in place of what they said."""

    kind: Literal["tags"]
    tags: dict[str, Any]

    def send(self, delivery: "Delivery") -> None:
        _raise_all(delivery.tag(self.run, self.tags))


class DatasetUsed(Record):
    """What was trained on."""

    kind: Literal["dataset"]
    name: str
    digest: str
    source: str
    profile: dict[str, Any]

    def send(self, delivery: "Delivery") -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(self.name, self.digest[:36], "local", self.source, profile=json.dumps(self.profile))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        delivery.store.client.log_inputs(self.run, datasets=inputs)


class Status(Record):
    """Whether the run is running, or how it ended."""

    kind: Literal["status"]
    status: Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]
    timestamp_ms: _Milliseconds

    def send(self, delivery: "Delivery") -> None:
        if self.status == "RUNNING":
            delivery.store.client.update_run(self.run, status=self.status)
        else:
            delivery.store.client.set_terminated(self.run, status=self.status, end_time=self.timestamp_ms)


class Image(Record):
    """A picture and its small copy: names of files in the outbox, which are removed once they are delivered; those that
    are gone were. They are named as MLflow's own ``log_image`` names them."""

    kind: Literal["image"]
    files: list[Annotated[str, Field(pattern=r"^[^/\\\x00]+\.(png|webp)$")]] = Field(min_length=1)

    def send(self, delivery: "Delivery") -> None:
        place = delivery.directory / "outbox"
        left = [f"outbox/{name}" for name in self.files if os.path.lexists(place / name)]
        files = [_plain_file(delivery.directory, name) for name in left]
        for file in files:
            delivery.upload(self.run, file, "images")
        _raise_all(delivery.tag(self.run, {"mlflow.loggedImages": "True"}))
        for file in files:
            file.unlink()


class Artifact(Record):
    """A file or a directory, by its path from the run's directory, to be stored as ``under/<its name>``."""

    kind: Literal["artifact"]
    path: _Path = Field(min_length=1)
    under: _Path

    def send(self, delivery: "Delivery") -> None:
        """File by file: MLflow then looks where each is put, and no link among them is followed."""
        top = _inside(delivery.directory, self.path)
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        names = [str(path.relative_to(delivery.directory)) for path in found if path.is_symlink() or not path.is_dir()]
        for file in [_plain_file(delivery.directory, name) for name in names]:
            place = posixpath.join(self.under, file.parent.relative_to(top.parent).as_posix())
            delivery.upload(self.run, file, posixpath.normpath(place))


_Any = Metrics | Describe | Tags | DatasetUsed | Status | Image | Artifact
_RECORD: TypeAdapter[_Any] = TypeAdapter(Annotated[_Any, Field(discriminator="kind")])
FILES = "image", "artifact"  # kinds


def as_record(content: object) -> Record:
    """A record from what an outbox holds. Raises ValueError in one line."""
    try:
        return _RECORD.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"it is no record: {place + ': ' if place else ''}{first['msg']}") from None


class Delivery:
    """Delivers records of the run with the id ``run``, whose directory is ``directory``, and of runs below it."""

    def __init__(self, store: MlflowStore, directory: Path, run: str) -> None:
        self.store, self.directory = store, directory.resolve()
        self._own = {run}
        self._repositories: dict[str, Any] = {}  # run → where its artifacts go
        self._answered = float("-inf")

    def admit(self, run: str) -> None:
        """Deliver records of ``run`` too."""
        self._own.add(run)

    def __call__(self, records: Sequence[Record]) -> None:
        """Send some records of one run and kind. Raises Refused, or TrackingError if it may go well later."""
        if time.monotonic() - self._answered > _CHECKED_SECONDS:
            self.store.check()  # a server that is away is found out in a moment, where MLflow's calls take a minute
        self._answered = float("-inf")
        run = records[0].run
        try:
            with self.store.named(str(getattr(records[0], "kind", "record")), refusing=True):
                self._check_owner(run)
                if isinstance(records[0], Metrics):
                    points = [point for each in records if isinstance(each, Metrics) for point in each.points()]
                    _raise_all(self.log(run, "metrics", points, alone=len(records) == 1))
                else:
                    for record in records:
                        record.send(self)
        except Refused as error:
            if not isinstance(error, Gone) and self.store.find(run) is None:
                raise self._gone(run) from error
            raise
        self._answered = time.monotonic()

    def _gone(self, run: str) -> Gone:
        return Gone(f"MLflow at {self.store.uri}: the run {run} was deleted")

    def _check_owner(self, run: str) -> None:
        above = run
        for _ in range(_DEPTH):
            if above in self._own:
                self._own.add(run)
                return
            if (found := self.store.find(above)) is None:
                raise self._gone(above)
            if not (above := found.data.tags.get("mlflow.parentRunId", "")):
                break
        raise Refused(f"the run {run} is not the one of {self.directory}, nor below it")

    def tag(self, run: str, tags: Mapping[str, Any]) -> list[str]:
        """Set tags. Returns those that MLflow refuses, with the reason."""
        from mlflow.entities import RunTag

        keys = _keys(tags)
        return self.log(run, "tags", [RunTag(keys[name], _text(value, _TAG_LENGTH)) for name, value in tags.items()])

    def upload(self, run: str, file: Path, place: str) -> None:
        """Not by MLflow's client: what that remembers of a run is wrong once the run's directory is moved."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if run not in self._repositories:
            uri = self.store.client.get_run(run).info.artifact_uri
            self._repositories[run] = get_artifact_repository(uri, tracking_uri=self.store.uri)
        self._repositories[run].log_artifact(str(file), None if place == "." else place)

    def log(self, run: str, kind: str, entities: Sequence[Any], most: int = 0, alone: bool = True) -> list[str]:
        """Log ``params``, ``tags`` or ``metrics``, at ``most`` so many in a call. If they stand ``alone``, those that
        MLflow refuses are found, returned with the reason, and the others are logged."""
        refused: list[str] = []
        most = most or _BATCHES[kind]
        for some in (entities[start : start + most] for start in range(0, len(entities), most)):
            try:
                with self.store.named(kind, refusing=True):
                    self.store.client.log_batch(run, **{kind: some})  # type: ignore[arg-type]
            except Refused as error:
                if not alone or self.store.find(run) is None:
                    raise
                is_it = len(some) == 1
                refused += [f"{some[0].key}: {error}"] if is_it else self.log(run, kind, some, len(some) // 2)
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


def _plain_file(directory: Path, name: str) -> Path:
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
