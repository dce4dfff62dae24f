"""Records on their way to MLflow, kept in a run's directory until they have arrived: tracking never delays training.

A record is on the disk before :meth:`Outbox.put` returns, as a row of an SQLite database. Two threads deliver in order,
one numbers and texts, one files, so that no number waits for an artifact. While MLflow is away they try again, without
end. Each row is acknowledged by itself: what is no record, or what MLflow refuses, stays as ``refused`` with the reason
and is reported, and the rest goes on. A crash between a delivery and its acknowledgement delivers a record twice; the
second delivery is the same as the first, so MLflow holds it once.
"""

import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestration.tracking.delivery import FILES, Record, as_record
from orchestration.tracking.store import Away, Gone, Refused, Say, TrackingError
from pipelines.storage.atomic import DamagedFiles, read_json, read_lines

Content = dict[str, Any]  # a record as JSON holds it
Entry = tuple[int, Record | str]  # a row's number, and its record or why it is none
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two attempts
_REMIND_SECONDS = 300.0
_SILENT_SECONDS, _UPLOAD_SECONDS = 10.0, 900.0  # of the wait at the end
_BATCH = 200  # records of one kind and run that are delivered together
_TRIES = 3  # of a record that fails for no clear reason, before the one behind it is tried
_MOST_REPORTED = 10  # reasons of refusals; all are in the database
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY, content TEXT, run TEXT, once TEXT, has_files INTEGER, put_at REAL,
    state TEXT DEFAULT 'waiting', why TEXT, UNIQUE (run, once)
);
CREATE INDEX IF NOT EXISTS by_state ON records (state, has_files, number);
"""


@dataclass
class _Lane:
    """One of the two deliveries."""

    has_files: bool
    most: int  # records at a time
    size: int  # at a time as long as some are refused
    failures: int = 0  # of the first that waits, one after the other
    pause: float = _FIRST_PAUSE
    hurry: bool = False
    is_busy: bool = False
    away_since: float | None = None


class Outbox:
    """The records of one run's directory. ``deliver`` sends some of one run and kind to MLflow; ``say`` prints a line.

    With ``again``, what was refused before is tried again. Raises TrackingError if the directory is not a plain one.
    """

    def __init__(
        self, directory: Path, deliver: Callable[[Sequence[Any]], None], say: Say, again: bool = False
    ) -> None:
        self.directory, self._path = directory, directory / "records.db"
        self._deliver, self._say = deliver, say
        self._changed = threading.Condition()
        directory.mkdir(parents=True, exist_ok=True)
        _check_plain(directory)
        self._database = _opened(self._path, say)
        self._adopt_lines(directory / "records.jsonl")
        if again:
            self._sql("UPDATE records SET state = 'waiting' WHERE state = 'refused'", ())
        self.began: float = self._sql("SELECT coalesce(min(put_at), ?) FROM records", (time.time(),))[0][0]  # seconds
        self._lanes = _Lane(False, _BATCH, _BATCH), _Lane(True, 1, 1)
        self._passed_at, self._reported, self._closing = 0.0, set[str](), False
        self._threads = [threading.Thread(target=self._courier, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many records are still to be delivered."""
        return self._count("waiting", *self._lanes)

    @property
    def refused(self) -> int:
        """How many records MLflow does not take."""
        return self._count("refused", *self._lanes)

    def knows(self, run: str, once: str) -> bool:
        """Whether this was put already."""
        return bool(self._sql("SELECT 1 FROM records WHERE run = ? AND once = ?", (run, once)))

    def put(self, *records: Content) -> None:
        """Keep records for delivery. They are on the disk when this returns. One with a known ``once`` adds nothing."""
        columns = "(content, run, once, has_files, put_at)"
        rows = [
            (json.dumps(each, default=str), each["run"], each.get("once"), each["kind"] in FILES, time.time())
            for each in records
        ]
        with self._changed:
            self._sql(f"INSERT OR IGNORE INTO records {columns} VALUES (?, ?, ?, ?, ?)", *rows)
            self._changed.notify_all()

    def drain(self, patience: float, most: float = float("inf")) -> bool:
        """Wait until all is delivered; at most ``most`` seconds, and ``patience`` without a delivery, or longer while a
        file is on its way. Returns whether all is.
        """
        with self._changed:
            for lane in self._lanes:
                lane.hurry, lane.failures = True, 0
            self._changed.notify_all()
            began, remind = time.monotonic(), _SILENT_SECONDS
            while self.waiting and any(thread.is_alive() for thread in self._threads):
                now = time.monotonic()
                silent = now - max(began, self._passed_at)
                enough = max(patience, _UPLOAD_SECONDS) if self._lanes[True].is_busy else patience
                fails = [lane.failures > _TRIES or not self._count("waiting", lane) for lane in self._lanes]
                if silent > enough or now - began > most or all(fails):  # it is there, and goes on failing
                    break
                if now - began > remind:
                    remind = float("inf")
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

    def _courier(self, lane: _Lane) -> None:
        while not self._closing:
            try:
                if batch := self._next(lane):
                    self._deliver_some(lane, batch)
            except OSError as error:  # a full disk: it may pass
                self._wait(lane, error)

    def _next(self, lane: _Lane) -> list[Entry]:
        """The next records of one run and kind, once there are any; none if the outbox is closing."""
        with self._changed:
            while not self._closing:
                for _, alike in groupby(self._first(lane, lane.size), _group):
                    return list(alike)
                self._changed.wait()
        return []

    def _deliver_some(self, lane: _Lane, batch: Sequence[Entry]) -> None:
        lane.is_busy = True
        failure = self._attempt(batch)
        lane.is_busy = False
        if len(batch) > 1 and failure and not isinstance(failure, Away | Gone):
            lane.size = len(batch) // 2  # which of them is to blame?
        elif failure and not isinstance(failure, Refused) and not self._is_to_blame(lane, failure):
            self._wait(lane, failure)
        else:
            self._mark(batch, failure)
            lane.size, lane.failures, lane.pause = min(2 * lane.size, lane.most), 0, _FIRST_PAUSE
            if failure and str(failure) not in self._reported and len(self._reported) < _MOST_REPORTED:
                self._reported.add(str(failure))
                self._say(f"warning: {failure}; kept in {self._path}")
            if lane.away_since is not None:
                lane.away_since = None
                self._say("MLflow is back: what has waited is being delivered")

    def _attempt(self, batch: Sequence[Entry]) -> Exception | None:
        """Deliver; what went wrong, if anything did."""
        records = [record for _, record in batch]
        if isinstance(records[0], str):
            return Refused(records[0])
        try:
            self._deliver(records)
        except Exception as error:
            return error
        return None

    def _is_to_blame(self, lane: _Lane, failure: Exception) -> bool:
        """Whether the first record fails again and again where the next one goes."""
        lane.failures += not isinstance(failure, Away)
        behind = self._first(lane, 2)[1:]
        if lane.failures < _TRIES or not behind or self._attempt(behind):
            return False
        self._mark(behind)
        return True

    def _mark(self, batch: Sequence[Entry], refusal: Exception | None = None) -> None:
        """Note that MLflow has some records, or why it refuses them."""
        state, why = ("refused", str(refusal)) if refusal else ("delivered", None)
        rows = [(state, why, number) for number, _ in batch]
        with self._changed:
            self._sql("UPDATE records SET state = ?, why = ? WHERE number = ?", *rows)
            self._passed_at = time.monotonic()
            self._changed.notify_all()

    def _wait(self, lane: _Lane, failure: Exception) -> None:
        now = time.monotonic()
        if lane.away_since is None or now - lane.away_since > _REMIND_SECONDS:
            lane.away_since, waiting = now, self._count("waiting", lane)
            self._say(f"warning: {failure}. The run goes on; {waiting} records wait in {self.directory}")
        with self._changed:
            self._changed.wait_for(lambda: self._closing or lane.hurry, lane.pause)
            lane.hurry, lane.pause = False, min(2 * lane.pause, _LONGEST_PAUSE)

    def _count(self, state: str, *lanes: _Lane) -> int:
        query = "SELECT count(*) FROM records WHERE state = ? AND has_files = ?"
        return sum(count for (count,) in self._sql(query, *((state, lane.has_files) for lane in lanes)))

    def _first(self, lane: _Lane, count: int) -> list[Entry]:
        """The first ``count`` records that wait."""
        query = "SELECT number, content FROM records WHERE state = 'waiting' AND has_files = ? ORDER BY number LIMIT ?"
        found: list[Entry] = []
        for number, content in self._sql(query, (lane.has_files, count)):
            try:
                found.append((number, as_record(json.loads(content))))
            except (ValueError, TypeError, RecursionError) as error:
                found.append((number, f"{self._path}, record {number}: {error}"))
        return found

    def _sql(self, statement: str, *rows: Sequence[Any]) -> list[Any]:
        """What a statement finds for ``rows`` of values, or does to all or to none. Raises OSError as a file would."""
        try:
            with self._changed, self._database:
                return [found for row in rows for found in self._database.execute(statement, row)]
        except sqlite3.Error as error:
            raise _as_of_a_file(error, self._path) from error

    def _adopt_lines(self, lines: Path) -> None:
        """Take over what a run left that was begun when an outbox was lines in a file."""
        if lines.exists() and not self._sql("SELECT 1 FROM records LIMIT 1", ()):
            damaged: list[str] = []
            self.put(*read_lines(lines, damaged=damaged))
            with suppress(DamagedFiles, KeyError):  # then all is delivered again, and what MLflow knows it keeps once
                note = {} if damaged else read_json(self.directory / "delivered.json")
                passed = (False, note["records"]), (True, note["files"])
                self._sql("UPDATE records SET state = 'delivered' WHERE has_files = ? AND number <= ?", *passed)


def undelivered(directory: Path, *states: str) -> bool:
    """Whether the outbox of a run that is over holds records that wait, or are in one of ``states``."""
    _check_plain(directory)
    path = directory / "records.db"
    if not path.exists():
        return (directory / "records.jsonl").exists()
    try:
        with closing(sqlite3.connect(path)) as database:
            found = {state for (state,) in database.execute("SELECT DISTINCT state FROM records")}
    except sqlite3.Error:  # named when it is opened
        return True
    return not found.isdisjoint({"waiting", *states})


def _check_plain(directory: Path) -> None:
    """Raise TrackingError if the outbox or a file of it is a link or no plain file."""
    for path in (directory, *directory.glob("*records*"), *directory.glob("delivered*")):
        if path.is_symlink() or (path != directory and not path.is_file()):
            raise TrackingError(f"{path} is a link or no plain file: nothing is read or written through it; remove it")


def _opened(path: Path, say: Say) -> sqlite3.Connection:
    """The database of an outbox, new or known. A damaged one is moved aside."""
    database = sqlite3.connect(path, timeout=20, check_same_thread=False)
    database.text_factory = lambda text: text.decode(errors="replace")
    try:
        database.executescript(_SCHEMA)
        damage = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        raise _as_of_a_file(error, path) from error
    except sqlite3.DatabaseError as error:
        damage = str(error)
    if damage == "ok":
        return database
    database.close()
    os.replace(path, path.with_suffix(".damaged"))
    say(f"warning: {path} is damaged ({damage}) and was renamed to *.damaged: what waited in it is not delivered")
    return _opened(path, say)


def _as_of_a_file(error: sqlite3.Error, path: Path) -> OSError:
    is_full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if is_full else errno.EIO, str(error), str(path))


def _group(entry: Entry) -> tuple[object, ...]:
    """Equal for records that can be delivered together."""
    number, record = entry
    return (number,) if isinstance(record, str) else (record.run, type(record))
