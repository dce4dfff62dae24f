"""Worked examples of the documentation, done as they stand there: files, code, commands and what they print."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage.locations import CHECKOUT
from tests.test_config import command

FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ouroboros (.*)\n((?:[^$].*\n)*)", re.MULTILINE)


@pytest.mark.parametrize("page", ["own_prompts", "own_model", "own_reward", "own_images", "python"])
def test_a_page_is_true(
    page: str,
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for part in ("configs", "models"):
        (tmp_path / part).symlink_to(CHECKOUT / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # a model may be named that is still on the hub
    names: dict[str, Any] = {"__name__": "__main__"}
    done = 0
    for kind, file, text in FENCE.findall((CHECKOUT / f"docs/{page}.md").read_text()):
        if kind == "python" and not file:
            exec(text, names)
        elif kind == "console":
            for words, expected in COMMAND.findall(text):
                code, printed = run(words, monkeypatch, capsys)
                assert code == (2 if expected.startswith("ouroboros: ") else 0), printed
                for part in expected.replace("…", "\n").splitlines():  # an ellipsis stands for what differs
                    assert part in printed, printed
                done += 1
        elif file:
            (tmp_path / file).write_text(text)
    assert done >= 3


def run(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of ``ouroboros words``."""
    import shlex

    code = command(shlex.split(words), monkeypatch)
    captured = capsys.readouterr()
    return code, captured.out + captured.err
