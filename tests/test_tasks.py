"""Content-addressed tasks: the same work has the same name, and what was done is not done again."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.storage.atomic import packed
from pipelines.storage.tasks import Task, TaskStore, in_order
from tests.damage import damaged


@pytest.fixture
def store(tmp_path: Path) -> TaskStore:
    return TaskStore(tmp_path / "tasks")


def chain(length: int, **parameters: Any) -> list[Task]:
    tasks: list[Task] = []
    for number in range(length):
        tasks.append(Task("fit", {"number": number, **parameters}, tuple(tasks[-1:])))
    return tasks


def test_a_key_depends_on_what_the_result_depends_on_and_on_nothing_else() -> None:
    task = Task("fit", {"a": 1, "b": [1.5, None]}, (Task("data", {}),))
    assert task.key == Task("fit", {"b": [1.5, None], "a": 1}, (Task("data", {}),), label="x", kept=False).key
    others = [
        Task("measure", {"a": 1, "b": [1.5, None]}, (Task("data", {}),)),
        Task("fit", {"a": 2, "b": [1.5, None]}, (Task("data", {}),)),
        Task("fit", {"a": 1, "b": [1.5, None]}, ()),
        Task("fit", {"a": 1, "b": [1.5, None]}, (Task("data", {"changed": True}),)),
    ]
    assert len({task.key, *(other.key for other in others)}) == 5


def same(one: Any, other: Any) -> bool:
    """Equal content: numbers by value, but True is not 1; a list may be a tuple."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


NUMBERS = (
    st.sampled_from([0, 1, -1, 1000, 2**53, 10**20, 0.001, 1e-300])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)
CONTENT = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(["", "a", "1", "a,b", '"', "None", "1.0"])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "1", "", ":"]), inner, max_size=3)
    ),
    max_leaves=8,
)
PARAMETERS = st.dictionaries(st.sampled_from(["a", "b", "ab", "1"]), CONTENT, max_size=3)


def written_otherwise(content: Any, dice: random.Random) -> Any:
    """The same content with whole numbers as floats, lists as tuples and keys in another order, by chance."""
    if isinstance(content, dict):
        keys = sorted(content, key=lambda _: dice.random())
        return {key: written_otherwise(content[key], dice) for key in keys}
    if isinstance(content, list | tuple):
        return dice.choice([list, tuple])(written_otherwise(each, dice) for each in content)
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) < 2**53:
        return dice.choice([int, float])(content)
    return -0.0 if content == 0 and isinstance(content, float) else content


@settings(max_examples=80, deadline=None)
@given(PARAMETERS, PARAMETERS, st.sampled_from(["fit", "sample"]), st.randoms(use_true_random=False))
def test_tasks_share_a_key_if_and_only_if_they_are_equal(
    one: dict[str, Any], other: dict[str, Any], kind: str, dice: random.Random
) -> None:
    task = Task("fit", one)
    assert (task.key == Task(kind, other).key) == (kind == "fit" and same(one, other))
    assert task.key == Task("fit", written_otherwise(one, dice)).key
    assert task.key == Task("fit", json.loads(json.dumps(one))).key
    assert task.key != Task("fit", one, (task,)).key


def test_a_parameters_name_is_text() -> None:
    """JSON would write the names 1 and "1" alike."""
    with pytest.raises(TypeError, match="are text"):
        Task("fit", {"shares": {1: 0.5}})


def test_order_puts_inputs_first_and_each_key_once() -> None:
    long = chain(3000)  # deeper than Python's stack
    twin = chain(3000)
    ordered = list(in_order([long[-1], twin[-1], long[5]]))
    assert [task.key for task in ordered] == [task.key for task in long]


def test_what_is_stored_is_read_back_with_what_made_it(store: TaskStore) -> None:
    first, second = chain(2)
    files = {"model.bin": b"\x00\x01", "folder/state.json": b"{}"}
    store.commit(second, files, {"cpu_seconds": 1.5})
    assert second.key in store
    assert first.key not in store
    assert store.load(second.key) == files
    about = store.about(second.key)
    assert about["kind"] == "fit"
    assert about["inputs"] == [first.key]
    assert about["cpu_seconds"] == 1.5


@pytest.fixture
def done(store: TaskStore) -> list[Task]:
    tasks = chain(4)
    for task in tasks:
        store.commit(task, {"model.bin": task.key.encode()}, {})
    return tasks


def test_only_what_is_missing_is_to_do(store: TaskStore, done: list[Task]) -> None:
    assert store.to_do(done) == set()
    longer = chain(6)
    assert store.to_do(longer) == {task.key for task in longer[4:]}


def test_damaged_results_are_made_again(store: TaskStore, done: list[Task]) -> None:
    (store.path(done[1].key) / "model.bin").write_bytes(b"something else")
    (store.path(done[2].key) / "manifest.json").write_text("{")
    assert store.to_do(done) == {done[1].key, done[2].key}


def test_two_hundred_damaged_data_sets_are_made_again(store: TaskStore) -> None:
    """Samples as they are stored. What is accepted all the same has every file as it was."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    rows = {"image": list(images), "label": list(range(20))}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    task, files = Task("sample", {"seed": 1}), packed(data.save_to_disk)
    store.commit(task, files, {})
    whole = {path: path.read_bytes() for path in store.path(task.key).rglob("*") if path.is_file()}
    dice, refused = random.Random(0), 0
    for _ in range(200):
        path = dice.choice(sorted(whole))
        path.write_bytes(damaged(whole[path], dice))
        if store.to_do([task]):
            refused += 1
        else:
            assert store.load(task.key) == files
        path.write_bytes(whole[path])
    assert refused > 180


def test_a_result_put_in_anothers_place_is_made_again(store: TaskStore, done: list[Task]) -> None:
    shutil.rmtree(store.path(done[1].key))
    shutil.copytree(store.path(done[2].key), store.path(done[1].key))
    assert store.to_do(done) == {done[1].key}


def test_forgotten_results_are_made_again_only_for_someone_who_reads_them(store: TaskStore, done: list[Task]) -> None:
    for task in done[:3]:
        store.forget(task.key)
    assert store.load(done[0].key) == {}
    assert store.to_do(done) == set()
    longer = chain(5)
    assert store.to_do(longer) == {longer[4].key}  # it reads the last one, whose files are there
    store.forget(done[3].key)
    assert store.to_do(longer) == {task.key for task in longer}
