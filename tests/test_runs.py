"""Run directories read back: whole, half-written, damaged and foreign ones."""

import fcntl
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from rich.console import Console, RenderableType

from orchestration.runs.browse import (
    RunInfo,
    differing_keys,
    facts,
    find_run,
    list_runs,
    remove,
    render_compare,
    render_list,
    render_show,
)
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import SCHEMAS, read_manifest, read_summary
from pipelines.storage.atomic import DamagedFiles

SUMMARY = {
    "reward_before": 0.81,
    "reward_after": 0.93,
    "evaluator_accuracy_before": 0.55,
    "evaluator_accuracy_after": 0.75,
    "images": 20480,
    "steps": 80,
    "wall_seconds": 277.4,
    "weights_sha256": "f" * 64,
    "seconds_by_stage": {"sample": 110.0, "learn": 150.5},
}


ROWS = {  # of the list, by the step whose evaluation comes next
    0: ["–", "–"],
    10: ["0.500", "→", "–", "0.400", "→", "–"],
    20: ["0.500", "→", "0.600", "0.400", "→", "0.420"],
    30: ["0.500", "→", "0.700", "0.400", "→", "0.450"],
}


def make_run(root: Path, name: str, summary: dict[str, Any] | None = None, **manifest: Any) -> Path:
    directory = root / name
    directory.mkdir(parents=True)
    content = {
        "name": name,
        "loop": "ddpo",
        "created": "2026-01-01T10:00:00",
        "status": "FINISHED",
        "git_commit": "abc123",
        "mlflow_run_id": "0" * 32,
        "resolved": {"micro_batch": 64},
        "committed_step": 80,
        "total_steps": 80,
        "config": {"training": {"steps": 80, "learning_rate": 1e-4}, "reward": {"function": "sentence_cosine"}},
        **manifest,
    }
    (directory / "manifest.json").write_text(json.dumps(content))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def text_of(renderable: RenderableType, width: int = 120) -> str:
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(renderable)
    return written.getvalue()


def row_of(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{first} ")]
    return line.split()


def test_a_finished_run(tmp_path: Path) -> None:
    run = RunInfo(make_run(tmp_path, "calm-heron", SUMMARY))
    assert (run.name, run.loop, run.status) == ("calm-heron", "ddpo", "FINISHED")
    told = facts(run)
    assert (told["step"], told["wall time"]) == ("80/80", "4m37s")
    assert (told["reward"], told["held-out accuracy"]) == ("0.810 → 0.930", "0.550 → 0.750")


def test_a_running_run_is_read_from_its_evaluations(tmp_path: Path) -> None:
    """Before is before the first step, not the first interim evaluation; what was trained on is no result."""
    directory = make_run(tmp_path, "going", status="RUNNING", committed_step=23, wall_seconds=60.2)
    (directory / "metrics.jsonl").write_text(
        '{"step": 10, "reward/mean": 0.1, "evaluator/full": 0.42}\n{"step": 11, "r'
    )
    (directory / "evaluations").mkdir()
    for step, (reward, full) in {0: (0.5, 0.4), 10: (0.6, 0.42), 20: (0.7, 0.45)}.items():
        row = row_of(text_of(render_list([RunInfo(directory)])), "going")
        assert row == ["going", "RUNNING", "23/80", *ROWS[step], "1m00s"]
        measured = {"evaluation/reward": reward, "evaluator/full": full}
        (directory / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(measured))
    assert row_of(text_of(render_list([RunInfo(directory)])), "going")[3:9] == ROWS[30]
    (directory / "evaluations" / "step-000000.json").write_text("{")
    run = RunInfo(directory)
    assert row_of(text_of(render_list([run])), "going")[3:6] == ["–", "→", "0.700"]
    assert "step-000000.json" in run.damaged[0]


def test_no_evaluator_is_not_a_number_from_elsewhere(tmp_path: Path) -> None:
    summary = {**SUMMARY, "evaluator_accuracy_before": None, "evaluator_accuracy_after": None}
    run = RunInfo(make_run(tmp_path, "blind", summary))
    assert facts(run)["held-out accuracy"] is None
    assert row_of(text_of(render_list([run])), "blind")[-2:] == ["–", "4m37s"]


def test_the_list_survives_damaged_and_foreign_directories(tmp_path: Path) -> None:
    make_run(tmp_path, "older", SUMMARY, created="2026-01-01T12:00:00")
    make_run(tmp_path, "newer", SUMMARY, created="2026-01-02T10:00:00")
    (tmp_path / "no-manifest").mkdir()
    (tmp_path / "file").write_text("x")
    contents = {"cut": b'{"name": "cut", "sta', "list": b"[1]", "empty": b"", "bytes": b"\xff\xfe\x00"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(content)
    odd = make_run(
        tmp_path, "odd", {"reward_before": "high", "wall_seconds": [1]}, committed_step="x", config=[1], status=3
    )
    (odd / "metrics.jsonl").write_bytes(b'1\n"x"\nnull\n\xff\n{"reward/mean": "x"}\n')

    runs = list_runs(tmp_path)
    assert [run.directory.name for run in runs][:2] == ["newer", "older"]
    assert {run.directory.name for run in runs} == {"older", "newer", "cut", "list", "empty", "bytes", "odd"}
    assert {run.status for run in runs if run.directory.name in {*contents, "odd"}} == {"unreadable"}
    text = text_of(render_list(runs))
    assert row_of(text, "cut") == ["cut", "unreadable", "–", "–", "–", "–"]
    for run in runs:
        assert run.directory.name in text_of(render_show(run.directory.name, tmp_path))
    assert "unreadable" in text_of(render_compare([run.directory.name for run in runs], tmp_path), width=300)


CLAIM = {"sentence": "s", "metric": "m", "arm": "a", "direction": "at most", "bound": 1.0, "control": None}
CLAIM |= {"kind": "ratio", "scale": None, "outcome": "kept", "value": 0.5, "low": None, "high": None, "seeds": 3}
CLAIM |= {"reason": ""}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("manifest", {"loop": None}, "loop"),
    ("manifest", {"config": [1]}, "config"),
    ("manifest", {"schema_version": 2}, "schema_version"),
    ("manifest", {"committed_step": True}, "committed_step"),
    ("manifest", {"committed_step": 1.0}, "committed_step"),
    ("manifest", {"committed_step": 2**60}, "committed_step"),
    ("manifest", {"wall_seconds": math.nan}, "wall_seconds"),
    ("manifest", {"wall_seconds": -1}, "wall_seconds"),
    ("manifest", {"mlflow_children": {"a": 1}}, "mlflow_children.a"),
    ("manifest", {"inputs": {"prompts": {"sha256": "0"}}}, "inputs.prompts.path"),
    ("manifest", {"real_images": {"sha256": "0", "samples": 1, "pool": 1, "classes": 1, "more": 1}}, "real_images"),
    ("summary", {"reward_before": "high"}, "reward_before"),
    ("summary", {"reward_before": math.inf}, "reward_before"),
    ("summary", {"arms": {"a": 1}}, "arms.a"),
    ("summary", {"claims": [CLAIM | {"outcome": "won"}]}, "claims.0.outcome"),
    ("summary", {"claims": [CLAIM | {"more": 1}]}, "claims.0"),
    ("summary", {"claims": [{"sentence": "s"}]}, "claims.0.metric"),
]


@pytest.mark.parametrize(("name", "change", "place"), BAD)
def test_what_does_not_keep_to_the_published_schemas_is_not_read(
    tmp_path: Path, name: str, change: dict[str, Any], place: str
) -> None:
    run = make_run(tmp_path, "run", {**SUMMARY, "claims": [CLAIM]})
    for schema in SCHEMAS.glob("*.json"):
        Draft202012Validator.check_schema(json.loads(schema.read_text()))
    assert (read_manifest(run)["loop"], read_summary(run)["images"]) == ("ddpo", 20480)
    path = run / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, DamagedFiles), match=rf"{name}\.json is damaged: {place} is (not of |missing)"):
        read_manifest(run), read_summary(run)


def test_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "missing") == []
    assert text_of(render_list([])).strip() == "no runs"


def test_a_run_is_found_by_name_and_by_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_run(tmp_path / "runs", "calm-heron", SUMMARY)
    monkeypatch.chdir(tmp_path)
    for run in ("calm-heron", str(directory), "runs/calm-heron", "runs/calm-heron/"):
        assert find_run(run, Path("runs")).name == "calm-heron"


def test_an_unknown_run_gets_the_nearest_names(tmp_path: Path) -> None:
    make_run(tmp_path, "calm-heron", SUMMARY)
    make_run(tmp_path, "wild-otter", SUMMARY)
    with pytest.raises(ValueError, match=r"no run 'calm-herron'.*did you mean calm-heron\?"):
        find_run("calm-herron", tmp_path)
    with pytest.raises(ValueError, match="there are no runs under"):
        find_run("calm-heron", tmp_path / "missing")


def test_show(tmp_path: Path) -> None:
    make_run(tmp_path, "calm-heron", SUMMARY)
    text = text_of(render_show("calm-heron", tmp_path))
    for expected in (
        "0.810 → 0.930",
        "0.550 → 0.750",
        "4m37s",
        "20480",
        "abc123",
        "micro_batch",
        "training.learning_rate",
    ):
        assert expected in text
    assert "learn" in text
    assert "150.5" in text


def test_compare_shows_what_differs_and_only_that(tmp_path: Path) -> None:
    one = RunInfo(make_run(tmp_path, "one", SUMMARY))
    config = {
        "training": {"steps": 80, "learning_rate": 3e-4},
        "reward": {"function": "sentence_cosine", "encoder": "x"},
    }
    two = RunInfo(make_run(tmp_path, "two", {**SUMMARY, "reward_after": 0.7}, config=config))
    assert differing_keys([one, two]) == {"training.learning_rate": [1e-4, 3e-4], "reward.encoder": [None, "x"]}
    text = text_of(render_compare(["one", "two"], tmp_path))
    assert row_of(text, "training.learning_rate") == ["training.learning_rate", "0.0001", "0.0003"]
    assert row_of(text, "reward.encoder") == ["reward.encoder", "–", "x"]
    assert row_of(text, "reward") == ["reward", "0.810", "→", "0.930", "0.810", "→", "0.700"]
    assert "training.steps" not in text


def test_compare_of_equal_configurations_says_so(tmp_path: Path) -> None:
    directories = [make_run(tmp_path, name, SUMMARY) for name in ("one", "two")]
    text = text_of(render_compare([str(directory) for directory in directories], tmp_path / "elsewhere"))
    assert "the configurations are the same" in text


def test_a_run_is_removed_unless_it_is_being_run(tmp_path: Path) -> None:
    free, busy = make_run(tmp_path, "free"), make_run(tmp_path, "busy")
    with (busy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="busy is being run by another process"):
            remove(RunInfo(busy))
    remove(RunInfo(free))
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]
