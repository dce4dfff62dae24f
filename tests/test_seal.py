"""Of a stranger's run nothing is imported, sent, read elsewhere or deleted, unless a person says that it is trusted.

One's own is what was written."""

import hashlib
import hmac
import json
import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli.main import app
from orchestration.experiments.ddpo.generate import generate
from orchestration.experiments.ddpo.loop import resume_ddpo
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.runs import seal
from orchestration.runs.config import ConfigError
from orchestration.runs.manifest import open_run, write_manifest
from orchestration.runs.run import register, sync

CODE = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nprettiness = 1\n"
DDPO = {"reward": {"function": "strangers_code:prettiness"}, "output_dir": None}
CURATED = {"rule": "curated", "n_ini": 9, "n_real": 9, "n_synthetic": 9, "reward": "strangers_code:prettiness"}
MAD = {"family": "gaussian", "arms": {"plain": CURATED}}
SWEEP = {"loop": "ddpo", "config": "base.yaml", "space": {}}
fork = DdpoRun.fork
resume_mad, resume_sweep = (
    partial(EXPERIMENTS[loop].resume, trusted=False, changes=False) for loop in ("mad", "sweep")
)
LOOPS = [("ddpo", DDPO, resume_ddpo), ("mad", MAD, resume_mad), ("sweep", SWEEP, resume_sweep), ("ddpo", DDPO, fork)]


def say(line: str) -> None:
    raise AssertionError(line)


ACTS = {
    "resume": resume_ddpo,
    "fork": lambda run: fork(run, []),
    "sync": lambda run: sync(run, say),
    "register": lambda run: register(run, "model", "best", say),
    "generate": lambda run: generate(run, ["a"], [0], run.parent / "drawn"),
}


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


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """The manifest of a run that was begun here."""
    content = {"training": {"learning_rate": 1e-4}, "tracking": {"uri": None}, "reward": {"function": "strict"}}
    manifest = {"name": "mine", "loop": "ddpo", "status": "KILLED", "config": content, "committed_step": 5}
    write_manifest(tmp_path, manifest)
    return manifest


@pytest.mark.parametrize("act", sorted(ACTS))
@pytest.mark.parametrize("left", ["copied seal", "no seal"])
def test_whatever_acts_on_a_strangers_run_asks_first(tmp_path: Path, own: Any, act: str, left: str) -> None:
    """Also if it names no code: it could send what is here elsewhere, with the credentials of this environment."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.01)
        own["config"]["tracking"]["uri"] = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
        own |= {"status": "FINISHED" if act == "register" else "RUNNING"} | (
            {"seal": None} if left == "no seal" else {"seal": hashlib.sha256().hexdigest()}
        )
        (tmp_path / "manifest.json").write_text(json.dumps(own))
        (tmp_path / "pipeline").mkdir()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(ConfigError, match=r"a server to ask \(http://127.*not begun by you.*--trust"):
            ACTS[act](tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_what_was_begun_here_needs_no_trust_until_it_is_changed(tmp_path: Path, own: dict[str, Any]) -> None:
    assert open_run(tmp_path) == own
    for key, change in {
        "config.training": {"config": own["config"] | {"training": {"learning_rate": 2e-4}}},
        "committed_step": {"committed_step": 4},
        "mlflow_run_id": {"mlflow_run_id": "another"},
    }.items():
        (tmp_path / "manifest.json").write_text(json.dumps(own | change))
        with pytest.raises(ConfigError, match=rf"manifest.json was changed since the run wrote it: {key}\. .*--trust"):
            open_run(tmp_path)
        assert open_run(tmp_path, trusted=True)["changes"][-1]["manifest"] == [key]
    write_manifest(tmp_path, open_run(tmp_path, trusted=True))  # as who goes on with it does
    assert open_run(tmp_path)["changes"] == [{"step": 5, "manifest": ["mlflow_run_id"]}]


def test_a_run_from_before_there_were_digests_is_still_known(tmp_path: Path, own: dict[str, Any]) -> None:
    (key,) = seal._keys()
    old = hmac.new(key, json.dumps(own["config"], sort_keys=True).encode(), "sha256").hexdigest()
    manifest = {name: value for name, value in own.items() if name != "digests"} | {"seal": old}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert open_run(tmp_path)["committed_step"] == 5


@pytest.mark.parametrize("what", ["file", "directory", "pipe", "relative"])
def test_links_out_of_a_run_and_pipes_are_refused(tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    write_manifest(run, {"name": "mine", "loop": "ddpo", "config": {}})
    (run / "inside").symlink_to(run / "evaluations")
    assert open_run(run)
    odd, secret = run / "evaluations" / "odd", tmp_path / "secret"
    secret.touch()
    to = {"file": secret, "directory": tmp_path, "relative": "../../secret"}
    os.mkfifo(odd) if what == "pipe" else odd.symlink_to(to[what])
    with pytest.raises(ConfigError, match=rf"{odd} is .*--trust"):
        open_run(run)
    assert open_run(run, trusted=True)


def test_another_users_key_is_another(tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(seal, "_LASTING", str(tmp_path / "lasting"))
    with pytest.raises(ConfigError, match=rf"not begun by you.*{tmp_path}/state/ouroboros/key"):
        open_run(tmp_path)
    write_manifest(tmp_path, own)
    key = tmp_path / "state" / "ouroboros" / "key"
    assert (key.stat().st_mode & 0o777, len(key.read_bytes())) == (0o600, 32)
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert open_run(tmp_path)["seal"] == own["seal"]


def test_where_the_home_cannot_be_written_the_key_lies_elsewhere(
    tmp_path: Path, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "_LASTING", str(tmp_path / "lasting"))
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    write_manifest(tmp_path, own)
    assert open_run(tmp_path)["seal"]
    key = tmp_path / "lasting" / f"ouroboros-{os.getuid()}" / "key"
    key.chmod(0o644)  # others can read it: it proves nothing
    with pytest.raises(ConfigError, match="not begun by you"):
        open_run(tmp_path)
    shutil.rmtree(key.parent)
    monkeypatch.setattr(seal, "_LASTING", "/proc/nowhere")
    write_manifest(tmp_path, own)
    assert own["seal"] is None
    assert open_run(tmp_path, trusted=True)["committed_step"] == 5
