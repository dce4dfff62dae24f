"""The report in a real browser: it needs nothing but itself, shows what it is given, and obeys nobody's text."""

import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestration.experiments.ddpo.report import draw
from orchestration.runs.html_report import write_report
from pipelines.storage.names import file_name
from tests.browser import Browser, chromium

HOSTILE = """<script>document.title = "taken"</script><img src=x onerror="document.title = 'taken'">"'{{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A DDPO run that was killed in its third step, with its last line half written."""
    directory = tmp_path / "calm-heron"
    (directory / "evaluations").mkdir(parents=True)
    manifest = {
        "name": HOSTILE,
        "loop": "ddpo",
        "created": "2026-11-22T10:00:00+00:00",
        "git_commit": "abc",
        "config": {"name": HOSTILE, "training": {"steps": 4, "clip_range": 2e-4}, "prompts": None},
        "total_steps": 4,
        "committed_step": 2,
        "status": "RUNNING",
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / ".lock").touch()
    rng = np.random.default_rng(0)
    for step, reward, shown in ((0, 0.25, 6), (2, 0.75, 4)):
        told = {"evaluation/reward": reward, "evaluator/full": reward / 3, "evaluator/digit": 1 / 3}
        told |= {"calibration/true": 0.9, "calibration/shuffled": 0.5, "calibration/noise": 0.1} if step == 0 else {}
        words = [HOSTILE, "two", "three", "four", "five", "six"][:shown]
        path = directory / "evaluations" / f"step-{step:06d}.json"
        path.write_text(json.dumps({**told, "prompts": words, "captions": words if step else None}))
        np.savez(path.with_suffix(".npz"), images=rng.integers(0, 256, (shown, 16, 16, 3), dtype=np.uint8))
    lines = [
        {
            "step": step,
            "timestamp_ms": 1000 * step,
            "reward/mean": 0.1 * step,
            "seconds/sample": 1.0,
            "seconds/learn": step,
        }
        for step in (1, 2)
    ]
    (directory / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 3, "rew']))
    return directory


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A MAD experiment whose arms are somebody's text."""
    directory = tmp_path / "grey-wolf"
    (directory / "figures").mkdir(parents=True)
    means = {"mean": [0.5, 2.0 / 3], "low": [0.4, None], "high": [0.6, None], "values": [[0.5, 2.0 / 3]]}
    arm = {
        "settings": {"family": "gaussian", "rule": "fresh"},
        "sizes": [[60, 0], [30, 30]],
        "metrics": {"w2_squared": means},
        "verdict": {"goes_mad": "yes", "distance": None, "quality": None, "diversity": None, "warnings": [HOSTILE]},
        "effective_samples": {"limit": 1.5, "problem": HOSTILE},
    }
    summary = {
        "seeds": [0],
        "arms": {HOSTILE: arm, "plain": arm | {"verdict": None}},
        "floor": {},
        "comparisons": {},
        "seconds_by_stage": {"fit/cpu": 3.0},
        "seconds_by_generation": {"fit": [1.0, 2.0], "measure": [0.5, 0.25]},
    }
    manifest = {"name": "wolf", "loop": "mad", "status": "FINISHED", "config": {"arms": {HOSTILE: {"n_ini": 60}}}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "summary.json").write_text(json.dumps(summary))
    Image.fromarray(np.zeros((80, 3000, 3), np.uint8)).save(directory / "figures" / "curves.png")
    for name in (f"samples_{file_name(HOSTILE)}", "glance"):
        Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(directory / "figures" / f"{name}.png")
    (directory / "figures" / "damaged.png").write_bytes((directory / "figures" / "curves.png").read_bytes()[:60])
    return directory


def shown(browser: Browser, path: Path, **window: Any) -> list[int]:
    """Open a report, check that it keeps to itself, and return the widths of its pictures."""
    browser.open(path.as_uri(), **window)
    assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert browser.complaints() == []
    assert browser.run("return document.scripts.length") == 0
    assert browser.driver.title.endswith("· Ouroboros")
    return browser.run("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")


def test_an_interrupted_run_is_shown_as_far_as_it_came(browser: Browser, interrupted: Path) -> None:
    draw(interrupted)
    widths = shown(browser, write_report(interrupted))
    assert len(widths) == 3
    assert min(widths) > 300
    browser.wait_for_text("KILLED", "2/4", "after 2 steps", "an interim measure", "training.clip_range")
    rows = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('tr[id]')].map("
        "row => [row.id, [...row.querySelectorAll('data')].map(each => each.value)]))"
    )
    assert rows["evaluation/reward"] == ["0.25", "0.75"]
    assert rows["evaluator/full"] == [str(0.25 / 3), "0.25"]
    shown_there = browser.run("return [...document.querySelectorAll('#calibration data')].map(each => each.value)")
    assert shown_there == ["0.9", "0.5", "0.1"]
    bars = browser.run("return [...document.querySelectorAll('.bars > *')].map(bar => bar.title)")
    assert bars == ["step 1: 2 s", "step 2: 3 s"]
    heights = browser.run("return [...document.querySelectorAll('.bars i')].map(i => i.getBoundingClientRect().height)")
    whole = browser.run("return document.querySelector('.bars').clientHeight")
    assert heights == pytest.approx([whole / 3, whole / 3, whole / 3, whole * 2 / 3], abs=1)


def test_nobodys_text_is_obeyed(browser: Browser, interrupted: Path, experiment: Path) -> None:
    for directory in (interrupted, experiment):
        widths = shown(browser, write_report(directory))
        assert 0 not in widths
        text = browser.run("return document.body.innerText")
        assert HOSTILE in text
        assert "49" not in text.rpartition("Config\n")[2]
    assert browser.run("return document.querySelectorAll('img:not([src^=data])').length") == 0


def test_an_experiment_shows_what_its_summary_holds(browser: Browser, experiment: Path) -> None:
    widths = shown(browser, write_report(experiment))
    assert widths == [2400, 80]  # the wide one reduced; the damaged one, and MLflow's own, left out

    cells = browser.run("return [...document.querySelectorAll('[data-metric] data')].map(each => each.value)")
    assert cells == ["0.5", str(2.0 / 3)] * 2
    browser.wait_for_text("60 real, 0 synthetic", "30 real, 30 synthetic", "yes", "highest 2.25 s")
    browser.wait_for_text("Self-consuming loop (MAD)", f"from the same latent seeds at every generation: {HOSTILE}")
    sizes = browser.run("return [...document.images].map(i => i.width / i.closest('section').clientWidth)")
    assert min(sizes) > 0.9  # sample grids fill their space


def test_what_moves_and_what_sounds_is_on_the_page(browser: Browser, experiment: Path) -> None:
    frames = [Image.fromarray(np.full((40, 60, 3), level, np.uint8)) for level in (0, 255)]
    moving = experiment / "figures" / "way.gif"
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    (experiment / "figures" / "half.gif").write_bytes(moving.read_bytes()[:20])
    (experiment / "sounds").mkdir()
    with wave.open(str(tone := experiment / "sounds" / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.zeros(12_000, "<i2").tobytes())
    (experiment / "sounds" / "half.wav").write_bytes(tone.read_bytes()[:20])
    assert 60 in shown(browser, write_report(experiment))
    assert "half" not in browser.run("return document.body.innerText")
    browser.wait(lambda: browser.run("return document.querySelector('audio').readyState") >= 1, "the sound")
    assert browser.run("return document.querySelector('audio').duration") == pytest.approx(1.5)


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_anywhere(browser: Browser, interrupted: Path, experiment: Path, width: int, dark: bool) -> None:
    for directory in (interrupted, experiment):
        shown(browser, write_report(directory), width=width, dark=dark)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        ink, page = browser.run(
            "const style = getComputedStyle(document.body), light = c => c.match(/\\d+/g).slice(0, 3).map(Number);"
            "return [light(style.color), light(style.backgroundColor)]"
        )
        broken = "return [...document.querySelectorAll('td > data')].filter(e => e.getClientRects().length > 1).length"
        assert browser.run(broken) == 0  # a number stays in one piece
        difference = np.mean(page) - np.mean(ink)
        assert difference < -120 if dark else difference > 120


def test_what_is_missing_is_left_out(browser: Browser, tmp_path: Path, interrupted: Path) -> None:
    """A run that began and stopped: a manifest and no more."""
    directory = tmp_path / "barely"
    directory.mkdir()
    for loop in ("ddpo", "mad", "sweep"):
        manifest = json.loads((interrupted / "manifest.json").read_text()) | {
            "loop": loop,
            "status": "FAILED",
            "error": HOSTILE + "x" * 400,
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
        assert shown(browser, write_report(directory)) == []
        browser.wait_for_text("FAILED", "drawn when the run is done", HOSTILE)
        browser.open((directory / "report.html").as_uri(), width=400)
        assert browser.run("return document.documentElement.scrollWidth") <= 400


def test_digests_are_short_and_long_errors_wrap(browser: Browser, tmp_path: Path) -> None:
    trial = {"point": {"rate": 0.1}, "seed": 0, "status": "FAILED", "step": 0, "value": None, "error": "x" * 400}
    summary = {"metric": "fid", "trials": [trial], "weights_sha256": "ab" * 32}
    manifest = {"name": "failed", "loop": "sweep", "status": "FAILED", "git_commit": "cd" * 20, "config": {}}
    for name, content in (("summary", summary), ("manifest", manifest)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for width in (400, 1400):
        browser.open(write_report(tmp_path).as_uri(), width=width)
        texts = "return [...document.querySelectorAll('dd[title]')].map(each => [each.innerText, each.title])"
        assert browser.run(texts) == [["ab" * 6, "ab" * 32], ["cd" * 6, "cd" * 20]]
        assert browser.run("return document.querySelector('.long').getBoundingClientRect().width") < width
        assert browser.run("return document.documentElement.scrollWidth") <= width


def test_the_command_writes_it_again(interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.cli import main as cli
    from orchestration.runs.config import ConfigError

    cli.report(str(interrupted.name), root=tmp_path)
    assert capsys.readouterr().out.strip() == str(interrupted / "report.html")
    assert "KILLED" in (interrupted / "report.html").read_text()
    shutil.rmtree(interrupted)
    with pytest.raises(ConfigError, match="no run 'calm-heron'"):
        cli.report("calm-heron", root=tmp_path)
