"""Studies with a real MLflow store: a toy from a single file, its claims, and on a real Ray what a kill leaves."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestration.experiments.registry import EXPERIMENTS
from orchestration.experiments.study.config import Study, find_study
from orchestration.experiments.study.preflight import describe_study, preflight_study
from orchestration.runs.browse import RunInfo, everything, facts, render_list, render_show
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.html_report import write_report
from pipelines.studies import products, task
from policies.common.claims import Claim
from tests import studies
from tests.one_by_one import one_by_one
from tests.processes import start, wait_until
from tests.schemas import checked

TOY = ["study=tests.studies:Shrink", "seeds=3", "tracking.system_metrics=false"]


def configure(*more: str) -> Study:
    return load_config(Study, None, [*TOY, *more])  # type: ignore[type-abstract]


@pytest.fixture(scope="module")
def finished(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed study, whose tasks were done one after the other and without Ray."""
    from orchestration.api import run_study

    directory = tmp_path_factory.mktemp("study") / "run"
    directory.parent.joinpath("store").mkdir()
    store = shutil.copy(empty_store, directory.parent / "store" / "mlflow.db")
    with one_by_one():
        result = run_study(configure(f"output_dir={directory}"), **{"tracking.uri": f"sqlite:///{store}"})
    assert result.directory == directory
    assert result.summary["study"] == "tests.studies:Shrink"
    frame = result.metrics  # a row for each arm and seed
    assert (len(frame), {*frame["arm"]}, {*frame["seed"]}) == (6, {"shrunk", "untouched"}, {0, 1, 2})
    return directory


def text_of(shown: Any) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(shown)
    return console.export_text()


def test_a_configuration_becomes_the_study_that_it_names() -> None:
    config = configure("factor=0.25", "seeds=[4, 9]")
    assert type(config) is studies.Shrink
    assert (config.factor, config.seed_list, config.arms) == (0.25, [4, 9], ("shrunk", "untouched"))
    assert Study.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["factr=0.5"], "unknown key 'factr'; did you mean 'factor'?"),
        (["factor=2"], "factor: Input should be less than or equal to 1"),
        (["arms=[shrunken]"], "'shrunken' is none of the arms shrunk, untouched"),
        (["arms=[]"], "give each arm once"),
        (["seeds=0"], "give a number of seeds"),
        (["study=shrinc"], "study 'shrinc' is not known"),
        (["study=tests.studies:Shrinc"], "has no 'Shrinc'"),
        (["study=tests.studies:draw"], "is no class that extends"),
        (["study=orchestration.experiments.study.config:Study"], "has no claims and no tasks"),
        (["study=null"], "study: name one of"),
        (["study=no_such_module:Study"], "cannot be imported"),
    ],
)
def test_bad_settings_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_installed_package_brings_its_study(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from orchestration.experiments.study import config

    point = EntryPoint("shrink", "tests.studies:Shrink", "ouroboros.studies")
    monkeypatch.setattr(config, "entry_points", lambda group: [point] if group == point.group else [])
    assert find_study("shrink") is studies.Shrink


def test_the_preflight_asks_the_study_before_anything_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="factor is 1, which is what the control does"):
        preflight_study(configure("factor=1", f"output_dir={tmp_path / 'run'}"))
    with pytest.raises(ConfigError, match="cpus_per_task is 4096"):
        preflight_study(configure("workers.cpus_per_task=4096"))
    assert not (tmp_path / "run").exists()


def test_a_studys_scale_is_that_of_its_absolute_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies.Shrink, "scale", "share")
    assert [claim.scale for claim in preflight_study(configure()).claims] == [None, "logarithm"]  # the claim's own
    monkeypatch.setattr(studies.Shrink, "claims", lambda _: [Claim("small", "size", "shrunk", "at most", 1.0)])
    assert [claim.scale for claim in preflight_study(configure()).claims] == ["share"]


def test_what_arms_have_in_common_is_one_task(tmp_path: Path) -> None:
    config = configure()
    plan = preflight_study(config)
    kinds = [each.kind for each in plan.order]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "tests.studies:draw": 3,
        "tests.studies:shrink": 6,
        "tests.studies:measure": 6,
    }
    text = describe_study(config, plan)
    assert "2 arms (shrunk, untouched) × 3 seeds: 15 tasks" in text
    assert "claim: shrinking makes numbers smaller: size of shrunk / untouched at most 0.75" in text


def test_a_tasks_function_has_to_be_found_by_its_name() -> None:
    with pytest.raises(ValueError, match="is no function of a module"):
        task(lambda parameters, inputs, device: {}, {})


def test_the_summary_has_every_seed_and_judges_the_claims(finished: Path) -> None:
    manifest, summary = checked(finished)
    assert (manifest["loop"], manifest["status"], manifest["committed_step"]) == ("study", "FINISHED", 15)
    assert "code of tests.studies" in manifest["inputs"]
    sizes = {
        arm: [np.random.default_rng(seed).random(100).mean() * factor for seed in range(3)]
        for arm, factor in {"shrunk": 0.5, "untouched": 1.0}.items()
    }
    for arm, values in sizes.items():
        np.testing.assert_allclose(summary["arms"][arm]["metrics"]["size"]["values"], values)
    ratio, small = summary["claims"]
    assert (ratio["outcome"], small["outcome"]) == ("kept", "missed")
    assert ratio["value"] == pytest.approx(0.5)
    assert small["low"] > 0.01
    shown = summary["arms"]["shrunk"]["metrics"]["size"]
    assert [shown[end] for end in ("mean", "low", "high")] == [small[end] for end in ("value", "low", "high")]
    assert shown["mean"] == pytest.approx(np.exp(np.log(sizes["shrunk"]).mean()))  # on the claim's scale
    assert summary["seconds_by_stage"].keys() >= {"draw/cpu", "shrink/cpu", "measure/wall"}


def test_products_and_figures_are_in_the_runs_directory(finished: Path) -> None:
    numbers = {
        arm: [np.fromfile(finished / "products" / f"{arm}-seed{seed}" / "numbers") for seed in range(3)]
        for arm in ("shrunk", "untouched")
    }
    np.testing.assert_array_equal(numbers["shrunk"], 0.5 * np.array(numbers["untouched"]))
    names = {path.name for path in (finished / "figures").iterdir()}
    each = [f"{arm}-seed{seed}" for arm in numbers for seed in range(3)]
    drawn = {f"numbers_{name}.png" for name in each} | {f"levels_{name}.gif" for name in each}
    assert names == {"arms.png", "glance.png"} | drawn
    assert {path.name for path in (finished / "sounds").iterdir()} == {f"numbers_{name}.wav" for name in each}
    page = (finished / "report.html").read_text()
    assert page.count('src="data:image/gif;base64,') == page.count('src="data:audio/wav;base64,') == 6


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["metrics.json"], {}),
        (["product/model_index.json", "product/unet/config.json"], {"": ["model_index.json", "unet/config.json"]}),
        (["product/red/a", "product/red/unet/b", "product/three/a"], {"red": ["a", "unet/b"], "three": ["a"]}),
    ],
)
def test_a_product_is_a_directory_or_several_by_name(paths: list[str], found: dict[str, list[str]]) -> None:
    assert {name: list(files) for name, files in products(dict.fromkeys(paths, b"")).items()} == found


def test_mlflow_holds_the_claims_and_arms_and_seeds_below_them(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.parent / 'store' / 'mlflow.db'}")
    top = client.get_run(json.loads((finished / "summary.json").read_text())["mlflow_run_id"])
    assert top.data.tags["claim/01"].startswith("kept       shrinking makes numbers smaller")
    assert {key: top.data.metrics[f"claims/{key}"] for key in ("kept", "missed", "undecided")} == {
        "kept": 1,
        "missed": 1,
        "undecided": 0,
    }

    def below(run: Any) -> dict[str, Any]:
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        found = client.search_runs([run.info.experiment_id], query)
        return {each.info.run_name: each for each in found}

    arms = below(top)
    assert arms.keys() == {"shrunk", "untouched"}
    assert arms["shrunk"].data.metrics["A first look/size"] == arms["shrunk"].data.metrics["size"]
    seeds = below(arms["shrunk"])
    assert seeds.keys() == {f"shrunk · seed {seed}" for seed in range(3)}
    child = seeds["shrunk · seed 2"]
    assert len(client.get_metric_history(child.info.run_id, "sorted")) == 5
    assert any("numbers" in each.path for each in client.list_artifacts(child.info.run_id, "images"))


def test_a_strangers_study_is_shown_and_none_of_its_code_imported(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for name in ("manifest.json", "summary.json"):
        (copy / name).write_text((copy / name).read_text().replace("tests.studies", "strange_study"))
    shutil.copy(studies.__file__, tmp_path / "strange_study.py")
    monkeypatch.syspath_prepend(tmp_path)
    text = text_of(render_show(everything(RunInfo(copy))))
    assert "kept" in text
    assert "missed" in text
    assert "shrinking makes numbers smaller" in text
    assert "means over seeds" in text
    assert "15/15" in text_of(render_list([facts(RunInfo(copy))]))
    page = write_report(copy).read_text()
    assert '<span class="badge kept">kept</span>' in page
    assert "Does it go MAD?" not in page
    assert "shrinking makes numbers smaller" in page
    with pytest.raises(ConfigError, match="--trust"):
        EXPERIMENTS["study"].resume(copy, trusted=False, changes=False)
    assert "strange_study" not in sys.modules


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"claims": [{"sentence": "all is well"}]}, "summary.json is damaged: claims.0.metric"),
        ({"claims": "all kept"}, "summary.json is damaged: claims"),
        ({"arms": {"shrunk": {"metrics": [1, 2]}}}, "shrinking makes numbers smaller"),
        ({"arms": {"shrunk": {"metrics": {"size": {"mean": "high"}}}}}, "shrinking makes numbers smaller"),
        ({"arms": {"shrunk": {}}}, "shrinking makes numbers smaller"),
    ],
)
def test_a_damaged_summary_is_named_and_stops_nothing(
    finished: Path, tmp_path: Path, spoil: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    summary = json.loads((copy / "summary.json").read_text()) | spoil
    (copy / "summary.json").write_text(json.dumps(summary))
    assert says in text_of(render_show(everything(RunInfo(copy))))
    assert "FINISHED" in text_of(render_list([facts(RunInfo(copy))]))
    assert says in write_report(copy).read_text()


def test_only_the_same_study_goes_on_in_a_directory(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"another experiment \(different: factor\)"):
        preflight_study(configure(f"output_dir={finished}", "factor=0.3"))
    with pytest.raises(ConfigError, match="fewer seeds or arms"):
        preflight_study(configure(f"output_dir={finished}", "seeds=2"))
    assert preflight_study(configure(f"output_dir={finished}", "seeds=4")).order


@pytest.fixture
def own_file(tmp_path: Path) -> Iterator[Path]:
    """The toy as a file outside of the checkout."""
    shutil.copy(studies.__file__, tmp_path / "own_study.py")
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))


def test_a_killed_study_of_ones_own_file_loses_nothing(
    preloaded: None, finished: Path, own_file: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "killed", tmp_path / "log.txt"
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(own_file)}
    command = ["study", "study=own_study:Shrink", *TOY[1:], "seconds=0.3", f"output_dir={directory}"]

    def stored() -> dict[str, dict[str, Any]]:
        places = (directory / "tasks").glob("[0-9a-f]*/manifest.json")
        return {path.parent.name: json.loads(path.read_text()) for path in places}

    process = start(command, log, here)
    wait_until(lambda: len(stored()) > 8 or process.poll() is not None, 300, "some tasks", pause=0.01)
    assert process.poll() is None, log.read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    before = stored()
    assert 8 < len(before) < 15

    assert start(["resume", str(directory)], log, here).wait(timeout=300) == 0, log.read_text()
    after = stored()
    assert len(after) == 15
    assert all(after[key] == about for key, about in before.items())  # none was done again: not even its clock differs
    summary, expected = (json.loads((each / "summary.json").read_text()) for each in (directory, finished))
    assert (summary["arms"], summary["claims"]) == (expected["arms"], expected["claims"])
    for path in (finished / "products").rglob("numbers"):
        assert path.read_bytes() == (directory / path.relative_to(finished)).read_bytes()
    assert "kept       shrinking makes numbers smaller" in log.read_text()
