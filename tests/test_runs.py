"""Run directories read back: whole, half-written, damaged and foreign ones."""

import fcntl
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from rich.console import Console, RenderableType

from orchestration.cli import main as cli
from orchestration.runs.browse import (
    RunInfo,
    compared,
    differing_keys,
    everything,
    facts,
    find_run,
    glance,
    list_runs,
    remove,
    render_compare,
    render_list,
    render_show,
)
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import SCHEMAS, read_manifest, read_summary
from pipelines.storage.atomic import DamagedFiles
from tests.test_config import command

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
    told = glance(facts(run))
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
        row = row_of(text_of(render_list([facts(RunInfo(directory))])), "going")
        assert row == ["going", "RUNNING", "23/80", *ROWS[step], "1m00s"]
        measured = {"evaluation/reward": reward, "evaluator/full": full}
        (directory / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(measured))
    assert row_of(text_of(render_list([facts(RunInfo(directory))])), "going")[3:9] == ROWS[30]
    (directory / "evaluations" / "step-000000.json").write_text("{")
    run = RunInfo(directory)
    assert row_of(text_of(render_list([facts(run)])), "going")[3:6] == ["–", "→", "0.700"]
    assert "step-000000.json" in run.damaged[0]


def test_no_evaluator_is_not_a_number_from_elsewhere(tmp_path: Path) -> None:
    summary = {**SUMMARY, "evaluator_accuracy_before": None, "evaluator_accuracy_after": None}
    run = RunInfo(make_run(tmp_path, "blind", summary))
    assert glance(facts(run))["held-out accuracy"] is None
    assert row_of(text_of(render_list([facts(run)])), "blind")[-2:] == ["–", "4m37s"]


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
    text = text_of(render_list([facts(run) for run in runs]))
    assert row_of(text, "cut") == ["cut", "unreadable", "–", "–", "–", "–"]
    for run in runs:
        assert run.directory.name in text_of(render_show(everything(run)))
    assert "unreadable" in text_of(render_compare(compared(runs)), width=300)


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


def test_a_run_whose_process_died_is_not_running(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "gone", status="RUNNING")
    assert RunInfo(directory).status == "RUNNING"  # perhaps elsewhere: there is no lock to look at
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert RunInfo(directory).status == "RUNNING"
    assert RunInfo(directory).status == "KILLED"


def test_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_runs(tmp_path / "missing") == []
    assert command(["runs", "list", "--root", str(tmp_path / "missing")], monkeypatch) == 0
    assert capsys.readouterr().out.strip() == f"no runs under {tmp_path / 'missing'}"


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


def test_a_run_is_found_by_a_beginning_of_just_one_name(tmp_path: Path) -> None:
    for name in ("calm-heron", "calm-otter", "calm", *(f"many-{number:02d}" for number in range(12))):
        make_run(tmp_path, name)
    (tmp_path / "calm-heron-notes").mkdir()  # no run
    assert find_run("calm-h", tmp_path).directory.name == "calm-heron"
    assert find_run("calm", tmp_path).directory.name == "calm"  # a whole name is no beginning of others
    with pytest.raises(ConfigError, match=r"'cal' is the beginning of 3 names under .*: calm, calm-heron, calm-otter$"):
        find_run("cal", tmp_path)
    with pytest.raises(ConfigError, match=r"of 12 names .*many-09, …$"):
        find_run("many", tmp_path)
    with pytest.raises(ConfigError, match=r"no run 'calm-h'.*did you mean calm-heron\?"):
        find_run("calm-h", tmp_path, whole=True)
    with pytest.raises(ConfigError, match="no run ''"):
        find_run("", tmp_path)


def test_what_is_removed_unasked_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "calm-heron")
    assert command(["runs", "rm", "calm", "--yes", "--root", str(tmp_path)], monkeypatch) == 2
    assert (tmp_path / "calm-heron").exists()
    assert command(["runs", "rm", "calm-heron", "--yes", "--root", str(tmp_path)], monkeypatch) == 0
    assert not (tmp_path / "calm-heron").exists()


@pytest.mark.parametrize("words", [["resume"], ["sync"], ["lineage"], ["report"], ["generate", "--prompt", "x"]])
def test_every_command_that_asks_for_a_run_takes_a_beginning(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("calm-heron", "calm-otter"):
        make_run(tmp_path, name, loop="gone")
    whole = [*words, *(["a/0/1"] if words == ["lineage"] else []), "--root", str(tmp_path)]
    assert command([whole[0], "calm-h", *whole[1:]], monkeypatch) in (0, 2)
    assert "no run" not in capsys.readouterr().err
    assert command([whole[0], "calm", *whole[1:]], monkeypatch) == 2
    assert "calm-heron, calm-otter" in capsys.readouterr().err


def printed(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON document that a command prints, and nothing besides."""
    assert command([*words, "--json"], monkeypatch) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.isascii()
    return json.loads(told.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_tables_as_json_have_the_facts_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, third = ["--root", str(tmp_path)], 1 / 3
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert printed(["runs", "list", *root], monkeypatch, capsys) == []
    make_run(tmp_path, "calm-heron", {**SUMMARY, "reward_after": third, "seed": 7})
    odd = make_run(tmp_path, "ødd \x9b", None, config={"training": {"learning_rate": math.inf}}, created="2025")
    (odd / "summary.json").write_text("{")
    first, second = printed(["runs", "list", *root], monkeypatch, capsys)
    expected = {"run": "calm-heron", "status": "FINISHED", "step": 80, "total_steps": 80, "reward_before": 0.81}
    expected |= {"reward_after": third, "evaluator_accuracy_after": 0.75, "wall_seconds": 277.4, "seeds": [7]}
    assert expected.items() <= first.items()
    assert first.keys() == second.keys()
    assert (second["run"], second["reward_after"]) == ("ødd \x9b", None)
    assert "summary.json" in second["damaged"][0]
    shown = printed(["runs", "show", "calm", *root], monkeypatch, capsys)
    assert first.items() <= shown.items()
    assert shown["summary"]["seconds_by_stage"] == SUMMARY["seconds_by_stage"]
    assert shown["config"]["training"]["learning_rate"] == 1e-4
    compared = printed(["runs", "compare", "calm", "ø", *root], monkeypatch, capsys)
    assert compared["runs"] == [first, second]
    assert compared["differing"]["training.learning_rate"] == [1e-4, None]
    for words in (["show", "none"], ["compare", "calm"]):
        assert command(["runs", *words, "--json", *root], monkeypatch) == 2
        assert capsys.readouterr().out == ""


def test_no_name_is_cut_or_folded_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{letter * 200}-run" for letter in "abcdefghijklmnopqrstuvwxyz"]
    for name in names:
        make_run(tmp_path, name, SUMMARY, config={"prompts": ["a prompt " * 10, name]})
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for words, lines in ((["list"], 27), (["compare", *names], 9)):
        assert command(["runs", *words, "--root", str(tmp_path)], monkeypatch) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in names)
        assert len(text.splitlines()) == lines


def test_a_shell_completes_the_name_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs", "calm-heron")
    make_run(tmp_path / "runs", "wild-otter")
    monkeypatch.chdir(tmp_path)
    words = {"_OUROBOROS_COMPLETE": "complete_bash", "COMP_WORDS": "ouroboros runs show ca", "COMP_CWORD": "3"}
    found = CliRunner().invoke(typer.main.get_command(cli.app), [], env=words, prog_name="ouroboros")
    assert found.output.split() == ["calm-heron"]


def test_show(tmp_path: Path) -> None:
    make_run(tmp_path, "calm-heron", SUMMARY)
    text = text_of(render_show(everything(find_run("calm-heron", tmp_path))))
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
    text = text_of(render_compare(compared([one, two])))
    assert row_of(text, "training.learning_rate") == ["training.learning_rate", "0.0001", "0.0003"]
    assert row_of(text, "reward.encoder") == ["reward.encoder", "–", "x"]
    assert row_of(text, "reward") == ["reward", "0.810", "→", "0.930", "0.810", "→", "0.700"]
    assert "training.steps" not in text


def test_compare_shows_what_arms_and_sweeps_ended_with_and_no_empty_rows(tmp_path: Path) -> None:
    held = {"values": [[4.0, 6.0]], "mean": [4.0, 6.0], "low": [None, None], "high": [None, None]}
    arms = {name: {"settings": {}, "sizes": [], "metrics": {"fid": held}, "verdict": None} for name in ("a", "b")}
    mad = {"name": "x", "generations": 2, "seeds": [0], "arms": arms}
    runs = [RunInfo(make_run(tmp_path, name, content)) for name, content in (("mad", mad), ("ddpo", SUMMARY))]
    assert not runs[0].damaged
    assert facts(runs[0])["results"] == {"a: fid": 6.0, "b: fid": 6.0}
    text = text_of(render_compare(compared(runs)))
    assert row_of(text, "a: fid") == ["a:", "fid", "6", "–"]
    assert "a: fid 6" in text_of(render_list([facts(run) for run in runs]), width=300)
    assert "result" not in text_of(render_list([facts(run) for run in runs[1:]]), width=300)
    assert "weights" in text
    assert "weights" not in text_of(render_compare(compared(runs[:1] * 2)))


def test_compare_of_equal_configurations_says_so(tmp_path: Path) -> None:
    directories = [make_run(tmp_path, name, SUMMARY) for name in ("one", "two")]
    text = text_of(render_compare(compared([RunInfo(directory) for directory in directories])))
    assert "the configurations are the same" in text


def test_a_run_is_removed_unless_it_is_being_run(tmp_path: Path) -> None:
    free, busy = make_run(tmp_path, "free"), make_run(tmp_path, "busy")
    with (busy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="busy is being run by another process"):
            remove(RunInfo(busy))
    remove(RunInfo(free))
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]
