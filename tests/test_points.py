"""A sweep's points for people, and tables that are whole wherever they are printed."""

import io
from typing import Any

import pytest

from orchestration.runs.browse import plain_table
from orchestration.runs.display import Terminal
from orchestration.runs.tables import tables


def trial(point: dict[str, Any], seed: int, status: str = "FINISHED") -> dict[str, Any]:
    return {"point": point, "seed": seed, "status": status, "step": 5}


def test_a_row_is_a_point_over_its_seeds() -> None:
    one, two = {"training.learning_rate": 1e-4}, {"training.learning_rate": 0.01}
    points = [
        {"point": one, "values": [0.5, 0.75], "mean": 0.625, "low": 0.25, "high": 1.0},
        {"point": two, "values": [], "mean": None, "low": None, "high": None},
    ]
    trials = [trial(one, 0), trial(one, 1), trial(one, 1000), trial(two, 0, "STOPPED")]
    headings, rows = tables({"metric": "reward/mean", "points": points, "trials": trials})["points, best first"]
    assert headings == ["learning_rate", "reward/mean", "seeds", "not finished"]
    assert rows == [["0.0001", "0.625 [0.25, 1]", "2", ""], ["0.01", "–", "1", "stopped at 5"]]


@pytest.mark.parametrize("summary", [{}, {"points": 3}, {"metric": "m", "points": [{}], "trials": []}, {"points": [1]}])
def test_a_damaged_summary_has_no_rows(summary: dict[str, Any]) -> None:
    assert tables(summary) == {}


def test_nothing_is_folded_in_a_pipe() -> None:
    table = plain_table(["run", "where"], [["x" * 150, "/a/long/" * 60]])
    Terminal(file=(pipe := io.StringIO())).print(table)
    Terminal(file=(narrow := io.StringIO()), width=80).print(table)
    assert len(pipe.getvalue().splitlines()) == 2
    assert len(narrow.getvalue().splitlines()) > 4


def test_a_name_is_kept_together_on_a_terminal() -> None:
    name = "training.images_per_prompt"
    table = plain_table(["key", "meaning", "more"], [[name, "many words " * 20, "and more " * 20]])
    Terminal(file=(narrow := io.StringIO()), width=60).print(table)
    lines = narrow.getvalue().splitlines()
    assert sum(name in line for line in lines) == 1
    assert " ".join(" ".join(line[len(name) :].split()) for line in lines).count("words") == 20
