"""What MLflow is to be told, kept in the run's directory until it has been: tracking never holds up training.

A record is on the disk before :meth:`Outbox.put` returns. A thread delivers the records in order. While MLflow is away
it tries again, without end; what MLflow refuses is set aside and told, and the rest goes on. How far it has come is
kept too, but noted after the fact: what a crash lets it deliver twice has to be the same the second time, and MLflow
then holds it once.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.atomic import append_durably, as_lines, cut_lines, write_json

Record = dict[str, Any]  # run: MLflow's id; kind; once: what it tells, if it may be told once; what the kind needs
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two tries
_REMIND_SECONDS = 300.0
_BATCH = 200  # records of one kind and run that are delivered together


class Refused(RuntimeError):  # noqa: N818
    """MLflow will not take this record, however often it is asked."""


class Outbox:
    """The records of one run's directory. ``deliver`` tells MLflow some of one run and kind; ``say`` tells people."""

    def __init__(
        self, directory: Path, deliver: Callable[[Sequence[Record]], None], say: Callable[[str], None]
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._position = directory / "records.jsonl", directory / "delivered.json"
        self._deliver, self._say = deliver, say
        known = cut_lines(self._path)  # a last one that was cut off was never put
        self._told = {_identity(record) for record in known if "once" in record}
        if not self._position.exists():
            write_json(self._position, {"records": 0, "began": time.time()})
        position = json.loads(self._position.read_text())
        self._delivered, self.began = position["records"], position["began"]  # began: seconds since the epoch
        self._waiting = deque(known[self._delivered :])
        self._changed = threading.Condition()
        self._closing = self._hurry = False
        self._away_since: float | None = None
        self._thread = threading.Thread(target=self._courier, name="MLflow courier", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many records are still to be delivered."""
        return len(self._waiting)

    def knows(self, run: str, once: str) -> bool:
        """Whether this was put already."""
        return (run, once) in self._told

    def put(self, *records: Record) -> None:
        """Keep records for delivery. They are on the disk when this returns. One with a known ``once`` adds nothing."""
        with self._changed:
            new = []
            for record in records:
                if "once" in record:
                    if _identity(record) in self._told:
                        continue
                    self._told.add(_identity(record))
                new.append(record)
            append_durably(self._path, as_lines(new))
            self._waiting.extend(new)
            self._changed.notify_all()

    def drain(self, patience: float, most: float = float("inf")) -> bool:
        """Wait until all is delivered; at most ``most`` seconds, and ``patience`` without a delivery.

        Returns whether all is.
        """
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            began = since = time.monotonic()
            seen = self._delivered
            while self._waiting and self._thread.is_alive():
                now = time.monotonic()
                if self._delivered != seen:
                    seen, since = self._delivered, now
                if now - since > patience or now - began > most:
                    break
                self._changed.wait(0.1)
        return not self._waiting

    def close(self) -> None:
        """Stop delivering; the rest waits on the disk."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_LONGEST_PAUSE if not self._waiting else 0)  # it may hang in a call to a silent server

    def _courier(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                batch = self._batch()
            try:
                try:
                    self._deliver(batch)
                except Refused as error:
                    with (self.directory / "refused.jsonl").open("a") as file:
                        file.writelines(json.dumps({**record, "why": str(error)}) + "\n" for record in batch)
                    self._say(f"warning: {error}; kept in {file.name}")
                self._note_delivered(len(batch))
            except Exception as error:  # away, overloaded, not letting us in, a full disk: all may pass
                self._tell_away(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._hurry, pause)
                    self._hurry = False
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE

    def _batch(self) -> list[Record]:
        """The next records of one run and kind."""
        first = self._waiting[0]
        batch: list[Record] = []
        for record in self._waiting:
            if (record["run"], record["kind"]) != (first["run"], first["kind"]) or len(batch) == _BATCH:
                break
            batch.append(record)
        return batch

    def _note_delivered(self, count: int) -> None:
        with self._changed:
            write_json(self._position, {"records": self._delivered + count, "began": self.began})
            self._delivered += count
            for _ in range(count):
                self._waiting.popleft()
            self._changed.notify_all()
        if self._away_since is not None:
            self._away_since = None
            self._say("MLflow is back: what has waited is being delivered")

    def _tell_away(self, error: Exception) -> None:
        now = time.monotonic()
        if self._away_since is None or now - self._away_since > _REMIND_SECONDS:
            self._away_since = now
            self._say(f"warning: {error}. The run goes on; {len(self._waiting)} records wait in {self.directory}")


def undelivered(directory: Path) -> bool:
    """Whether the outbox of a run that is over holds something that MLflow was not told."""
    records, position = directory / "records.jsonl", directory / "delivered.json"
    if not (records.exists() and position.exists()):
        return False
    return records.read_bytes().count(b"\n") > json.loads(position.read_text())["records"]


def _identity(record: Record) -> tuple[str, str]:
    return record["run"], record["once"]
