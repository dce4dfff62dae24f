"""The dashboard as people see it: real runs on a real MLflow server, looked at with a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import load_config
from orchestration.tracking.tracker import Tracker, TrackingSettings
from tests.browser import Browser, chromium
from tests.models import build_tiny_pipeline
from tests.screenshots import Dashboard
from tests.servers import mlflow_server

STEPS, GENERATIONS, SEEDS = 3, 4, 2
ARMS = {
    "fresh": "{rule: fresh, n_ini: 40, n_real: 20, n_synthetic: 20}",
    "synthetic": "{rule: fully_synthetic, n_ini: 40}",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server.uri


@pytest.fixture(scope="module")
def dashboard(browser: Browser, server: str, tmp_path_factory: pytest.TempPathFactory) -> Dashboard:
    return Dashboard(browser, server, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def ddpo(server: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their learning rate."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory = tmp_path_factory.mktemp("ddpo")
    (directory / "prompts.txt").write_text("a red seven\na blue two\na green one")
    settings = [
        "name=tiny",
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={build_tiny_pipeline(directory / 'pipeline')}",
        "captioner.path=null",
        "reward.function=tests.rewards:redness",
        "evaluation.evaluator=null",
        "evaluation.images=6",
        "evaluation.interim_images=6",
        "evaluation.every=1",
        "sampling.steps=3",
        f"training.steps={STEPS}",
        "training.images_per_step=12",
        "training.images_per_prompt=4",
        "training.updates_per_step=1",
        "actors.samplers=1",
        "actors.threads.learner=1",
        "tracking.system_metrics=false",
        f"tracking.uri={server}",
    ]
    runs = {"slow": "1e-4", "fast": "1e-3"}
    for name, rate in runs.items():
        more = [f"output_dir={directory / name}", f"training.learning_rate={rate}"]
        run_ddpo(load_config(DdpoConfig, None, [*settings, *more]))
    return [directory / name for name in runs]


@pytest.fixture(scope="module")
def mad(server: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Gaussian loops."""
    from orchestration.experiments.mad.loop import run_mad

    settings = [
        "name=loops",
        "family=gaussian",
        f"generations={GENERATIONS}",
        f"seeds={SEEDS}",
        f"output_dir={tmp_path_factory.mktemp('mad') / 'loops'}",
        "derive.effective_samples=true",
        "tracking.system_metrics=false",
        f"tracking.uri={server}",
        *(f"arms.{name}={settings}" for name, settings in ARMS.items()),
    ]
    return run_mad(load_config(MadConfig, None, settings)).parent


@pytest.fixture(scope="module")
def experiments(server: str, ddpo: list[Path], mad: Path) -> dict[str, Any]:
    """By name, the experiments of the server."""
    from mlflow import MlflowClient

    return {each.name: each for each in MlflowClient(server).search_experiments()}


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def run_of(directory: Path) -> str:
    return summary(directory)["mlflow_run_id"]


def below(server: str, experiment: str, run: str) -> dict[str, Any]:
    """By name, the runs below a run."""
    from mlflow import MlflowClient

    found = MlflowClient(server).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    return {each.info.run_name: each for each in found}


def test_a_run_opens_on_pictures(
    dashboard: Dashboard, browser: Browser, server: str, ddpo: list[Path], mad: Path
) -> None:
    """At the address that it ends with, without a click: what was found, and pictures, none of it cut off."""
    for directory, says, pictures in ((ddpo[0], "reward", 2), (mad, "goes MAD", 1)):
        settings = TrackingSettings(uri=server, system_metrics=False)
        tracker = Tracker(directory, settings, directory.name, run_of(directory))
        browser.open(tracker.open_command(), width=1280)
        tracker.finish("FINISHED")
        browser.wait_for_text(directory.name, says, "Report", "charts")
        found = dashboard.wait_for_pictures()
        assert len(found) == pictures
        assert len({round(each["bottom"] / 10) for each in found}) == 1  # side by side
        assert "Show more" not in browser.run("return document.body.innerText")
        report = browser.driver.find_element("xpath", "//a[text()='Report']").get_attribute("href")
        assert report.endswith(f"{tracker.page}/artifacts/report.html")


def test_runs_say_what_they_are(dashboard: Dashboard, experiments: dict[str, Any], ddpo: list[Path], mad: Path) -> None:
    ids = {name: experiments[name].experiment_id for name in ("ddpo", "mad")}
    said = "reward_prefers_fitting_images", "seed", "git_commit"
    dashboard.overview(ids["ddpo"], run_of(ddpo[0]), *said, picture="overview")
    said = "goes MAD", "Child runs", *ARMS
    dashboard.overview(ids["mad"], run_of(mad), *said, picture="overview")


def test_tags_find_runs(server: str, experiments: dict[str, Any], ddpo: list[Path], mad: Path) -> None:
    from mlflow import MlflowClient

    def found(name: str, query: str) -> set[str]:
        return {run.info.run_name for run in MlflowClient(server).search_runs([experiments[name].experiment_id], query)}

    assert found("ddpo", "tags.reward = 'tests.rewards:redness' and tags.seed = '0'") == {"slow", "fast"}
    assert found("ddpo", "tags.seed = '1'") == set()
    assert found("mad", "tags.rule = 'fresh' and tags.seed = '1'") == {"fresh · seed 1"}
    judged = {name: arm["verdict"]["goes_mad"] for name, arm in summary(mad)["arms"].items()}
    assert {name: found("mad", f"tags.goes_mad = '{answer}'") & {name} for name, answer in judged.items()} == {
        name: {name} for name in ARMS
    }
    gain = summary(ddpo[0])["reward_after"] - summary(ddpo[0])["reward_before"]
    assert MlflowClient(server).get_run(run_of(ddpo[0])).data.metrics["gain/reward"] == pytest.approx(gain)


def test_what_somebody_wrote_is_kept(server: str, ddpo: list[Path]) -> None:
    from mlflow import MlflowClient

    client, run_id = MlflowClient(server), run_of(ddpo[1])
    client.set_tag(run_id, "mlflow.note.content", "somebody's own words")
    tracker = Tracker(ddpo[1], TrackingSettings(uri=server, system_metrics=False), "fast", run_id)
    tracker.describe({}, {"loop": "ddpo"}, "the program's words")
    tracker.finish("FINISHED")
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "somebody's own words"


def test_what_matters_most_is_drawn_first(
    dashboard: Dashboard, server: str, experiments: dict[str, Any], ddpo: list[Path], mad: Path
) -> None:
    headings = dashboard.metrics(experiments["ddpo"].experiment_id, run_of(ddpo[0]), charts=2, picture="run")
    assert headings[0] == "A first look"
    assert headings.index("advantage") == 1
    arm = below(server, experiments["mad"].experiment_id, run_of(mad))["fresh"]
    headings = dashboard.metrics(experiments["mad"].experiment_id, arm.info.run_id, charts=1, picture="arm")
    assert headings == ["A first look", "exact", "interval", "Model metrics"]


def test_images_are_on_the_slider(dashboard: Dashboard, experiments: dict[str, Any], ddpo: list[Path]) -> None:
    experiment, key = experiments["ddpo"].experiment_id, "A first look/held_out"
    dashboard.slider(experiment, run_of(ddpo[0]), key, last=STEPS, picture="slider")


def test_runs_are_compared(dashboard: Dashboard, experiments: dict[str, Any], ddpo: list[Path]) -> None:
    experiment = experiments["ddpo"].experiment_id
    dashboard.charts(experiment, charts=2, lines=2, picture="charts")
    dashboard.browser.wait_for_text("DDPO", "slow", "fast", "A first look/reward")
    runs = [run_of(directory) for directory in ddpo]
    dashboard.difference(experiment, runs, ["training.learning_rate", "0.0001", "0.001"], picture="difference")
    assert "training.clip_range" not in dashboard.browser.run("return document.body.innerText")


def test_arms_are_compared(dashboard: Dashboard, experiments: dict[str, Any], mad: Path) -> None:
    dashboard.charts(experiments["mad"].experiment_id, charts=1, lines=len(ARMS), picture="mad", expand=1)
    dashboard.browser.wait_for_text("MAD", "loops", *ARMS, "A first look/w2_squared")
    script = (
        "return [...document.querySelectorAll('[data-testid=experiment-view-table-run-color]')].map(e => e.innerText)"
    )
    assert len(set(dashboard.browser.run(script))) == 1 + len(ARMS)


def test_the_report_is_among_the_artifacts(
    dashboard: Dashboard, experiments: dict[str, Any], ddpo: list[Path], mad: Path
) -> None:
    for name, directory in (("ddpo", ddpo[0]), ("mad", mad)):
        widths = dashboard.artifact_report(experiments[name].experiment_id, run_of(directory), picture="artifact")
        assert widths
        assert min(widths) > 300


def numbers(browser: Browser, selector: str) -> list[float]:
    """In full precision, what a part of a report shows."""
    script = "return [...document.querySelectorAll(`${arguments[0]} data`)].map(each => Number(each.value))"
    return browser.run(script, selector)


def test_the_numbers_of_a_ddpo_report_are_the_summarys(browser: Browser, ddpo: list[Path]) -> None:
    browser.open((ddpo[0] / "report.html").as_uri())
    browser.wait_for_text("FINISHED", f"{STEPS}/{STEPS}")
    held = summary(ddpo[0])
    assert numbers(browser, "tr[id='evaluation/reward']") == [held["reward_before"], held["reward_after"]]
    assert numbers(browser, "#calibration") == list(held["calibration"].values())
    assert numbers(browser, "#timeline") == list(held["seconds_by_stage"].values())
    assert browser.run("return document.querySelectorAll('.bars > *').length") == STEPS


def test_the_numbers_of_a_mad_report_are_the_summarys(browser: Browser, mad: Path) -> None:
    browser.open((mad / "report.html").as_uri())
    done = json.loads((mad / "manifest.json").read_text())["total_steps"]
    assert done % (len(ARMS) * GENERATIONS) == 0  # seeds that fit into one task count once
    browser.wait_for_text("FINISHED", "Does it go MAD?", f"{done}/{done}")
    for name, arm in summary(mad)["arms"].items():
        for metric, found in arm["metrics"].items():
            law = [found["oracle"][-1]] if "oracle" in found else []
            expected = [value for value in (found["mean"][0], found["mean"][-1], *law) if value is not None]
            assert numbers(browser, f"[data-arm='{name}'] [data-metric='{metric}']") == expected
        badge = browser.run("return document.querySelector(`[data-arm='${arguments[0]}'] .badge`).innerText", name)
        assert badge == arm["verdict"]["goes_mad"]
        if effective := arm.get("effective_samples"):
            intervals = [effective[key].values() for key in ("n_e", "n_e_over_n_r") if key in effective]
            expected = [
                effective["limit"],
                *(number for interval in intervals for number in interval if number is not None),
            ]
            assert numbers(browser, f"[data-effective='{name}']") == expected
    assert browser.run("return document.querySelectorAll('.bars > *').length") == GENERATIONS
