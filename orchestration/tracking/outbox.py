"""What MLflow is to be told, kept in the run's directory until it has been: tracking never holds up training.

A record is on the disk before :meth:`Outbox.put` returns. Two threads deliver in order, one what is told in numbers and
words, one what has files, so that no number ever waits for an artifact. While MLflow is away they try again, without
end. Each record stands for itself: what is none, or what MLflow refuses, is set aside in ``refused.jsonl`` and said,
and the rest goes on. How far they have come is counted in lines, and noted after the fact: what a crash lets them
deliver twice has to be the same the second time, and MLflow then holds it once.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt

from orchestration.tracking.records import FILES, Record, as_record
from pipelines.storage.atomic import append_durably, as_lines, replace_durably, write_json

Content = dict[str, Any]  # of a record, as its line holds it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two tries
_REMIND_SECONDS = 300.0
_SILENT_SECONDS, _UPLOAD_SECONDS = 10.0, 900.0  # of the wait at the end
_BATCH = 200  # records of one kind and run that are delivered together
_TRIES = 3  # of a record that fails for no clear reason, before it is looked whether the next one goes
_MOST_SAID = 10  # reasons of refusals; all are in the file


class TrackingError(RuntimeError):
    """MLflow could not be reached, or did not take what it was given."""


class Away(TrackingError):  # noqa: N818
    """Nobody answers there."""


class Refused(TrackingError):  # noqa: N818
    """MLflow will not take this, however often it is asked."""


class Gone(Refused):
    """The MLflow run itself is not there any longer: it takes nothing."""


@dataclass
class _Entry:
    line: int  # of records.jsonl, from 0
    content: Any
    record: Record | None = None
    flaw: str = ""  # why it is no record
    delivered: bool = False


@dataclass
class _Lane:
    """Records that wait for each other, and how their delivery goes."""

    most: int  # records at a time
    size: int  # at a time as long as some are refused
    waiting: deque[_Entry] = field(default_factory=deque)
    failures: int = 0  # of the first that waits, one after the other
    pause: float = _FIRST_PAUSE
    hurry: bool = False
    is_busy: bool = False
    away_since: float | None = None


class _Note(BaseModel):
    """How far an outbox has come: lines that a lane need not look at again."""

    model_config = ConfigDict(strict=True)

    records: NonNegativeInt
    files: NonNegativeInt
    began: FiniteFloat  # of the run's first session, seconds since the epoch


class Outbox:
    """The records of one run's directory. ``deliver`` tells MLflow some of one run and kind; ``say`` tells people.

    With ``again``, what was refused before is tried again. Raises TrackingError if the directory is not a plain one.
    """

    def __init__(
        self,
        directory: Path,
        deliver: Callable[[Sequence[Any]], None],
        say: Callable[[str], None],
        again: bool = False,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._position, self._refused = _files(directory)
        self._deliver, self._say = deliver, say
        _mend_end(self._path)
        contents, note, damage = _read(directory)
        self.began, self._lines = note.began, len(contents)
        self._told = {_identity(content) for content in contents if _has_once(content)}
        self._lanes = _Lane(_BATCH, _BATCH), _Lane(1, 1)  # numbers and words; files
        for line, content in enumerate(contents):
            # Of images, the files go when they are delivered: this tells what lost its note.
            if line >= (note.records, note.files)[_has_files(content)] and not (damage and self._is_sent(content)):
                self._lanes[_has_files(content)].waiting.append(self._entry(line, content))
        if damage:
            say(f"warning: {damage}: all is delivered again, and what MLflow knows it keeps once")
        self._note()
        self.refused = self._passed = 0
        self._said: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        if again:
            self._retry_refused()
        self._threads = [threading.Thread(target=self._courier, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many records are still to be delivered."""
        return sum(len(lane.waiting) for lane in self._lanes)

    def knows(self, run: str, once: str) -> bool:
        """Whether this was put already."""
        return (run, once) in self._told

    def put(self, *records: Content) -> None:
        """Keep records for delivery. They are on the disk when this returns. One with a known ``once`` adds nothing."""
        with self._changed:
            new = []
            for record in records:
                if "once" in record:
                    if _identity(record) in self._told:
                        continue
                    self._told.add(_identity(record))
                new.append(record)
            self._append(new)
            self._changed.notify_all()

    def drain(self, patience: float, most: float = float("inf")) -> bool:
        """Wait until all is delivered; at most ``most`` seconds, and ``patience`` without a delivery, or longer while a
        file is on its way. Returns whether all is.
        """
        with self._changed:
            for lane in self._lanes:
                lane.hurry = True
            self._changed.notify_all()
            began = since = time.monotonic()
            seen, silent, failed = self._passed, True, [max(_TRIES, lane.failures) for lane in self._lanes]
            while self.waiting and any(thread.is_alive() for thread in self._threads):
                now = time.monotonic()
                if self._passed != seen:
                    seen, since = self._passed, now
                enough = max(patience, _UPLOAD_SECONDS) if self._lanes[1].is_busy else patience
                if now - since > enough or now - began > most:
                    break
                if all(
                    not lane.waiting or lane.failures > before for lane, before in zip(self._lanes, failed, strict=True)
                ):
                    break  # it is there, and goes on failing
                if silent and now - began > _SILENT_SECONDS:
                    silent = False
                    self._say(f"{self.waiting} records are still on their way to MLflow; Ctrl-C leaves them for later")
                self._changed.wait(0.1)
        return not self.waiting

    def close(self) -> None:
        """Stop delivering; the rest waits on the disk."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_LONGEST_PAUSE if not self.waiting else 0)  # it may hang in a call to a silent server

    def _append(self, contents: Sequence[Content]) -> None:
        append_durably(self._path, as_lines(contents))
        for content in contents:
            self._lanes[_has_files(content)].waiting.append(self._entry(self._lines, content))
            self._lines += 1

    def _entry(self, line: int, content: Any) -> _Entry:
        try:
            return _Entry(line, content, as_record(content))
        except ValueError as error:
            return _Entry(line, content, flaw=f"{self._path}, line {line + 1}: {error}")

    def _is_sent(self, content: Any) -> bool:
        named = content.get("files") if isinstance(content, dict) and content.get("kind") == "image" else None
        return isinstance(named, list) and not any(os.path.exists(self.directory / str(name)) for name in named)

    def _courier(self, lane: _Lane) -> None:
        while batch := self._next(lane):
            lane.is_busy = True
            failure = self._attempt(batch)
            lane.is_busy = False
            try:
                if failure is None:
                    self._pass(lane, len(batch))
                elif isinstance(failure, Gone):
                    self._set_aside(lane, batch, failure)
                elif len(batch) > 1 and not isinstance(failure, Away):
                    lane.size = len(batch) // 2  # whose fault is it?
                elif isinstance(failure, Refused) or self._is_to_blame(lane, failure):
                    self._set_aside(lane, batch, failure)
                else:
                    self._wait(lane, failure)
            except OSError as error:  # a full disk: it may pass
                self._wait(lane, error)

    def _next(self, lane: _Lane) -> list[_Entry]:
        """The next records of one run and kind, once there are any; none if the outbox is closing."""
        with self._changed:
            while not (lane.waiting or self._closing):
                self._changed.wait()
            batch: list[_Entry] = []
            if self._closing:
                return batch
            for entry in lane.waiting:
                if batch and (entry.record is None or _group(entry) != _group(batch[0])):
                    break
                batch.append(entry)
                if entry.record is None or len(batch) == lane.size:
                    break
            return batch

    def _attempt(self, batch: Sequence[_Entry]) -> Exception | None:
        """Deliver; what went wrong, if anything did."""
        if batch[0].record is None:
            return Refused(batch[0].flaw)
        try:
            self._deliver([entry.record for entry in batch])
        except Exception as error:
            return error
        return None

    def _is_to_blame(self, lane: _Lane, failure: Exception) -> bool:
        """Whether the first record fails again and again where the next one goes."""
        lane.failures += not isinstance(failure, Away)
        if lane.failures < _TRIES or len(lane.waiting) < 2 or lane.waiting[1].record is None:
            return False
        lane.waiting[1].delivered = self._attempt([lane.waiting[1]]) is None
        return lane.waiting[1].delivered

    def _set_aside(self, lane: _Lane, batch: Sequence[_Entry], why: Exception) -> None:
        kept = [entry.content if isinstance(entry.content, dict) else {"line": entry.content} for entry in batch]
        with self._changed:
            append_durably(self._refused, as_lines({**content, "why": str(why)} for content in kept))
            self._pass(lane, len(batch))
            self.refused += len(batch)
        if str(why) not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(str(why))
            self._say(f"warning: {why}; kept in {self._refused}")

    def _note(self) -> None:
        records, files = (lane.waiting[0].line if lane.waiting else self._lines for lane in self._lanes)
        write_json(self._position, {"records": records, "files": files, "began": self.began})

    def _pass(self, lane: _Lane, count: int) -> None:
        """Leave the first records that wait behind, and with them what was delivered before its turn."""
        with self._changed:
            left = [lane.waiting.popleft() for _ in range(count)]
            while lane.waiting and lane.waiting[0].delivered:
                left.append(lane.waiting.popleft())
            try:
                self._note()
            except OSError:
                lane.waiting.extendleft(reversed(left))
                raise
            self._passed += len(left)
            lane.size, lane.failures, lane.pause = min(2 * lane.size, lane.most), 0, _FIRST_PAUSE
            self._changed.notify_all()
        if lane.away_since is not None:
            lane.away_since = None
            self._say("MLflow is back: what has waited is being delivered")

    def _wait(self, lane: _Lane, failure: Exception) -> None:
        now = time.monotonic()
        if lane.away_since is None or now - lane.away_since > _REMIND_SECONDS:
            lane.away_since = now
            self._say(f"warning: {failure}. The run goes on; {len(lane.waiting)} records wait in {self.directory}")
        with self._changed:
            self._changed.wait_for(lambda: self._closing or lane.hurry, lane.pause)
            lane.hurry = False
        lane.pause = min(2 * lane.pause, _LONGEST_PAUSE)

    def _retry_refused(self) -> None:
        """Put what was refused once more, at the end; what is no record stays where it is."""
        kept = [content for content in map(_json, _lines(self._refused)) if isinstance(content, dict)]
        bare = [{key: value for key, value in content.items() if key != "why"} for content in kept]
        good = [self._entry(0, content).record is not None for content in bare]
        self._append([content for content, is_good in zip(bare, good, strict=True) if is_good])
        if any(good):
            replace_durably(self._refused, as_lines(c for c, is_good in zip(kept, good, strict=True) if not is_good))


def undelivered(directory: Path) -> bool:
    """Whether the outbox of a run that is over holds something that MLflow was not told."""
    contents, note, _ = _read(directory)
    passed = note.records, note.files
    return any(line >= passed[_has_files(content)] for line, content in enumerate(contents))


def _files(directory: Path) -> tuple[Path, Path, Path]:
    """An outbox's records, the note how far it has come, and what was refused. Raises TrackingError for a link."""
    found = directory / "records.jsonl", directory / "delivered.json", directory / "refused.jsonl"
    for path in (directory, *found):
        if path.is_symlink() or (path != directory and path.exists() and not path.is_file()):
            raise TrackingError(f"{path} is a link or no plain file: nothing is read or written through it; remove it")
    return found


def _read(directory: Path) -> tuple[list[Any], _Note, str]:
    """What each line holds, how far it was delivered, and what is wrong with the note of that."""
    records, position, _ = _files(directory)
    contents, damage = [_json(line) for line in _lines(records)], ""
    try:
        note = _Note.model_validate_json(position.read_text(encoding="utf-8"))
        if max(note.records, note.files) <= len(contents):
            return contents, note, ""
        damage = f"{position} counts more lines than there are"
    except FileNotFoundError:
        damage = f"{position} is gone" if contents else ""
    except (OSError, ValueError):
        damage = f"{position} is damaged"
    started = next((each for each in contents if isinstance(each, dict) and each.get("kind") == "status"), {})
    began = started.get("timestamp_ms")
    return contents, _Note(records=0, files=0, began=began / 1000 if type(began) is int else time.time()), damage


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _json(line: bytes) -> Any:
    """What a line holds; its text if that is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.decode(errors="replace")


def _mend_end(path: Path) -> None:
    """A last line that a crash cut off was never put; one that lacks no more than its end is whole."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rpartition(b"\n")[2]
    if end and isinstance(_json(end), dict):
        append_durably(path, b"\n")
    elif end:
        os.truncate(path, len(content) - len(end))


def _has_files(content: Any) -> bool:
    return isinstance(content, dict) and content.get("kind") in FILES


def _has_once(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(key), str) for key in ("run", "once"))


def _identity(content: Content) -> tuple[str, str]:
    return content["run"], content["once"]


def _group(entry: _Entry) -> tuple[str, str]:
    return entry.content["run"], entry.content["kind"]
