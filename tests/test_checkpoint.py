"""A commit is everything or nothing, and damage is noticed."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.storage import atomic
from pipelines.storage.atomic import DamagedFiles, write_json
from pipelines.storage.checkpoint import CheckpointStore, QuotaError
from tests.damage import damaged

TENSORS: dict[str, np.ndarray] = {
    "weight": np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "counts": np.array([1, 2**40]),
    "optimizer/step": np.array(7.0, dtype=np.float32),  # no dimension
}
STATE = {"prompt": "ein Käse", "history": {"cat": [0.1, 1e-300]}, "mlflow_run_id": None, "images": 2**53}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_round_trip(store: CheckpointStore) -> None:
    assert store.commit(3, TENSORS, STATE) == store.path(3)
    loaded = store.load()
    assert loaded.step == 3
    assert loaded.state == STATE
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded.tensors[name].dtype == array.dtype
        assert loaded.tensors[name].shape == array.shape
        np.testing.assert_array_equal(loaded.tensors[name], array)


def test_a_commit_of_another_run_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    own = CheckpointStore(tmp_path / "own", owners=["own", "before it was copied"])
    other = CheckpointStore(tmp_path / "other", owners=["other"])
    former = CheckpointStore(tmp_path / "former", owners=["before it was copied"])
    own.commit(1, TENSORS, {"of": "own"})
    shutil.copytree(former.commit(2, TENSORS, {"of": "former"}), own.path(2))
    shutil.copytree(other.commit(3, TENSORS, {"of": "other"}), own.path(3))
    with pytest.raises(DamagedFiles, match=r"step-000003 is a commit of another run \(id other\)"):
        own.load(3)
    assert own.newest().state == {"of": "former"}  # type: ignore[union-attr]
    assert len(own.damaged) == 1
    own.adopt(other.path(3))
    assert own.load(3).state == {"of": "other"}
    assert CheckpointStore(own.directory).load(3).state == {"of": "other"}  # a store without an owner asks nothing


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 9, 10):
        store.commit(step, TENSORS, {"step": step})
    assert store.steps() == [9, 10]
    assert [store.load(step).state["step"] for step in (9, 10)] == [9, 10]
    assert store.load().step == 10
    with pytest.raises(FileNotFoundError, match=r"no commit of step 2 \(there are: \[9, 10\]\)"):
        store.load(2)


def test_commits_stay_within_a_size(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep="1 MB")
    tensors = {"weight": np.zeros(300_000, np.uint8)}
    for step in (1, 2, 3, 4, 5):
        store.commit(step, tensors, {})
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 1_000_000
    assert store.steps() == [3, 4, 5]
    with pytest.raises(QuotaError, match=r"0\.0006 GB, .*checkpoint\.keep='1 MB' has to be 0\.0012 GB"):
        store.commit(6, {"weight": np.zeros(600_000, np.uint8)}, {})
    assert store.load().step == 5
    for step in (6, 7):
        store.commit(step, {"weight": np.zeros(490_000, np.uint8)}, {})
    assert store.steps() == [6, 7]


@pytest.mark.parametrize("keep", [1, "1.5 MB"])
def test_the_best_commit_stays(tmp_path: Path, keep: int | str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    for step in range(1, 7):
        store.commit(step, {"weight": np.zeros(400_000, np.uint8)}, {})
        store.pinned = 2 if step >= 2 else None
    assert store.steps() == ([2, 6] if keep == 1 else [2, 5, 6])


def test_a_new_store_is_empty(store: CheckpointStore) -> None:
    assert store.steps() == []
    with pytest.raises(FileNotFoundError, match="no commit"):
        store.load()


@pytest.mark.parametrize("dies_at", ["tensors.safetensors", "state.json", "manifest.json", "rename"])
def test_death_in_the_middle_leaves_the_previous_commit(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    store.commit(1, TENSORS, STATE)
    write, replace = atomic.write_durably, atomic.os.replace

    def dying_write(path: Path, content: atomic.Content) -> None:
        if path.name == dies_at:
            whole = content if isinstance(content, bytes) else b"".join(content)
            path.write_bytes(whole[: len(whole) // 2])
            raise KeyboardInterrupt
        write(path, content)

    def dying_replace(source: Path, target: Path) -> None:
        if dies_at == "rename":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_durably", dying_write)
        patch.setattr(atomic.os, "replace", dying_replace)
        with pytest.raises(KeyboardInterrupt):
            store.commit(2, TENSORS, {})
    assert store.steps() == [1]
    assert store.load().state == STATE
    store.commit(2, TENSORS, {"after": "restart"})  # what the dead writer left is no obstacle
    assert store.load().state == {"after": "restart"}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_noticed_and_named(store: CheckpointStore, name: str, damage: str) -> None:
    path = store.commit(1, TENSORS, STATE) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-2] ^= 1
        path.write_bytes(content if damage == "altered" else content[:-1])
    with pytest.raises(DamagedFiles, match=name):
        store.load()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"schema": 999, "step": 1, "sha256": {}}'])
def test_a_damaged_manifest_is_noticed(store: CheckpointStore, content: str) -> None:
    directory = store.commit(1, TENSORS, STATE)
    (directory / "manifest.json").write_text(content)
    with pytest.raises(DamagedFiles, match="step-000001"):
        store.load()


def test_a_commit_moved_to_another_step_is_noticed(store: CheckpointStore) -> None:
    shutil.copytree(store.commit(1, TENSORS, STATE), store.path(2))
    with pytest.raises(DamagedFiles, match="step-000002"):
        store.load()


def test_reading_executes_nothing(store: CheckpointStore) -> None:
    names = {path.suffix for path in store.commit(1, TENSORS, STATE).iterdir()}
    assert names == {".safetensors", ".json"}


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"reward": 0.5})

    def dying(path: Path, content: bytes) -> None:
        path.write_bytes(content[:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_durably", dying)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"reward": 0.75})
    assert json.loads(path.read_text()) == {"reward": 0.5}
    write_json(path, {"reward": 0.75})
    assert json.loads(path.read_text()) == {"reward": 0.75}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_newest_commit_that_is_whole_is_used(store: CheckpointStore) -> None:
    assert store.newest() is None
    for step in (1, 2):
        store.commit(step, TENSORS, {"step": step})
    path = store.path(2) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert [str(path) in damage for damage in store.damaged] == [True]
    (store.path(1) / "state.json").unlink()
    with pytest.raises(DamagedFiles, match=r"step-000002.*step-000001"):
        store.newest()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b"])
def test_a_manifest_that_points_outside_is_refused(store: CheckpointStore, name: str) -> None:
    store.commit(1, TENSORS, STATE)
    manifest = json.loads((store.path(1) / "manifest.json").read_text())
    manifest["sha256"][name] = "0" * 64
    (store.path(1) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFiles, match="outside of it"):
        store.load()


def test_two_hundred_damaged_commits_are_refused(store: CheckpointStore) -> None:
    store.commit(1, TENSORS, STATE)
    whole = {path: path.read_bytes() for path in store.path(1).iterdir()}
    dice, refused = random.Random(0), 0
    for _ in range(200):
        path = dice.choice(sorted(whole))
        path.write_bytes(damaged(whole[path], dice))
        damage = ""
        try:
            loaded = store.load()
        except DamagedFiles as error:
            damage = str(error)
        else:  # only white space or an unused word of the manifest has changed
            assert loaded.state == STATE
            assert all(loaded.tensors[name].tobytes() == np.asarray(TENSORS[name]).tobytes() for name in TENSORS)
        assert not damage or str(store.path(1)) in damage
        refused += bool(damage)
        path.write_bytes(whole[path])
    assert refused > 180


@pytest.mark.parametrize("dies_after", [1, 2])
def test_death_while_a_commit_is_replaced_loses_neither(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    """Between the renames, and before the old one is removed."""
    store.commit(1, TENSORS, {"which": "old"})
    replace, done = atomic.os.replace, []

    def dying(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(target)
        if len(done) == dies_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            store.commit(1, TENSORS, {"which": "new"})
    found = CheckpointStore(store.directory)
    assert found.load().state == {"which": "old" if dies_after == 1 else "new"}
    found.commit(1, TENSORS, {"which": "newest"})
    assert [path.name for path in store.directory.iterdir()] == ["step-000001"]
    assert found.load().state == {"which": "newest"}


@pytest.mark.parametrize("in_place", ["file", "pipe", "link"])
def test_what_is_no_directory_in_place_of_one_is_replaced(tmp_path: Path, in_place: str) -> None:
    target, other = tmp_path / "result", tmp_path / "other"
    other.mkdir()
    {"file": target.touch, "pipe": lambda: os.mkfifo(target), "link": lambda: target.symlink_to(other)}[in_place]()
    with pytest.raises(DamagedFiles, match=str(target)):
        atomic.read_directory(target)
    atomic.commit_directory(target, {"a": b"1"}, {})
    assert atomic.read_directory(target)[0] == {"a": b"1"}
    assert {path.name for path in tmp_path.iterdir()} == {"result", "other"}
    assert [*other.iterdir()] == []


def test_a_damaged_line_of_a_journal_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = atomic.as_lines(atomic.with_digest({"step": step, "reward/mean": 0.25}) for step in range(1, 7)).split(
        b"\n"
    )
    lines[1] = lines[1][:20]
    lines[2] = b'{"a": 1}'
    lines[3] = lines[3].replace(b"0.25", b"0.35")
    path.write_bytes(b"\n".join([*lines[:6], b'{"step": 7, "rew']))
    named: list[str] = []
    found = atomic.cut_lines(path, lambda line: line["step"] < 6, ["step"], named)
    assert found == [{"step": step, "reward/mean": 0.25} for step in (1, 5)]
    assert [text.split(" ")[0] for text in named] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert "was altered" in named[2]
    assert path.read_bytes().split(b"\n") == [lines[0], lines[4], b""]


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b'{"a": ' * 50_000, b'{"a": ' * 150 + b"1" + b"}" * 150, b'{"a": ' + b"9" * 5000 + b"}", b"\xff"],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DamagedFiles, match=r"summary\.json is damaged"):
        atomic.read_json(tmp_path / "summary.json")


def test_nothing_is_read_for_ever_or_written_through_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / ".report.partial").symlink_to(tmp_path / "large")
    for name in ("pipe", "large", "none"):
        with pytest.raises(DamagedFiles, match=name):
            atomic.read_bytes(tmp_path / name, most=4)
    with pytest.raises(OSError, match="symbolic links"):
        atomic.replace_durably(tmp_path / "report", b"new")
    assert (tmp_path / "large").read_bytes() == b"12345"
