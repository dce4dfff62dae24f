"""Arrays that go part by part: safetensors reads what is written, and each part is fetched once."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from pipelines.storage import tensor_files
from pipelines.storage.atomic import DamagedFiles, commit_directory, pieces_of
from pipelines.storage.checkpoint import CheckpointStore
from pipelines.storage.tensor_files import StreamedTensors, encoded, outline_of, parts, sizes, tensor_file

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "flag": np.array([True, False, True]),
    "step": np.array(3.0, np.float32),
    "matrix": RNG.normal(size=(5, 7)).astype(np.float32),
    "wide": RNG.normal(size=(2, 3)),
    "empty": np.empty((0, 4), np.float16),
    "transposed": RNG.integers(0, 9, (3, 4)).astype(np.int64).T,
}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == each.dtype and found[name].shape == each.shape and np.array_equal(found[name], each)
        for name, each in expected.items()
    )


def test_safetensors_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    size, content = encoded(ARRAYS)
    whole = b"".join(content)
    assert len(whole) == size
    assert same(load(whole), ARRAYS)
    save_file({name: np.ascontiguousarray(each).reshape(each.shape) for name, each in ARRAYS.items()}, tmp_path / "x")
    assert same(dict(tensor_file(tmp_path / "x")), ARRAYS)
    assert same(load_file(tmp_path / "x"), ARRAYS)


def test_each_part_is_fetched_once_and_none_is_held_beside_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state of twelve parts is committed, read and copied: never more than one part is there."""
    monkeypatch.setattr(tensor_files, "PART", 1_000)
    arrays = {f"weight {n}": np.full(100, n, np.float32) for n in range(24)}
    fetched: list[list[str]] = []

    def fetch(names: list[str]) -> list[np.ndarray]:
        assert not streamed._held
        fetched.append(names)
        return [arrays[name] for name in names]

    streamed = StreamedTensors(outline_of(arrays), fetch)
    assert len(streamed) == 24
    store = CheckpointStore(tmp_path)
    store.commit(1, streamed, {})
    assert fetched == list(parts(sizes(outline_of(arrays))))
    assert {len(names) for names in fetched} == {2}
    read = store.load(1).tensors
    assert isinstance(read, StreamedTensors)
    assert not read._held
    assert same(dict(read), arrays)
    assert len(read._held) == 2
    other = CheckpointStore(tmp_path / "other")
    assert other.adopt(store.path(1)) == 1
    assert same(dict(other.load().tensors), arrays)


def test_an_array_larger_than_a_part_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "PART", 1_000)
    shapes = {"small": 10, "large": 5_000, "half": 125, "other half": 125, "more": 1}
    outline = {name: ("float32", (size,)) for name, size in shapes.items()}
    assert list(parts(sizes(outline))) == [["small"], ["large"], ["half", "other half"], ["more"]]
    assert list(parts({})) == []


def test_a_copy_of_what_was_altered_is_not_made(tmp_path: Path) -> None:
    commit_directory(tmp_path / "one", {"a": [b"x" * 10, b"y"], "b": b""}, {"step": 1})
    (tmp_path / "one" / "a").write_bytes(b"x" * 10 + b"z")
    with pytest.raises(DamagedFiles, match="one/a does not match"):
        commit_directory(tmp_path / "two", pieces_of(tmp_path / "one"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
