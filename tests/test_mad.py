"""The self-consuming loop on a real Ray and a real MLflow store, with genuine small generators of real digits."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.lineage import render_lineage
from orchestration.runs.config import load_config
from tests.processes import start, wait_until
from tests.schemas import checked

GENERATIONS, SEEDS, POOL, REFERENCE = 3, 2, 240, 60
ARMS = {
    "synthetic": "{rule: fully_synthetic, n_ini: 60}",
    "biased": "{rule: fully_synthetic, n_ini: 60, sampling_bias: 0.5}",
    "fresh": "{rule: fresh, n_ini: 60, fresh_fraction: 0.5}",
    "fine-tuned": "{rule: iterative_retraining, n_ini: 60, n_real: 60, n_synthetic: 20}",
    "curated": "{rule: curated, n_ini: 60, n_real: 30, n_synthetic: 30, candidates: 2}",
    "verified": "{rule: verified, n_ini: 60, n_real: 30, n_synthetic: 30, acceptance: 0.05}",
    "gan": "{family: gan, rule: accumulate, n_ini: 60}",
}


def configure(directory: Path, *more: str, arms: dict[str, str] = ARMS) -> MadConfig:
    """An experiment of seconds: a few updates of small networks on 300 digits."""
    settings = [
        "name=tiny",
        "family=diffusion",
        f"generations={GENERATIONS}",
        f"seeds={SEEDS}",
        f"output_dir={directory}",
        f"data.limit={POOL + REFERENCE}",
        f"data.reference={REFERENCE}",
        "diffusion.channels=8",
        "diffusion.training_steps=6",
        "diffusion.sampling_steps=3",
        "gan.steps=6",
        "tracking.system_metrics=false",
        *(f"arms.{name}={settings}" for name, settings in arms.items()),
    ]
    return load_config(MadConfig, None, [*settings, *more])


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def tasks(directory: Path) -> dict[str, dict[str, Any]]:
    """Every stored task, by key, with what made it."""
    return {p.parent.name: json.loads(p.read_text()) for p in (directory / "tasks").glob("[0-9a-f]*/manifest.json")}


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed experiment."""
    from orchestration.experiments.mad.loop import run_mad

    directory = tmp_path_factory.mktemp("mad") / "run"
    assert run_mad(configure(directory)) == directory / "summary.json"
    return directory


def test_the_summary_holds_every_metric_as_arms_by_seeds_by_generations(finished: Path) -> None:
    content = summary(finished)
    assert list(content["arms"]) == list(ARMS)
    for name, arm in content["arms"].items():
        expected = {"fid", "precision", "recall", "density", "coverage", "class_entropy", "memorisation"}
        assert set(arm["metrics"]) == expected | ({"label_accuracy"} if name != "gan" else set())
        for kind, metric in arm["metrics"].items():
            values = np.array(metric["values"], float)
            assert values.shape == (SEEDS, GENERATIONS)
            if kind in ("fid", "density"):
                scaled = np.log(values) if kind == "fid" else values
                half = 12.7062 * scaled.std(axis=0, ddof=1) / np.sqrt(2)  # Student's t, one degree of freedom
                ends = scaled.mean(axis=0), scaled.mean(axis=0) + half
                found = np.array([metric["mean"], metric["high"]], float)
                np.testing.assert_allclose(np.log(found) if kind == "fid" else found, ends, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(np.sum(arm["class_histogram"], axis=1), 1)
        assert arm["verdict"]["goes_mad"] in ("yes", "no", "undecided")
        assert any("2 seeds cannot carry a claim" in warning for warning in arm["verdict"]["warnings"])
    assert content["arms"]["fresh"]["sizes"] == [[60, 0], [30, 30], [30, 30]]
    assert content["arms"]["gan"]["sizes"] == [[60, 0], [60, 60], [60, 120]]
    floor = content["floor"]["diffusion"]
    assert floor["fid"] < min(min(arm["metrics"]["fid"]["mean"]) for arm in content["arms"].values())
    assert len(content["extractor_sha256"]) == 64
    assert content["seconds_by_stage"]["fit/cpu"] > 0
    assert all(len(seconds) == GENERATIONS for seconds in content["seconds_by_generation"].values())


def test_it_keeps_to_the_schemas(finished: Path) -> None:
    manifest, summary = checked(finished)
    assert summary["arms"].keys() == manifest["config"]["arms"].keys()
    assert manifest["inputs"]["data.source"]["sha256"] == manifest["real_images"]["sha256"]


def test_what_arms_have_in_common_is_done_once(finished: Path) -> None:
    fits = [task["parameters"] for task in tasks(finished).values() if task["kind"] == "fit"]
    first = [fit for fit in fits if fit["manifest"]["generation"] == 1]
    assert len(first) == 2 * SEEDS  # six diffusion arms share theirs
    # The biased and the plain arm part at generation 2, as do all others.
    assert len(fits) == len(first) + len(ARMS) * SEEDS * (GENERATIONS - 1)


def test_no_training_waits_for_an_evaluation(finished: Path) -> None:
    found = tasks(finished)

    def behind(key: str) -> set[str]:
        return {found[key]["kind"]}.union(*map(behind, found[key]["inputs"]))

    kinds = {key: behind(key) for key, task in found.items() if task["kind"] == "fit"}
    assert max(map(len, kinds.values())) > 2
    assert not any("measure" in each for each in kinds.values())
    evaluations = {key for key, task in found.items() if task["parameters"].get("role") == "evaluation"}
    assert evaluations
    assert not any(evaluations & set(found[key]["inputs"]) for key in kinds)


def test_each_sample_meets_the_extractor_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.mad.tasks import perform
    from pipelines.measures.features import Extractor
    from pipelines.storage.tasks import TaskStore

    store, seen, features = TaskStore(finished / "tasks"), [], Extractor.features
    monkeypatch.setattr(Extractor, "features", lambda self, images: seen.append(len(images)) or features(self, images))
    measures = [(key, task) for key, task in tasks(finished).items() if task["kind"] == "measure"][:3]
    for key, task in measures:
        files = perform("measure", task["parameters"], [store.load(each) for each in task["inputs"]], "cpu")
        again, stored = (json.loads(each["metrics.json"]) for each in (files, store.load(key)))
        assert again["class_histogram"] == stored["class_histogram"]
        assert again["metrics"]["fid"] == pytest.approx(stored["metrics"]["fid"], rel=1e-3)
    assert seen == [REFERENCE] * len(measures)


def test_no_model_ever_sees_the_reference(finished: Path) -> None:
    from pipelines.mad.tasks import read_real_data
    from pipelines.storage.tasks import TaskStore

    store, found = TaskStore(finished / "tasks"), tasks(finished)
    real = read_real_data(store.load(next(key for key, task in found.items() if task["kind"] == "data")))
    reference = set(real["reference_rows"].tolist())
    assert len(reference) == REFERENCE
    seen: dict[int, set[int]] = {}
    for key, task in found.items():
        if task["kind"] == "fit":
            for part in json.loads(store.load(key)["training_set.json"]):
                if part["generation"] == 0:
                    seen.setdefault(task["parameters"]["seeds"][0], set()).update(part["ids"])
    assert set(seen) == set(range(SEEDS))
    for rows in seen.values():
        assert not rows & reference
        assert len(rows) == 60 + 2 * 30  # generation 1, and new ones for the fresh arm's two later generations


def test_generated_sets_say_where_they_come_from(finished: Path) -> None:
    from datasets import load_from_disk

    found = tasks(finished)
    sets = {key: task for key, task in found.items() if task["kind"] == "sample"}
    key, task = next((k, t) for k, t in sets.items() if t["parameters"]["sampling_bias"] == 0.5)
    rows = load_from_disk(str(finished / "tasks" / key))
    assert set(rows["sampling_bias"]) == {0.5}
    assert set(rows["checkpoint"]) == {task["inputs"][0]}
    assert found[task["inputs"][0]]["kind"] == "fit"
    assert set(rows["generation"]) == {task["parameters"]["generation"]}
    assert set(rows["seed"]) == {task["parameters"]["seeds"][0]}
    assert rows[0]["image"].size == (8, 8)
    evaluations = [t for t in sets.values() if t["parameters"]["role"] == "evaluation"]
    assert {t["parameters"]["count"] for t in evaluations} == {REFERENCE}


def test_fine_tuning_goes_on_and_others_start_over(finished: Path) -> None:
    found = tasks(finished)
    for task in found.values():
        if task["kind"] == "fit":
            starts = [key for key in task["inputs"] if found[key]["kind"] == "fit"]
            assert len(starts) == int(task["parameters"]["fine_tunes"])


def test_mlflow_holds_arms_and_seeds_below_the_run(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    content = summary(finished)
    top = client.get_run(content["mlflow_run_id"])
    assert top.info.status == "FINISHED"
    assert top.data.tags["loop"] == "mad"
    assert {"figures", "summary.json"} <= {artifact.path for artifact in client.list_artifacts(top.info.run_id)}

    def below(run: Any) -> list[Any]:
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        return list(client.search_runs([top.info.experiment_id], query))

    arms = {run.info.run_name: run for run in below(top)}
    assert set(arms) == set(ARMS)
    for name, arm in arms.items():
        assert arm.info.status == "FINISHED"
        points = client.get_metric_history(arm.info.run_id, "fid")
        assert {p.step: p.value for p in points} == pytest.approx(
            dict(enumerate(content["arms"][name]["metrics"]["fid"]["mean"], start=1))
        )
        assert arm.data.tags["rule"] == content["arms"][name]["settings"]["rule"]
        inputs = {each.dataset.name: each.dataset for each in client.get_run(arm.info.run_id).inputs.dataset_inputs}
        assert sorted(inputs) == [f"generation {number:03d}" for number in (1, 2, 3)]
        assert "60" in inputs["generation 001"].profile
        seeds = below(arm)
        assert {run.data.params["seed"] for run in seeds} == {"0", "1"}
        for run in seeds:
            points = client.get_metric_history(run.info.run_id, "recall")
            values = content["arms"][name]["metrics"]["recall"]["values"][int(run.data.params["seed"])]
            assert {p.step: p.value for p in points} == dict(enumerate(values, start=1))
            images = [Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "images")]
            steps = sorted(int(image.split("+")[2]) for image in images if "compressed" in image)
            assert steps == list(range(GENERATIONS + 1))  # at step 0, real images


def test_pictures_are_there(finished: Path) -> None:
    from PIL import Image

    names = {path.name for path in (finished / "figures").iterdir()}
    assert {"curves.png", "precision_recall.png", "samples_fine-tuned.png", "classes_gan.png"} <= names
    for path in (finished / "figures").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 60


def test_the_same_command_repeats_nothing_and_a_longer_one_only_what_is_new(
    finished: Path, ray_session: None, tmp_path: Path
) -> None:
    import shutil

    from orchestration.experiments.mad.loop import run_mad
    from orchestration.experiments.registry import EXPERIMENTS

    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    before, told = tasks(directory), summary(directory)
    EXPERIMENTS["mad"].resume(directory, trusted=False, changes=False)
    assert tasks(directory) == before  # with the time each was finished at
    again = summary(directory)
    assert again["arms"] == told["arms"]
    assert again["mlflow_run_id"] != told["mlflow_run_id"]  # a copy is a run of its own

    run_mad(configure(directory, f"generations={GENERATIONS + 1}"))
    after = tasks(directory)
    assert {key: after[key] for key in before} == before
    for name, arm in summary(directory)["arms"].items():
        values = np.array(arm["metrics"]["fid"]["values"])
        assert values.shape == (SEEDS, GENERATIONS + 1)
        np.testing.assert_array_equal(values[:, :GENERATIONS], told["arms"][name]["metrics"]["fid"]["values"])


def test_more_seeds_generations_and_arms_repeat_nothing(ray_session: None, tmp_path: Path) -> None:
    from orchestration.experiments.mad.loop import run_mad

    def run(generations: int, seeds: int, *arms: str) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes = [f"generations={generations}", f"seeds={seeds}", f"output_dir={tmp_path / 'run'}"]
        rules = [f"arms.{name}={{rule: {name}, n_ini: 20}}" for name in arms]
        run_mad(load_config(MadConfig, None, ["tracking.system_metrics=false", *sizes, *rules]))
        return tasks(tmp_path / "run"), summary(tmp_path / "run")["arms"]["accumulate"]["metrics"]["variance"]

    before, short = run(2, 2, "accumulate")
    after, long = run(3, 4, "accumulate", "fully_synthetic")
    assert {key: after[key] for key in before} == before
    assert np.shape(long["values"]) == (4, 3)
    np.testing.assert_array_equal(np.array(long["values"])[:2, :2], short["values"])


@pytest.fixture(scope="module")
def killed(tiny_pipeline: Path) -> list[str]:
    """A loop of words whose generations are aligned: every kind of task that a chain may have."""
    return [
        "family=text_to_image",
        f"text_to_image.path={tiny_pipeline}",
        "text_to_image.training_steps=2",
        "text_to_image.sampling_steps=2",
        "text_to_image.evaluator=null",
        "captions.share=0.5",
        "captions.refitted=1",
        "refinement=aligned",
        "aligned.steps=1",
        "aligned.reward=tests.rewards:redness",
        "aligned.images_per_step=16",
        "aligned.sampling_steps=2",
        "data.source=captioned_digits",
        "data.limit=100",
        "data.reference=30",
        "rule=fresh",
        "n_ini=20",
        "n_real=10",
        "n_synthetic=10",
        "seeds=1",
        "generations=3",
        "tracking.system_metrics=false",
    ]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, killed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from orchestration.experiments.mad.loop import run_mad

    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return run_mad(load_config(MadConfig, None, [*killed, f"output_dir={directory}"])).parent


def test_a_killed_driver_loses_nothing(undisturbed: Path, killed: list[str], tmp_path: Path) -> None:
    """Killed between generations, then inside of one, which is aligned and not measured yet."""
    directory, log, done = tmp_path / "killed", tmp_path / "log.txt", 0
    command = ["mad", *killed, f"output_dir={directory}"]
    kept: dict[str, int | None] = {}

    def between() -> bool:
        return "generation 1/" in log.read_text()

    def inside() -> bool:
        kinds = [task["kind"] for task in tasks(directory).values()]
        return kinds.count("refine") > kinds.count("measure") > done

    def repeated(held: dict[str, dict[str, Any]]) -> list[str]:
        return [key for key, finished_at in kept.items() if held[key].get("finished_at_ms") != finished_at]

    for reached in (between, inside):
        process = start(command, log, afresh=reached is between)
        over = process.poll
        wait_until(lambda reached=reached, over=over: reached() or over() is not None, 600, "the moment", pause=0.01)
        assert over() is None, f"it ended before the moment came: {log.read_text()}"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        before = tasks(directory)
        assert len(kept) < len(before) < len(tasks(undisturbed))
        assert not repeated(before)
        kept = {key: task.get("finished_at_ms") for key, task in before.items()}  # real images are nobody's task
        done = sum(task["kind"] == "measure" for task in before.values())

    assert start(command, log).wait(timeout=600) == 0, log.read_text()
    after, expected = tasks(directory), tasks(undisturbed)
    assert not repeated(after)
    assert after.keys() == expected.keys()
    for key, task in expected.items():
        for same in ("kind", "parameters", "inputs", "sha256"):
            assert after[key][same] == task[same]
    assert summary(directory)["arms"] == summary(undisturbed)["arms"]

    told = io.StringIO()
    Console(width=200, file=told).print(render_lineage(directory, "fresh/0/2/3"))
    assert "asked for: 'a" in told.getvalue()
    assert "the captioner saw: " in told.getvalue()
