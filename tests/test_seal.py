"""A stranger's run imports no code: a name counts if it was typed here, or if a person says that it is trusted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import app
from orchestration.config import ConfigError
from orchestration.ddpo import resume_ddpo
from orchestration.ddpo_run import DdpoRun
from orchestration.mad import resume_mad
from orchestration.seal import check_seal, seal
from orchestration.sweep import resume_sweep

CODE = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nprettiness = 1\n"
DDPO = {"reward": {"function": "strangers_code:prettiness"}, "output_dir": None}
CURATED = {"rule": "curated", "n_ini": 9, "n_real": 9, "n_synthetic": 9, "reward": "strangers_code:prettiness"}
MAD = {"family": "gaussian", "arms": {"plain": CURATED}}
SWEEP = {"loop": "ddpo", "config": "base.yaml", "space": {}}
fork = DdpoRun.fork
LOOPS = [("ddpo", DDPO, resume_ddpo), ("mad", MAD, resume_mad), ("sweep", SWEEP, resume_sweep), ("ddpo", DDPO, fork)]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose code would tell that it was executed, and that Python would import from."""
    (tmp_path / "strangers_code.py").write_text(CODE)
    (tmp_path / "base.yaml").write_text("reward: {function: 'strangers_code:prettiness'}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strangers_code", raising=False)
    return tmp_path


def manifest_in(directory: Path, loop: str, config: dict[str, Any], signature: str | None) -> dict[str, Any]:
    content = {"name": "theirs", "loop": loop, "status": "KILLED", "config": config, "seal": signature}
    content |= {"committed_step": 0, "resolved": {}}
    (directory / "manifest.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("signature", [None, "", "0" * 64, 7])
@pytest.mark.parametrize(("loop", "config", "go_on"), LOOPS)
def test_a_strangers_run_executes_nothing(
    stranger: Path, loop: str, config: dict[str, Any], go_on: Any, signature: Any
) -> None:
    manifest_in(stranger, loop, config, signature)
    named = "base.yaml" if loop == "sweep" else "strangers_code:prettiness"
    with pytest.raises(ConfigError, match=rf"names code to import or a server to ask \({named}\).*--trust"):
        go_on(stranger, *([[]] if go_on is fork else []))
    assert not (stranger / "executed").exists()


@pytest.mark.parametrize("name", ["strangers_code:9", "strangers_code:a-b", "évil:f", "strangers_code: f"])
def test_no_form_of_the_name_gets_through(stranger: Path, name: str) -> None:
    """The module would be imported before the function is looked for."""
    manifest_in(stranger, "ddpo", {"reward": {"function": name}}, None)
    with pytest.raises(ConfigError, match="names code to import"):
        resume_ddpo(stranger)
    assert not (stranger / "executed").exists()


def test_trust_imports_it(stranger: Path) -> None:
    manifest_in(stranger, "mad", MAD, None)
    with pytest.raises(ConfigError, match="cannot be called"):  # it is read, and is no function
        app(["resume", str(stranger), "--trust"], standalone_mode=False)
    assert (stranger / "executed").exists()


def test_what_was_typed_here_needs_no_trust(tmp_path: Path) -> None:
    check_seal(tmp_path, manifest_in(tmp_path, "ddpo", DDPO, seal(DDPO)), trusted=False)
    changed = {**DDPO, "reward": {"function": "strangers_code:other"}}
    with pytest.raises(ConfigError, match="strangers_code:other"):
        check_seal(tmp_path, manifest_in(tmp_path, "ddpo", changed, seal(DDPO)), trusted=False)


def test_what_names_no_code_needs_none(tmp_path: Path) -> None:
    plain = {"reward": {"function": "sentence_cosine"}, "tracking": {"uri": "http://127.0.0.1:5000"}}
    check_seal(tmp_path, manifest_in(tmp_path, "ddpo", plain, None), trusted=False)


def test_another_users_key_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = seal(DDPO)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert seal(DDPO) == seal(DDPO) != mine
    key = tmp_path / "ouroboros" / "key"
    assert (key.stat().st_mode & 0o777, len(key.read_bytes())) == (0o600, 32)
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert seal(DDPO) is None
