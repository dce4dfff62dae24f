"""A reward of one's own by its file: found, tried before the start, digested, and what is wrong with it shown."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration import api
from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.inputs import ddpo_inputs
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import ConfigError, assign, load_config
from orchestration.runs.inputs import code_of
from orchestration.runs.manifest import new_manifest, write_manifest
from pipelines.storage.locations import CHECKOUT
from policies.common.user_code import giving, import_function, source_of
from tests.test_config import command

DIGITS = CHECKOUT / "configs/ddpo/digits.yaml"
OWN = """
import numpy as np
from my_helper import third

calls = []


def redness(images, prompts, captions):
    calls.append(images.shape)
    return images[..., 0].mean(axis=(1, 2))


def reads(images, prompts, captions):
    return [float(len(caption)) for caption in captions]


def fails(images, prompts, captions):
    return third(images)


def columns(images, prompts, captions):
    return images.mean(axis=(2, 3))


def nothing(images, prompts, captions):
    return np.full(len(images), np.nan)


def curated(values, labels):
    return values.nothing


class Scaled:
    def __init__(self, by):
        self.by = by * 1.0

    def __call__(self, images, prompts, captions):
        return self.by * images.mean(axis=(1, 2, 3))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is on no import path, with a reward and what it needs beside it."""
    (tmp_path / "my.rewards.py").write_text(OWN)
    (tmp_path / "my_helper.py").write_text("def third(images):\n    return images[..., 3].mean(axis=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_helper", None)


def plan(*overrides: str) -> Any:
    return preflight_ddpo(load_config(DdpoConfig, DIGITS, overrides), Machine(2, 0))


def test_a_reward_is_tried_once_on_two_images_of_the_models_size(place: Path) -> None:
    plan("reward.function=my.rewards.py:redness")
    plan("reward.function=my.rewards.py:redness", "training.steps=3")
    calls = import_function("my.rewards.py:redness", "", []).__globals__["calls"]
    assert calls == [(2, 16, 16, 3)]
    plan("reward.function=my.rewards.py:Scaled", "reward.options.my.rewards.py:Scaled.by=2")


@pytest.mark.parametrize(
    ("words", "message", "trace"),
    [
        (
            ["fails"],
            r"my.rewards.py:17\) .* tried on images of noise, \(2, 16, 16, 3\): .* IndexError: .*my_helper.py:2",
            "third",
        ),
        (
            ["columns"],
            r"my.rewards.py:21\) has to return one finite number an image.* shape \(2, 16\) for 2 images",
            None,
        ),
        (["nothing"], r"3\): the reward of image 0 .* is nan", None),
        (["reads", "captioner.path=null"], r"my.rewards.py:reads.*TypeError: 'NoneType' object", "in reads"),
        (["Scaled", "reward.options.my.rewards.py:Scaled.by=x"], "could not be made: TypeError: can't", "in __init__"),
        (["Scaled", "reward.options.my.rewards.py:Scaled.b=1"], "takes .by.: missing a required argument: 'by'", None),
        (["rednes"], "module 'my.rewards.py' has no 'rednes'; did you mean 'redness'", None),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_line_and_its_own_traceback(
    place: Path, words: list[str], message: str, trace: str | None
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan(f"reward.function=my.rewards.py:{words[0]}", *words[1:])
    assert "\n" not in str(error.value)
    notes = getattr(error.value, "__notes__", [])
    assert [trace in note for note in notes] == [True] * (trace is not None)
    assert not any("pipelines/rewards" in note for note in notes)


def test_the_command_shows_the_traceback_then_the_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ddpo", "--config", str(DIGITS), "--dry-run"]
    for own in ("my.rewards.py:fails", str(place / "my.rewards.py:fails")):
        assert command([*words, f"reward.function={own}"], monkeypatch) == 2
        *trace, line = capsys.readouterr().err.splitlines()
        assert trace[0] == "  Traceback (most recent call last):"
        assert trace[-1] == "  IndexError: index 3 is out of bounds for axis 3 with size 3"
        assert line.startswith(f"ouroboros: reward.function '{own}'")
    own = ["rule=curated", "reward=my.rewards.py:curated", "family=gaussian", "n_real=9", "n_synthetic=9", "--dry-run"]
    assert command(["mad", *own], monkeypatch) == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[-1] == "  AttributeError: 'numpy.ndarray' object has no attribute 'nothing'"
    assert line.startswith("ouroboros: of two real samples: reward my.rewards.py:curated failed: AttributeError")
    (elsewhere := place / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    Path("bare.py").write_text("def f(a, b, c)\n    return a\n")
    assert command([*words, "reward.function=bare:f"], monkeypatch) == 2
    assert "module 'bare' is not on Python's path; by its file it is bare.py:f" in capsys.readouterr().err
    assert command([*words, "reward.function=bare.py:f"], monkeypatch) == 2
    assert "def f(a, b, c)\n                    ^\n  SyntaxError: expected ':'\nouroboros: " in capsys.readouterr().err
    assert command([*words, "reward.function=away.py:f"], monkeypatch) == 2
    assert f"'away.py:f': there is no file 'away.py' in {elsewhere}" in capsys.readouterr().err
    monkeypatch.chdir(CHECKOUT)
    words = ["submit", "--", "ddpo", "--config", "configs/ddpo/digits.yaml"]
    assert command([*words, f"reward.function={place}/my.rewards.py:redness"], monkeypatch) == 2
    assert f"{place}/my.rewards.py is not a file that a job gets" in capsys.readouterr().err


def test_the_code_of_a_file_is_among_the_inputs_and_read_anew_when_it_changes(place: Path) -> None:
    config = load_config(DdpoConfig, DIGITS, ["reward.function=my.rewards.py:redness"])
    before = ddpo_inputs(config)
    assert before["code of my.rewards.py"]["path"] == str(place / "my.rewards.py")
    assert {key for key in before if key.startswith("code")} == {"code of my.rewards.py", "code of my_helper"}
    assert import_function("my.rewards.py:redness", "", []) is import_function(f"{place}/my.rewards.py:redness", "", [])
    (place / "my.rewards.py").write_text(OWN.replace("def redness", "def blueness"))
    assert import_function("my.rewards.py:blueness", "", []).__name__ == "blueness"
    with pytest.raises(ValueError, match="has no 'redness'"):
        ddpo_inputs(config)
    assert code_of(["my.rewards.py:blueness"])["code of my.rewards.py"] != before["code of my.rewards.py"]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("training.steps", {"training": {"steps": 1}}),
        ("reward.options.my/own.reward.py:f.x", {"reward": {"options": {"my/own.reward.py:f": {"x": 1}}}}),
        ("reward.options../a.py:f.x.y", {"reward": {"options": {"./a.py:f": {"x": {"y": 1}}}}}),
        ("reward.function.a.b:f", {"reward": {"function": {"a.b:f": 1}}}),
        ("a.rule:Every.top", {"a.rule:Every": {"top": 1}}),
        ("arms.one.a.rule:Every.top", {"arms": {"one": {"a.rule:Every": {"top": 1}}}}),
    ],
)
def test_a_dotted_key_may_name_code(key: str, found: dict[str, Any]) -> None:
    content: dict[str, Any] = {}
    assign(content, key, 1)
    assert content == found


def test_a_function_of_this_process_has_a_name_while_it_is_given() -> None:
    def third(images: Any, prompts: Any, captions: Any) -> Any:
        return images[..., 2].mean(axis=(1, 2))

    with giving(third) as name, giving(lambda *_: None) as other:
        assert (name, other) == ("in-process:third", "in-process:lambda")
        assert import_function(name, "", []) is third
        digest = code_of([name])[f"code of {name}"]["sha256"]
        assert digest != code_of([other])[f"code of {other}"]["sha256"]
        plan(f"reward.function={name}")
    assert b"images[..., 2]" in source_of(third)
    with pytest.raises(ValueError, match=r"'in-process:third' was a function .* run_ddpo\(resume=RUN, reward=third\)"):
        import_function(name, "reward.function", [])


def test_python_refuses_in_one_line_and_stops_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), api.stopped_once():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    (place / "runs").mkdir()
    write_manifest(place / "runs", new_manifest("ddpo", DdpoConfig(), inputs={}) | {"status": "KILLED"})
    for call, message in (
        (lambda: api.run_ddpo(DIGITS, training={"stepps": 3}), "unknown key 'training.stepps'; did you mean"),
        (lambda: api.run_ddpo({"training.steps": 0}), "training.steps: "),
        (lambda: api.run_ddpo(MadConfig(n_ini=10)), "this configures mad: give it to 'ouroboros mad'"),
        (lambda: api.run_mad(DIGITS), "digits.yaml configures ddpo"),
        (lambda: api.run_ddpo(DIGITS, generations=3), "generations is a setting of mad"),
        (lambda: api.run_mad(resume="runs"), "runs is a ddpo run: go on with run_ddpo"),
        (lambda: api.run_ddpo(resume="runs", seed=3), "goes on with the settings that it has"),
        (lambda: api.Result("runs").pipeline(), "pipeline holds no pipeline"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is None or error.value.__suppress_context__
    config = api.read("ddpo", [DIGITS, {"training": {"steps": 3}}], given={"training.clip_range": 0.5, "name": "mine"})
    assert (config.training.steps, config.training.images_per_step, config.training.clip_range) == (3, 256, 0.5)
    assert api.read("ddpo", config) == config
