"""``ouroboros doctor``: what is wrong is found, with what to do about it."""

import json
from pathlib import Path

import pytest
import typer

from orchestration.cli import main as cli
from orchestration.planning import doctor
from orchestration.planning.doctor import Finding, examine
from orchestration.runs.config import ConfigError


def findings(tmp_path: Path, config: str = "", address: str | None = None, uri: str | None = None) -> list[Finding]:
    (tmp_path / "config.yaml").write_text(config)
    return list(examine(address, uri, tmp_path / "config.yaml"))


def test_packages_are_held_against_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=4"\ndependencies = ["numpy>=2,<2.0.0.1", "rich", "no-such-package>=1"]\n'
    )
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    fixes = {finding.text.split()[0]: finding.fix for finding in findings(tmp_path)}
    assert fixes["Python"] == "make a new environment with one that is >=4"
    assert fixes["numpy"] == "pip install 'numpy<2.0.0.1,>=2'"
    assert fixes["no-such-package"] == "pip install 'no-such-package>=1'"
    assert "rich" not in fixes


def test_models_are_looked_for(tmp_path: Path) -> None:
    assert any(each.text.startswith("model models/digits/pipeline in /") for each in findings(tmp_path))
    (wrong,) = [each for each in findings(tmp_path, "model: {path: models/digts}") if each.fix]
    assert wrong == Finding("the configuration cannot be run here", "model.path: there is no directory 'models/digts'")


@pytest.mark.parametrize(
    ("address", "uri", "text", "fix"),
    [
        ("http://127.0.0.1:9", None, "Ray", "Ray at http://127.0.0.1:9 does not answer"),
        ("127.0.0.1:6379", None, "Ray", "'127.0.0.1:6379' is not the address of a job server"),
        (None, "http://127.0.0.1:9", "MLflow", "MLflow at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_servers_are_tried(address: str | None, uri: str | None, text: str, fix: str, tmp_path: Path) -> None:
    (wrong,) = [each for each in findings(tmp_path, address=address, uri=uri) if each.fix]
    assert wrong.text == text
    assert wrong.fix is not None
    assert wrong.fix.startswith(fix)


def test_the_exit_code_says_whether_there_is_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as well:
        cli.doctor()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines)
    assert well.value.exit_code == 0
    with pytest.raises(typer.Exit) as ill:
        cli.doctor(tracking_uri="http://127.0.0.1:9")
    assert capsys.readouterr().out.splitlines()[-1].startswith("FIX  MLflow: ")
    assert ill.value.exit_code == 1


def test_findings_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([Finding("a [b]"), Finding("c", "do this")]))
    with pytest.raises(typer.Exit) as ill:
        cli.doctor(as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"ok": True, "text": "a [b]", "fix": None},
        {"ok": False, "text": "c", "fix": "do this"},
    ]
    assert ill.value.exit_code == 1


def test_a_wrong_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'modle'"):
        findings(tmp_path, "modle: {}")
