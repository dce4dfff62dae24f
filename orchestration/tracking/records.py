"""What MLflow can be told of a run: the kinds of records that an outbox holds, and what each may contain.

An outbox may come from a stranger, so nothing else is a record, and a path in one leads downwards only.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


def _downwards(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ValueError("it is no path below the run's directory")
    return path


_Path = Annotated[str, AfterValidator(_downwards)]
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Milliseconds = Annotated[int, Field(ge=0, lt=2**63)]  # since the epoch


class Record(BaseModel):
    """Something to tell MLflow of the run with the id ``run``; what has a ``once`` is told once."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    run: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z_\-]{0,255}$")
    once: str | None = None


class Metrics(Record):
    """The numbers of a step."""

    kind: Literal["metrics"]
    step: _Int64
    values: dict[str, float]
    timestamp_ms: _Milliseconds


class Describe(Record):
    """What a run is. ``note`` is its description unless somebody wrote one."""

    kind: Literal["describe"]
    parameters: dict[str, Any]
    tags: dict[str, Any]
    note: str


class Tags(Record):
    """Tags, in place of what they said."""

    kind: Literal["tags"]
    tags: dict[str, Any]


class DatasetUsed(Record):
    """What was trained on."""

    kind: Literal["dataset"]
    name: str
    digest: str
    source: str
    profile: dict[str, Any]


class Status(Record):
    """Whether the run is running, or how it ended."""

    kind: Literal["status"]
    status: Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]
    timestamp_ms: _Milliseconds


class Image(Record):
    """A picture and its small copy: names of files in the outbox, which are removed once they are delivered."""

    kind: Literal["image"]
    files: list[Annotated[str, Field(pattern=r"^[^/\\\x00]+\.(png|webp)$")]] = Field(min_length=1)


class Artifact(Record):
    """A file or a directory, by its path from the run's directory, to be stored as ``under/<its name>``."""

    kind: Literal["artifact"]
    path: _Path = Field(min_length=1)
    under: _Path


_Any = Metrics | Describe | Tags | DatasetUsed | Status | Image | Artifact
_RECORD: TypeAdapter[_Any] = TypeAdapter(Annotated[_Any, Field(discriminator="kind")])
FILES = "image", "artifact"  # kinds


def as_record(content: object) -> Record:
    """A record from what a line holds. Raises ValueError in one line."""
    try:
        return _RECORD.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"it is no record: {place + ': ' if place else ''}{first['msg']}") from None
