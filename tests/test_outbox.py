"""The outbox: nothing is lost, nothing is told twice, nobody waits for MLflow."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestration.outbox import Outbox, Record, Refused, undelivered


class Listener:
    """Stands for MLflow: it can be away, and there are things it refuses."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.sizes: list[int] = []
        self.said: list[str] = []
        self.away = False

    def deliver(self, records: Sequence[Record]) -> None:
        if self.away:
            raise ConnectionError("nobody is there")
        if any(record["number"] < 0 for record in records):
            raise Refused("no negative numbers")
        self.sizes.append(len(records))
        self.heard += [record["number"] for record in records]


@pytest.fixture
def listener() -> Listener:
    return Listener()


def box(directory: Path, listener: Listener) -> Outbox:
    return Outbox(directory / "outbox", listener.deliver, listener.said.append)


def record(number: int, kind: str = "metrics", **more: str) -> Record:
    return {"run": "a", "kind": kind, "number": number, **more}


def test_records_arrive_in_order_and_in_batches(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(*(record(number) for number in range(1000)))
    outbox.put(record(1000, "tags"))
    assert outbox.drain(10)
    assert listener.heard == list(range(1001))
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


def test_what_is_refused_is_kept_aside_and_holds_nothing_up(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(record(1, "tags"), record(-1, "image"), record(2, "tags"))
    assert outbox.drain(10)
    outbox.close()
    assert listener.heard == [1, 2]
    kept = [json.loads(line) for line in (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()]
    assert [(each["number"], each["why"]) for each in kept] == [(-1, "no negative numbers")]
    assert "no negative numbers" in listener.said[0]


def test_a_line_that_a_crash_cut_off_was_never_put(tmp_path: Path, listener: Listener) -> None:
    outbox = box(tmp_path, listener)
    outbox.put(record(1), record(2))
    assert outbox.drain(10)
    outbox.close()
    records = tmp_path / "outbox" / "records.jsonl"
    records.write_bytes(records.read_bytes() + b'{"run": "a", "kind": "met')
    again = box(tmp_path, listener)
    again.put(record(3))
    assert again.drain(10)
    again.close()
    assert listener.heard == [1, 2, 3]
    assert records.read_bytes().count(b"\n") == 3


def test_what_may_have_been_delivered_before_a_crash_is_delivered_again(tmp_path: Path, listener: Listener) -> None:
    """The position is noted after the fact: at least once, and never less."""
    outbox = box(tmp_path, listener)
    outbox.put(record(1), record(2))
    assert outbox.drain(10)
    outbox.close()
    position = tmp_path / "outbox" / "delivered.json"
    position.write_text(json.dumps(json.loads(position.read_text()) | {"records": 1}))
    assert undelivered(tmp_path / "outbox")
    again = box(tmp_path, listener)
    assert again.drain(10)
    again.close()
    assert listener.heard == [1, 2, 2]
