"""A sweep's points for people, and tables that are whole wherever they are printed."""

import io
import shlex
from typing import Any

import pytest

from orchestration.experiments.registry import EXPERIMENTS
from orchestration.runs.config import load_config
from orchestration.runs.display import Terminal, plain_table
from orchestration.runs.tables import best_of, tables


def trial(point: dict[str, Any], seed: int, status: str = "FINISHED") -> dict[str, Any]:
    is_broken = status == "FAILED"
    found = {"value": None if is_broken else 0.25, "error": "it broke" if is_broken else None}
    return {"point": point, "seed": seed, "status": status, "step": 5, **found}


def test_a_row_is_a_point_over_its_seeds() -> None:
    one, two, three = ({"training.learning_rate": rate} for rate in (1e-4, 0.01, 0.1))
    points = [
        {"point": one, "values": [0.5, 0.75], "mean": 0.625, "low": 0.25, "high": 1.0, "complete": True},
        {"point": two, "values": [0.9], "mean": 0.9, "low": None, "high": None, "complete": False},
        {"point": three, "values": [], "mean": None, "low": None, "high": None, "complete": False},
    ]
    trials = [trial(one, 0), trial(one, 1), trial(one, 1000), trial(two, 0, "STOPPED"), trial(three, 0, "FAILED")]
    found = tables({"metric": "reward/mean", "points": points, "trials": trials})
    headings, rows = found["points, best first"]
    assert headings == ["rank", "learning_rate", "reward/mean", "95 % interval", "seeds", "not finished"]
    assert rows == [
        ["1", "0.0001", "0.625", "[0.25, 1]", "2", ""],
        ["–", "0.01", "0.9", "none: one seed", "1", "stopped at 5"],  # however good it was
        ["–", "0.1", "–", "–", "1", "failed at 5"],
    ]
    _, rows = found["trials that did not finish"]
    assert [row[2:] for row in rows] == [["stopped", "5", "0.25", ""], ["failed", "5", "–", "it broke"]]


def test_a_point_says_why_it_has_no_interval() -> None:
    def said(metric: str, values: list[float], low: float | None = None) -> str:
        point = {"point": {"a.rate": 1, "b.rate": 2}, "values": values, "mean": 1.0, "low": low, "high": low}
        trials = [trial(point["point"], seed) for seed in range(len(values))]  # type: ignore[arg-type]
        cells = tables({"metric": metric, "points": [{**point, "complete": True}], "trials": trials})
        assert cells["points, best first"][0][1:3] == ["a.rate", "b.rate"]  # two of one name
        return cells["points, best first"][1][0][4]

    assert said("reward/mean", [1.0]) == "none: one seed"
    assert said("w2_squared", [1.0] * 3) == "none: 3 of the 30 seeds it takes"
    assert said("evaluator/full", [1.0] * 3) == "none: seeds alike, or too far apart"
    assert said("reward/mean", [1.0, 2.0], 1.5) == "[1.5, 1.5]"


def test_the_command_of_the_best_point_is_its_configuration() -> None:
    """Also through a shell, and whatever a summary holds it is one command."""
    settings = {
        "prompts": "it's; rm -rf ~ $(date)",
        "name": "7",
        "training.learning_rate": 1e-05,
        "training.steps": 30,
        "reward.function": "a:b",
        "model.path": "yes",
        "seed": 3,
        "captioner.path": None,
    }
    best = {"point": {"training.learning_rate": 1e-05}, "values": [0.5], "mean": 0.5, "low": None, "high": None}
    best |= {"trial": "t", "settings": settings}
    found = best_of({"best": best, "metric": "reward/mean", "loop": "ddpo", "config": "a file.yaml"})
    words = shlex.split(found["command"])
    assert words[:4] == ["ouroboros", "ddpo", "--config", "a file.yaml"]
    schema = EXPERIMENTS["ddpo"].schema
    assert load_config(schema, None, words[4:]) == load_config(schema, None, values=settings)
    assert found["best point"] == "learning_rate=1e-05"
    assert (found["reward/mean"], found["95 % interval"]) == ("0.5", "none: one seed")
    assert best_of({"best": None, "metric": "m"})["best point"].startswith("none yet")
    assert best_of({}) == best_of({"best": 3, "metric": "m"}) == {}


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
