"""Pages of the dashboard as people see them: each is opened, checked to show what it is for, and photographed.

``python -m tests.screenshots`` makes the pictures of docs/dashboard.md. What they show is run first unless it is there,
a few minutes each. Chromium is needed: ``apt-get install chromium chromium-driver``.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.storage.locations import CHECKOUT
from tests.browser import Browser, chromium
from tests.servers import mlflow_server

RUNS = CHECKOUT / "runs" / "dashboard"
PICTURES = CHECKOUT / "docs" / "images"
_DDPO = ("ddpo", "--config", "configs/ddpo/digits.yaml", "training.steps=24", "evaluation.every=4")
_ARMS = (
    "{real only: {rule: real_only, n_ini: 120}, fully synthetic: {rule: fully_synthetic, n_ini: 120},"
    " fresh: {rule: fresh, n_ini: 120, n_real: 48, n_synthetic: 72}}"
)
_MAD = ("mad", "--config", "configs/mad/digits.yaml", "generations=4", "seeds=2", "diffusion.training_steps=100")
COMMANDS = {
    "digits-lr1e-4": (*_DDPO, "training.learning_rate=1e-4"),
    "digits-lr2e-4": (*_DDPO, "training.learning_rate=2e-4"),
    "digits-loops": (*_MAD, f"arms={_ARMS}"),
}

# Of each chart that Plotly has drawn, the courses of its lines; one of a single point is none.
_LINES = """return [...document.querySelectorAll('.js-plotly-plot')].map(plot => [...new Set(
    [...plot.querySelectorAll('.scatterlayer .js-line')].map(line => line.getAttribute('d') || '')
    .filter(course => course.includes('L')))])"""
_IMAGES = """return [...document.images].filter(each => each.naturalWidth > 0 && each.width > 60)
    .map(each => each.currentSrc)"""
_DESCRIPTION = """const all = [...document.querySelectorAll("img[src*='get-artifact']")];
    return all.every(each => each.naturalWidth > 100) && all.map(each => each.getBoundingClientRect().toJSON())"""
_ELSEWHERE = """const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode())
        texts.currentNode.nodeValue = texts.currentNode.nodeValue.replaceAll(arguments[0], '~/ouroboros')"""
_RIGHT = "\ue014"  # the key


class Dashboard:
    """The pages of an MLflow server; every picture goes to ``directory``."""

    def __init__(self, browser: Browser, uri: str, directory: Path) -> None:
        self.browser, self.uri, self.directory = browser, uri, directory
        browser.open(f"{uri}/health")
        # MLflow opens its assistant over the first page that somebody sees, once.
        browser.run("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")

    def open(self, page: str, height: int = 900) -> None:
        """A page as those see it who train models; MLflow would begin with those who build agents."""
        question = "&" if "?" in page else "?"
        self.browser.open(f"{self.uri}/#/{page}{question}workflowType=machine_learning", height=height)

    def photograph(self, name: str) -> None:
        """A picture of the window, without the tools of charts and the place of the checkout."""
        self.browser.run("document.head.insertAdjacentHTML('beforeend', '<style>.modebar {display: none}</style>')")
        self.browser.run(_ELSEWHERE, str(CHECKOUT))
        self.browser.screenshot(self.directory / f"dashboard_{name}.png")

    def wait_for_lines(self, charts: int, each: int) -> None:
        """Until so many charts have drawn ``each`` lines."""

        def drawn() -> bool:
            return sum(len(courses) == each for courses in self.browser.run(_LINES)) >= charts

        self.browser.wait(drawn, f"{charts} charts of {each} lines")

    def wait_for_image(self, step: int) -> None:
        """Until the image that was logged at a step is shown."""
        self.browser.wait(
            lambda: any(f"step%2B{step}%2B" in url for url in self.browser.run(_IMAGES)), f"the image of step {step}"
        )

    def overview(self, experiment: str, run: str, *texts: str, picture: str) -> None:
        """A run's description, tags and parameters."""
        self.open(f"experiments/{experiment}/runs/{run}", height=640)
        self.browser.wait_for_text(*texts)
        self.wait_for_pictures()
        self.photograph(picture)

    def wait_for_pictures(self) -> list[dict[str, float]]:
        """Until the pictures of a run's description are there. Returns where they stand in the window."""
        return self.browser.wait(lambda: self.browser.run(_DESCRIPTION), "the description's pictures")

    def metrics(self, experiment: str, run: str, charts: int, picture: str) -> list[str]:
        """A run's charts. Returns the headings of their sections, from above."""
        self.open(f"experiments/{experiment}/runs/{run}/model-metrics", height=1150)
        self.wait_for_lines(charts, each=1)
        self.photograph(picture)
        return re.findall(r"^(.+)\s\(\d+\)$", self.browser.run("return document.body.innerText"), re.MULTILINE)

    def slider(self, experiment: str, run: str, key: str, last: int, picture: str) -> None:
        """A run's images of ``key``, from step 0 to the ``last``; without its parameters, which would hide them."""
        self.open(f"experiments/{experiment}/runs/{run}/model-metrics", height=1150)
        for what in (
            f"//*[text()='{key}']/following::button[@data-testid='experiment-view-compare-runs-card-menu'][1]",
            "//*[@data-testid='experiment-view-compare-runs-card-edit']",
            "//*[text()='Show run parameters']/preceding::button[@role='switch'][1]",
            "//*[@data-testid='experiment-view-compare-runs-chart-modal-confirm']",
        ):
            self.browser.click(what)
        self.wait_for_image(0)

        def moved() -> bool:
            slider = self._find("//*[@role='slider']")[0]
            if slider.get_attribute("aria-valuenow") != str(last):
                slider.send_keys(_RIGHT)
                return False
            return True

        self.browser.wait(moved, f"the slider at step {last}")
        self.wait_for_image(last)
        self.photograph(picture)

    def charts(self, experiment: str, charts: int, lines: int, picture: str, expand: int = 0) -> None:
        """The runs of an experiment in common charts, the first ``expand`` parents with their children."""
        self.open(f"experiments/{experiment}/runs?compareRunsMode=CHART", height=1150)
        for _ in range(expand):
            self.browser.click("(//div[contains(@class, 'ag-row')]//button)[1]")
        self.wait_for_lines(charts, each=lines)
        self.photograph(picture)

    def difference(self, experiment: str, runs: Sequence[str], texts: Sequence[str], picture: str) -> None:
        """Two runs side by side, the parameters in which they differ."""
        self.open(
            f'compare-runs?runs={json.dumps(runs, separators=(",", ":"))}&experiments=["{experiment}"]', height=1150
        )
        self.browser.click("(//*[text()='Show diff only'])[1]")
        self.browser.wait_for_text(*texts)
        self.photograph(picture)

    def artifact_report(self, experiment: str, run: str, picture: str) -> list[int]:
        """The report among a run's artifacts. Returns the widths of its pictures."""
        self.open(f"experiments/{experiment}/runs/{run}/artifacts/report.html", height=1150)
        frame = self.browser.wait(lambda: self._find("//iframe"), "the report's frame")[0]
        self.browser.driver.switch_to.frame(frame)
        self.browser.wait_for_text("Config")
        widths = self.browser.run("return [...document.images].map(each => each.naturalWidth)")
        self.browser.driver.switch_to.default_content()
        self.photograph(picture)
        return widths

    def _find(self, xpath: str) -> list[Any]:
        return self.browser.driver.find_elements("xpath", xpath)


def main() -> None:
    """Run what is not there yet, and photograph it."""
    store = f"sqlite:///{RUNS / 'server.db'}"
    for name, words in COMMANDS.items():
        directory = RUNS / name
        if not (directory / "summary.json").exists():
            begun = (directory / "manifest.json").exists()
            new = [*words, f"output_dir={directory}", f"tracking.uri={store}", "tracking.system_metrics=false"]
            arguments = ["resume", str(directory)] if begun else new
            subprocess.run([sys.executable, "-m", "orchestration.cli", *arguments], cwd=CHECKOUT, check=True)
    from mlflow import MlflowClient

    with mlflow_server(RUNS) as server, chromium() as browser:
        uri = server.uri
        client, dashboard = MlflowClient(uri), Dashboard(browser, uri, PICTURES)
        ddpo, mad = (client.get_experiment_by_name(name).experiment_id for name in ("ddpo", "mad"))
        slow, fast, loops = (
            json.loads((RUNS / name / "summary.json").read_text())["mlflow_run_id"] for name in COMMANDS
        )
        below = {run.info.run_name: run.info.run_id for run in client.search_runs([mad])}
        dashboard.charts(ddpo, charts=3, lines=2, picture="charts")
        dashboard.overview(ddpo, fast, "sentence_cosine", picture="run")
        dashboard.overview(mad, loops, "goes MAD", picture="mad")
        dashboard.slider(ddpo, fast, "A first look/held_out", last=24, picture="slider")
        dashboard.difference(ddpo, [slow, fast], ["training.learning_rate"], picture="difference")
        dashboard.artifact_report(mad, loops, picture="artifact")
        dashboard.slider(mad, below["fully synthetic · seed 0"], "samples", last=6, picture="mad_slider")
        for name in ("digits-lr2e-4", "digits-loops"):
            browser.open((RUNS / name / "report.html").as_uri(), width=1280)
            browser.run(_ELSEWHERE, str(CHECKOUT))
            browser.screenshot(PICTURES / f"dashboard_report_{name}.png", height=1500)


if __name__ == "__main__":
    main()
