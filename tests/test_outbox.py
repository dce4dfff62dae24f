"""The outbox: nothing is lost or sent twice, a run never waits for MLflow, and each record stands for itself."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.tracking import outbox as module
from orchestration.tracking.delivery import Artifact, Metrics, Record
from orchestration.tracking.outbox import Content, Outbox, undelivered
from orchestration.tracking.store import Away, Gone, Refused, TrackingError
from pipelines.storage.atomic import as_lines


class Listener:
    """Stands for MLflow: it can be away, there are things it refuses, and some it fails at without a reason."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.runs: list[tuple[str, int]] = []
        self.sizes: list[int] = []
        self.said: list[str] = []
        self.away = self.files_away = False
        self.fails_at: set[int] = set()

    def deliver(self, records: Sequence[Record]) -> None:
        if self.away:
            raise Away("nobody is there")
        if self.files_away and isinstance(records[0], Artifact):
            raise TrackingError("no bucket")
        numbers = [number_of(record) for record in records]
        if any(number in self.fails_at for number in numbers):
            raise TrackingError("HTTP 500")
        if records[0].run == "gone":
            raise Gone("the run was deleted")
        if any(number < 0 for number in numbers):
            raise Refused("no negative numbers")
        self.sizes.append(len(records))
        self.heard += numbers
        self.runs += [(record.run, number) for record, number in zip(records, numbers, strict=True)]


def number_of(record: Record) -> int:
    return record.step if isinstance(record, Metrics) else int(record.model_dump().get("under") or 0)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def box(directory: Path, listener: Listener, again: bool = False) -> Outbox:
    return Outbox(directory / "outbox", listener.deliver, listener.said.append, again)


def record(number: int, run: str = "a", **more: str) -> Content:
    return {"run": run, "kind": "metrics", "step": number, "values": {}, "timestamp_ms": 1, **more}


def tags(run: str = "a") -> Content:
    return {"run": run, "kind": "tags", "tags": {}}


def artifact(number: int, run: str = "a", path: str = "x") -> Content:
    return {"run": run, "kind": "artifact", "path": path, "under": str(number)}


def sql(directory: Path, statement: str, *values: object) -> list[tuple[str, ...]]:
    """What a crash, a disk or a stranger does to the database of an outbox, or what is in it."""
    with closing(sqlite3.connect(directory / "outbox" / "records.db")) as database, database:
        return database.execute(statement, values).fetchall()


def refused_in(directory: Path) -> list[Content]:
    found = sql(directory, "SELECT content, why FROM records WHERE state = 'refused' ORDER BY number")
    return [json.loads(content) | {"why": why} for content, why in found]


def test_records_arrive_in_order_and_in_batches(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number) for number in range(1, 1001)))
    outbox.put(tags())
    assert outbox.drain(10)
    assert listener.heard == [*range(1, 1001), 0]
    assert len(listener.sizes) < 20
    outbox.close()
    assert not undelivered(tmp_path / "outbox")


def test_what_is_told_once_is_not_told_again_even_by_another_process(tmp_path: Path, listener: Listener) -> None:
    for _ in range(2):
        outbox = box(tmp_path, listener)
        outbox.put(record(1, once="step 1"), record(2, once="step 2"), record(2, once="step 2"))
        assert outbox.knows("a", "step 2")
        assert not outbox.knows("b", "step 2")
        assert outbox.drain(10)
        outbox.close()
    assert listener.heard == [1, 2]


def test_nobody_waits_while_the_listener_is_away_and_all_arrives_when_it_is_back(
    tmp_path: Path, listener: Listener
) -> None:
    listener.away = True
    outbox = box(tmp_path, listener)
    began = time.monotonic()
    for number in range(20):
        outbox.put(record(number))
    assert not outbox.drain(0.5)
    assert time.monotonic() - began < 5
    assert "nobody is there" in listener.said[0]
    assert "records wait" in listener.said[0]
    outbox.close()
    assert undelivered(tmp_path / "outbox")

    listener.away = False
    again = box(tmp_path, listener)
    assert again.drain(10)
    assert listener.heard == list(range(20))
    again.close()


def test_what_is_refused_is_kept_aside_alone(tmp_path: Path, listener: Listener) -> None:
    listener.away = True
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number if number != 77 else -1) for number in range(1, 200)))
    listener.away = False
    assert outbox.drain(10)
    outbox.close()
    assert listener.heard == [number for number in range(1, 200) if number != 77]
    assert [(each["step"], each["why"]) for each in refused_in(tmp_path)] == [(-1, "no negative numbers")]
    assert [text for text in listener.said if "no negative numbers" in text]
    assert outbox.refused == 1


def test_a_record_that_always_fails_without_a_reason_holds_nothing_up(tmp_path: Path, listener: Listener) -> None:
    """If the next one goes it was not the server's fault; if none goes, it may pass."""
    listener.fails_at = {3, 9}
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number) for number in range(10)))
    assert not outbox.drain(1)
    assert listener.heard == [number for number in range(9) if number != 3]
    assert [each["step"] for each in refused_in(tmp_path)] == [3]
    assert outbox.waiting == 1  # the last: nothing after it tells whose fault it is
    listener.fails_at = set()
    assert outbox.drain(10)
    outbox.close()
    assert listener.heard[-1] == 9


def test_a_run_that_is_gone_takes_nothing_with_it(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number, "gone") for number in range(100)), record(1))
    assert outbox.drain(10)
    outbox.close()
    assert listener.heard == [1]
    assert len(refused_in(tmp_path)) == 100
    assert len(listener.said) == 1


def test_no_number_waits_for_an_artifact(tmp_path: Path, listener: Listener) -> None:
    listener.files_away = True
    outbox = box(tmp_path, listener)
    outbox.put(artifact(1), record(2), artifact(3), record(4))
    assert not outbox.drain(0.5)
    outbox.close()
    assert listener.heard == [2, 4]
    assert undelivered(tmp_path / "outbox")
    listener.files_away = False
    again = box(tmp_path, listener)
    assert again.drain(10)
    again.close()
    assert listener.heard == [2, 4, 1, 3]


def test_what_was_refused_is_tried_again_if_asked(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(record(-1, once="a"), record(1))
    assert outbox.drain(10)
    outbox.close()
    listener.deliver = lambda records: listener.heard.extend(map(number_of, records))  # type: ignore[method-assign]
    again = box(tmp_path, listener, again=True)
    assert again.drain(10)
    again.close()
    assert listener.heard == [1, -1]
    assert not refused_in(tmp_path)


def test_what_may_have_been_delivered_before_a_crash_is_delivered_again(tmp_path: Path, listener: Listener) -> None:
    """A delivery is acknowledged after the fact: at least once, and never less."""
    outbox = box(tmp_path, listener)
    outbox.put(record(1), record(2), {"run": "a", "kind": "image", "files": ["x.png"]})
    assert outbox.drain(10)
    outbox.close()
    listener.heard.clear()
    sql(tmp_path, "UPDATE records SET state = 'waiting' WHERE number > 1")
    assert undelivered(tmp_path / "outbox")
    again = box(tmp_path, listener)
    assert again.drain(10)
    again.close()
    assert sorted(listener.heard) == [0, 2]
    assert not undelivered(tmp_path / "outbox")


WRITER = """
import sys
from pathlib import Path
from orchestration.tracking.outbox import Outbox

place, start = Path(sys.argv[1]), int(sys.argv[2])
heard, put = (open(place / name, "a", buffering=1) for name in ("heard", "put"))
outbox = Outbox(place / "outbox", lambda records: heard.write("".join(f"{each.step}\\n" for each in records)), print)
for number in range(start, 10**6):
    step = {"run": "a", "kind": "metrics", "once": str(number), "step": number, "values": {}, "timestamp_ms": 1}
    outbox.put(step)
    put.write(f"{number}\\n")
"""


def test_sigkill_loses_nothing_that_was_put(tmp_path: Path, listener: Listener) -> None:
    """At any moment, with what was put last put once more, as a resume does: all arrives, in order."""
    numbers = lambda name: [int(line) for line in (tmp_path / name).read_text().split()]  # noqa: E731
    start = 0
    for more in (20, 1, 30):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(max(0, start - 3))])
        while not (tmp_path / "put").exists() or len(numbers("put")) < start + more:
            assert writer.poll() is None
            time.sleep(0.01)
        writer.kill()
        writer.wait()
        start = max(numbers("put")) + 1
    outbox = box(tmp_path, listener)
    assert outbox.drain(10)
    outbox.close()
    heard = list(dict.fromkeys(numbers("heard") + listener.heard))
    assert set(range(start)) <= set(heard)
    assert heard == sorted(heard)


BAD_CONTENTS = [
    b'{"a": 1}',
    b"garbage",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"run": "a", "kind": ["image"], "once": {}}',
    b'{"run": "a", "kind": "uri"}',
    b'{"run": "a", "kind": "deliver", "records": []}',
    b'{"run": "a/b", "kind": "tags", "tags": {}}',
    b'{"run": "a", "kind": "status", "status": "DONE", "timestamp_ms": 1}',
    b'{"run": "a", "kind": "metrics", "step": 9223372036854775808, "values": {}, "timestamp_ms": 1}',
    b'{"run": "a", "kind": "metrics", "step": 1, "values": {"a": "b"}, "timestamp_ms": 1}',
    b'{"run": "a", "kind": "metrics", "step": 1, "values": {}, "timestamp_ms": -1}',
    b'{"run": "a", "kind": "artifact", "path": "/etc/passwd", "under": ""}',
    b'{"run": "a", "kind": "artifact", "path": "../x", "under": ""}',
    b'{"run": "a", "kind": "artifact", "path": "x", "under": "a/../../b"}',
    b'{"run": "a", "kind": "image", "files": ["../x.png"]}',
    b'{"run": "a", "kind": "image", "files": ["/x.png"]}',
    b'{"run": "a", "kind": "image", "files": ["records.db"]}',
    7,
    1e400,
    None,
]


@pytest.mark.parametrize("content", BAD_CONTENTS)
@pytest.mark.parametrize("delivered", [False, True])
def test_what_is_no_record_is_named_and_all_else_goes_on(
    tmp_path: Path, listener: Listener, content: object, delivered: bool
) -> None:
    listener.away = not delivered
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number, once=f"step {number}") for number in range(5)))
    assert outbox.drain(0.1) is delivered
    outbox.close()
    sql(tmp_path, "UPDATE records SET content = CAST(? AS TEXT) WHERE number = 3", content)
    listener.away = False
    again = box(tmp_path, listener)
    again.put(record(4, once="step 4"), record(5, once="step 5"))
    assert again.drain(10)
    again.close()
    assert listener.heard == ([0, 1, 2, 3, 4, 5] if delivered else [0, 1, 3, 4, 5])
    if not delivered:
        place = f"{tmp_path / 'outbox' / 'records.db'}, record 3: "
        assert place in listener.said[-1]
        refused = sql(tmp_path, "SELECT number, why LIKE ? FROM records WHERE state = 'refused'", f"{place}%")
        assert refused == [(3, 1)]


@pytest.mark.parametrize("damage", ["garbage", "cut off", "a page of zeros"])
def test_a_damaged_outbox_is_named_and_the_run_goes_on(tmp_path: Path, listener: Listener, damage: str) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number, once=str(number)) for number in range(100)))
    assert outbox.drain(10)
    outbox.close()
    path = tmp_path / "outbox" / "records.db"
    content = path.read_bytes()
    match damage:
        case "garbage":
            path.write_bytes(b"garbage" * 1000)
        case "cut off":
            path.write_bytes(content[: len(content) // 2])
        case _:
            path.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    again = box(tmp_path, listener)
    again.put(record(200))
    assert again.drain(10)
    again.close()
    assert listener.heard == [*range(100), 200]
    assert f"warning: {path} is damaged" in listener.said[0]
    assert path.with_suffix(".damaged").exists()


NOTE = '{"records": 2, "files": 1, "began": 1.0}'


@pytest.mark.parametrize(("note", "damage"), [(NOTE, b""), ("garbage", b""), (None, b""), (NOTE, b"garbage\n")])
def test_an_outbox_of_lines_is_taken_over(tmp_path: Path, listener: Listener, note: str | None, damage: bytes) -> None:
    """As runs left it that were begun before it was a database."""
    (tmp_path / "outbox").mkdir()
    lines = [record(1, once="step 1"), artifact(2), record(3, once="step 3")]
    (tmp_path / "outbox" / "records.jsonl").write_bytes(damage + as_lines(lines))
    if note:
        (tmp_path / "outbox" / "delivered.json").write_text(note)
    assert undelivered(tmp_path / "outbox")
    for _ in range(2):
        outbox = box(tmp_path, listener)
        outbox.put(record(1, once="step 1"))
        assert outbox.drain(10)
        outbox.close()
    assert sorted(listener.heard) == ([2, 3] if note == NOTE and not damage else [1, 2, 3])
    assert not undelivered(tmp_path / "outbox")


@pytest.mark.parametrize("name", ["records.db", "records.db-journal", "records.jsonl", "delivered.json", ""])
def test_nothing_is_read_or_written_through_a_link(tmp_path: Path, listener: Listener, name: str) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "outbox").mkdir()
    if name:
        victim.write_text("mine\n")
        (tmp_path / "outbox" / name).symlink_to(victim)
    else:
        (tmp_path / "outbox").rmdir()
        victim.mkdir()
        (tmp_path / "outbox").symlink_to(victim)
    with pytest.raises(TrackingError, match="is a link"):
        box(tmp_path, listener)
    assert victim.read_text() == "mine\n" if name else not list(victim.iterdir())


def test_a_pipe_in_its_place_hangs_nothing(tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "outbox").mkdir()
    os.mkfifo(tmp_path / "outbox" / "records.db")
    with pytest.raises(TrackingError, match="no plain file"):
        box(tmp_path, listener)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


STEP = st.tuples(st.sampled_from("ab"), st.sampled_from(["metrics", "artifact", "garbage"]), st.booleans())


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(sessions=st.lists(st.lists(STEP, max_size=12), min_size=1, max_size=4), patient=st.booleans())
def test_whatever_is_refused_each_record_stands_for_itself(
    scratch: Path, sessions: list[list[tuple[str, str, bool]]], patient: bool
) -> None:
    """Refusals anywhere, in runs and kinds, with restarts in between: what is accepted arrives once and in the order of
    its run, and what is refused, and nothing else, is set aside."""
    directory, listener = Path(tempfile.mkdtemp(dir=scratch)), Listener()
    number, accepted, refused = 0, [], []
    for session in sessions:
        outbox = box(directory, listener)
        for run, kind, good in session:
            number += 1
            signed = number if good else -number
            if kind == "garbage":
                outbox.put({"run": run, "kind": kind, "number": number})
            else:
                outbox.put(record(signed, run) if kind == "metrics" else artifact(signed, run))
            if good and kind != "garbage":
                accepted.append((run, kind, number))
            else:
                refused.append(number)
        if patient:
            assert outbox.drain(10)
        outbox.close()
        for thread in outbox._threads:
            thread.join(10)
    last = box(directory, listener)
    assert last.drain(10)
    last.close()
    for run in "ab":
        for kind in ("metrics", "artifact"):
            wanted = [number for of, what, number in accepted if (of, what) == (run, kind)]
            assert [n for of, n in listener.runs if of == run and n in wanted] == wanted
    assert sorted(listener.heard) == [number for *_, number in accepted]
    kept = [each.get("step") or each.get("under") or each["number"] for each in refused_in(directory)]
    assert sorted(abs(int(each)) for each in kept) == refused
    assert not undelivered(directory / "outbox")
