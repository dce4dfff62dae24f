"""Names of files: two names never mean one file, on any file system."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.storage.names import file_name

CLOSE = st.text("aAbBäÄ12_-./ =~:", max_size=6)  # names that are easily confused
NAMES = CLOSE | st.text(max_size=400) | st.text(st.characters(categories=["Cs", "Lo", "So"]), max_size=100)


@given(NAMES, NAMES)
@example("n=10", "n-10")
@example("n=10", file_name("n=10"))
@example("a/b", "a_b")
@example("Arm", "arm")
@example("straße", "strasse")
@example("x" * 300, "x" * 301)
@example("实验一", "实验二")
def test_different_names_have_different_files_even_where_case_is_folded(one: str, other: str) -> None:
    assert (file_name(one).casefold() == file_name(other).casefold()) == (one == other)


@given(NAMES, st.sampled_from([64, 200, 255]))
@example("con.txt", 200)
@example("..", 200)
@example("", 200)
@example("-rf *", 200)
def test_a_file_name_is_one_on_every_system(name: str, most: int) -> None:
    found = file_name(name, most)
    assert 0 < len(os.fsencode(found)) <= most
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
    assert found[0] not in "-."
    assert found[-1] not in "-."
    assert found.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}
    assert found == file_name(name, most)


@pytest.mark.parametrize("name", ["fresh_10", "n-10", "lr0.001-seed3", "_x"])
def test_a_safe_name_stays(name: str) -> None:
    assert file_name(name) == name


def test_an_unsafe_name_stays_readable() -> None:
    assert file_name("n=10, größe") == "n-10-groe--" + file_name("n=10, größe")[-12:]
