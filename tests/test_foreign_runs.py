"""Foreign and damaged run directories, through every command that meets them: the rest is shown, what is odd is named.

Never a traceback, never a file outside of the directory that is read or written, never a word that a terminal obeys.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.cli import main as cli
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.manifest import new_manifest, write_manifest
from pipelines.storage.atomic import as_lines, with_digest
from tests.damage import damaged

COMMANDS = {
    "list": ["runs", "list", "--root", "{root}"],
    "show": ["runs", "show", "{run}"],
    "compare": ["runs", "compare", "{run}", "{run}"],
    "report": ["report", "{run}"],
    "sync": ["sync", "{run}"],
    "resume": ["resume", "{run}"],
    "register": ["runs", "register", "{run}", "model"],
    "lineage": ["lineage", "{run}", "plain/0/1"],
    "fork": ["runs", "fork", "{run}"],
    "generate": ["generate", "{run}", "--prompt", "a"],
}
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400), st.booleans())
TEXTS = st.one_of(
    st.text(max_size=9), st.sampled_from(["\x1b[2J", "[bold]x", "</script>", "\ud800", "../..", "a" * 400])
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(TEXTS, below, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPO run as one that was stopped leaves it, without commits."""
    run = tmp_path_factory.mktemp("whole") / "run"
    (run / "evaluations").mkdir(parents=True)
    stand = {"status": "FINISHED", "total_steps": 4, "committed_step": 2, "wall_seconds": 3.5}
    write_manifest(run, manifest := new_manifest("ddpo", DdpoConfig(), inputs={}) | stand)
    (run / "manifest.json").write_text(json.dumps(manifest | {"seal": None}))
    for step in (0, 2):
        told = {"evaluation/reward": 0.25 + step, "calibration/true": 0.9, "calibration/shuffled": 0.5}
        told |= {
            "calibration/noise": 0.1,
            "prompts": ["a", "b"],
            "captions": None,
            "measure": [0.0],
            "measured_reward": 1,
        }
        (run / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(with_digest(told)))
        images = np.zeros((2, 8, 8, 3), np.uint8)
        np.savez(run / "evaluations" / f"step-{step:06d}.npz", images=images)
    lines = [{"step": step, "timestamp_ms": 1, "reward/mean": 0.5, "seconds/sample": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_bytes(as_lines(map(with_digest, lines)))
    spans = {"step": 2, "lanes": {"driver": [["step", 0.0, 1.0], ["sample", 0.0, 0.5]]}}
    (run / "spans.jsonl").write_bytes(as_lines([with_digest(spans)]))
    summary = {"schema_version": 1, "wall_seconds": 3.5, "reward_before": 0.25, "reward_after": 0.75, "seed": 0}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it beside another run, and a secret that nothing may read or write."""
    shutil.copytree(whole, tmp_path / "runs" / "odd")
    shutil.copytree(whole, tmp_path / "runs" / "plain")
    (tmp_path / "secret").write_text('{"reward/mean": 1234567, "step": 1, "wall_seconds": 1234567}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(place: Path, command: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command and what it printed. Nothing outside of the run is written."""
    outside = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "odd" not in path.parts}
    words = [word.format(root=place / "runs", run=place / "runs" / "odd") for word in COMMANDS[command]]
    code = 0
    try:
        code = cli.app(words, standalone_mode=False) or 0
    except SystemExit as ended:
        code = int(str(ended.code))
    except Exception as error:
        code = cli._report(error)
    printed = "".join(capfd.readouterr())
    assert code in (0, 2), printed
    assert "Traceback" not in printed
    assert not set(printed) & {"\x1b", "\x9b", "\r", "\b"}, printed
    assert "1234567" not in printed.replace(",", "")
    now = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "odd" not in path.parts}
    assert now == outside
    return code, printed


TIMES = int(os.environ.get("EXAMPLES", "1"))
FEW = settings(
    max_examples=10 * TIMES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
FILES = ["manifest.json", "summary.json", "metrics.jsonl", "spans.jsonl", "evaluations/step-000000.json"]
SHOWN = ["list", "show", "compare", "report"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take a second each: here their data are prepared, and nothing is drawn."""
    from pipelines.figures import mad as mad_figures
    from pipelines.figures import plots as figures

    for module, name in ((figures, "before_after"), (figures, "curves"), (mad_figures, "generations_grid")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(figures, "timeline", lambda *_: None)


@FEW
@given(data=st.data())
def test_any_content_is_shown_or_named(place: Path, undrawn: None, capfd: Any, data: st.DataObject) -> None:
    """What a stranger could have written into any of the files, key by key or altogether."""
    name = data.draw(st.sampled_from(FILES))
    path = place / "runs" / "odd" / name
    before = path.read_bytes()
    content = json.loads(before.splitlines()[0] if name.endswith("l") else before)
    content.pop("_digest", None)
    key = data.draw(st.sampled_from([*content, ""]))
    changed = data.draw(JSON) if not key else content | {key: data.draw(JSON)}
    path.write_text(json.dumps(changed) + "\n")
    try:
        acts = data.draw(st.sampled_from(sorted(set(COMMANDS) - set(SHOWN))))
        for command in [*SHOWN, acts]:
            code, printed = said(place, command, capfd)
            assert code == 2 or command in SHOWN
            assert code == 0 or str(place / "runs" / "odd") in printed
            assert command != "list" or "plain" in printed
    finally:
        path.write_bytes(before)


def test_any_damage_is_named(place: Path, undrawn: None, capfd: Any) -> None:
    dice = random.Random(0)
    for _ in range(4 * TIMES):
        path = place / "runs" / "odd" / dice.choice([*FILES, "evaluations/step-000002.npz"])
        before = path.read_bytes()
        path.write_bytes(damaged(before, dice))
        for command in SHOWN:
            assert said(place, command, capfd)[0] in (0, 2)
        path.write_bytes(before)


DEEP = '{"config": ' * 50_000
ODD: dict[str, Callable[[Path], Any]] = {
    "deep": lambda run: (run / "manifest.json").write_text(DEEP),
    "too large a number": lambda run: alter(run, wall_seconds="1e400"),
    "no number": lambda run: alter(run, wall_seconds="NaN"),
    "digits": lambda run: alter(run, committed_step="9" * 5000),
    "negative": lambda run: alter(run, committed_step="-1"),
    "list": lambda run: (run / "manifest.json").write_text("[]"),
    "nothing": lambda run: (run / "manifest.json").write_text("{}"),
    "empty": lambda run: (run / "manifest.json").write_text(""),
    "directory": lambda run: ((run / "manifest.json").unlink(), (run / "manifest.json").mkdir()),
    "pipe": lambda run: ((run / "manifest.json").unlink(), os.mkfifo(run / "manifest.json")),
    "itself": lambda run: ((run / "manifest.json").unlink(), (run / "manifest.json").symlink_to("manifest.json")),
    "link": lambda run: ((run / "manifest.json").unlink(), (run / "manifest.json").symlink_to("../../secret")),
}


def alter(run: Path, **values: str) -> None:
    content = json.loads((run / "manifest.json").read_text())
    text = json.dumps(content | {key: f"@{key}@" for key in values})
    for key, value in values.items():
        text = text.replace(f'"@{key}@"', value)
    (run / "manifest.json").write_text(text)


@pytest.mark.parametrize("what", ODD)
def test_an_odd_run_hides_no_other(place: Path, capfd: Any, what: str) -> None:
    run = place / "runs" / "odd"
    ODD[what](run)
    code, printed = said(place, "list", capfd)
    assert code == 0
    assert "0.250 → 0.750" in printed
    assert f"{run}/manifest.json" in printed.replace("\n", "")
    for command in sorted(set(COMMANDS) - set(SHOWN)):
        code, printed = said(place, command, capfd)
        assert code == 2
        assert str(run) in printed


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "evaluations/step-000000.json", "figures", ".lock"])
@pytest.mark.parametrize("to", ["secret", "runs/plain/spans.jsonl"])
def test_no_link_leads_out(place: Path, capfd: Any, name: str, to: str) -> None:
    link = place / "runs" / "odd" / name
    link.unlink(missing_ok=True)
    link.symlink_to(place if name == "figures" else place / to)
    for command in COMMANDS:
        code, printed = said(place, command, capfd)
        assert code == 2 or command in ("list", "show", "compare")
        assert code == 0 or "odd" in printed


def test_escapes_and_markup_are_words(place: Path, capfd: Any) -> None:
    evil = "\x1b]0;taken\x07\x9b2J[red]x[/red][/nothing]\u202egnp"
    alter(place / "runs" / "odd", name=json.dumps(evil), git_commit=json.dumps(evil), error=json.dumps(evil))
    (place / "runs" / "odd").rename(place / "runs" / "odd[bold]")
    (place / "runs" / "odd[bold]").rename(place / "runs" / "odd")
    for command in SHOWN:
        code, printed = said(place, command, capfd)
        assert code == 0
        assert "\u202e" not in printed
    assert "[red]x[/red]" in said(place, "show", capfd)[1]


def test_what_is_removed_is_what_was_named(place: Path, capfd: Any) -> None:
    def remove(name: str) -> tuple[int, str]:
        try:
            cli.app(["runs", "rm", name, "--yes", "--root", str(place / "runs")], standalone_mode=False)
        except Exception as error:
            return cli._report(error), "".join(capfd.readouterr())
        return 0, ""

    empty, link = place / "runs" / "od", place / "runs" / "link"
    empty.mkdir()
    link.symlink_to(place / "runs" / "plain")
    code, printed = remove("od")
    assert (code, "holds no manifest.json" in printed, "odd" in printed) == (2, True, False)
    assert remove("link")[0] == 2
    begun = place / "runs" / "begun"
    begun.mkdir()
    (begun / ".lock").touch()
    (begun / "mlflow.db").touch()
    assert "not begun" in said(place, "list", capfd)[1]
    for name in ("begun", "odd"):
        assert remove(name) == (0, "")
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["link", "od", "plain"]
