"""Sweeps on a real Ray Tune and a real MLflow store, with tiny models: stopped, killed, continued, confirmed."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from orchestration.experiments.metric_names import ddpo_metrics
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.preflight import describe_sweep, preflight_sweep
from orchestration.experiments.sweep.trial import Trial
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.manifest import write_manifest
from pipelines.generators import GENERATORS
from policies.common.search_space import exact
from tests.models import build_tiny_pipeline
from tests.processes import start, wait_until
from tests.schemas import checked

PHASE = {
    "name": "phase",
    "loop": "mad",
    "config": "configs/mad/gaussian.yaml",
    "fixed": {"rule": "fresh", "n_ini": 40, "n_total": 40, "n_real": None, "n_synthetic": None, "generations": 5},
    "space": {"fresh_fraction": [0.1, 0.5, 0.9], "sampling_bias": [1.0, 0.5]},
    "search": "grid",
    "cpus_per_trial": 1,
}


def configure(content: dict[str, Any], **changes: Any) -> SweepConfig:
    from orchestration.runs.config import validate

    return validate(SweepConfig, {**content, **changes})


def written(directory: Path, content: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.yaml").write_text(yaml.safe_dump(content))
    return directory / "sweep.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of a DDPO run of seconds, which reports at steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "prompts.txt").write_text("a red seven\na blue two\na green one\na red two")
    base = {
        "name": "tiny",
        "prompts": str(directory / "prompts.txt"),
        "model": {"path": str(build_tiny_pipeline(directory / "pipeline"))},
        "captioner": {"path": None},
        "reward": {"function": "tests.rewards:redness"},
        "evaluation": {"evaluator": None, "images": 8, "interim_images": 4, "every": 2},
        "sampling": {"steps": 3},
        "training": {"steps": 6, "images_per_step": 12, "images_per_prompt": 6, "updates_per_step": 1},
        "checkpoint": {"every": 2},
        "actors": {"samplers": 1, "threads": {"learner": 1}},
    }
    (directory / "tiny.yaml").write_text(yaml.safe_dump(base))
    return {
        "name": "tiny-sweep",
        "config": str(directory / "tiny.yaml"),
        "space": {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "metric": "reward/mean",
        "trials": 3,
        "cpus_per_trial": 1,
    }


def summary(directory: Path) -> dict[str, Any]:
    return checked(directory)[1]


def swept(content: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The summary of a sweep in this process, on the Ray that is there."""
    from orchestration.api import run_sweep

    result = run_sweep({**content, "output_dir": directory})
    assert result.directory == directory
    values = [each["value"] for each in result.summary["trials"]]
    assert [*result.metrics[result.summary["metric"]].dropna()] == [each for each in values if each is not None]
    assert {*result.metrics} >= {*content["space"], "seed", "status"}
    return summary(directory)


def finished(directory: Path) -> dict[Path, int]:
    """The trials that are over, and when they left their results."""
    over = [path for path in directory.glob("trials/*/manifest.json") if '"FINISHED"' in path.read_text()]
    return {path: (path.parent / "summary.json").stat().st_mtime_ns for path in over}


def statuses(directory: Path) -> set[tuple[str, str]]:
    """Name and status in MLflow of every run of a sweep's store."""
    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return {(run.info.run_name, run.info.status) for run in client.search_runs(experiments)}


def all_finished(directory: Path) -> bool:
    """Whether all have. One that was killed before it had committed anything has begun anew, in another run."""
    found = statuses(directory)
    finished = {name for name, status in found if status == "FINISHED"}
    return {name for name, _ in found} == finished and {status for _, status in found} <= {"FINISHED", "KILLED"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 4}, "trials is 4, but this grid has 6 points"),
        ({"space": {"fresh_fractoin": [0.1]}}, "unknown key 'fresh_fractoin'; did you mean 'fresh_fraction'"),
        ({"space": {"fresh_fraction": [0.1, 1.5]}}, r"at \{'fresh_fraction': 1.5\}: .*fresh_fraction"),
        ({"space": {}}, "space is empty"),
        ({"space": {"seeds": [1, 2]}}, "seeds of a trial is set by the sweep"),
        ({"fixed": {"sampling_bias": 0.5}}, "sampling_bias is in both space and fixed"),
        ({"fixed": {"data.source": "mixture"}, "space": {"data": [{}]}}, "so data.source would be lost"),
        ({"fixed": {}, "space": {"data.source": ["mixture"], "data": [{}]}}, "so data.source would be lost"),
        ({"scheduler": {"kind": "asha"}}, "a MAD trial reports once"),
        ({"config": "configs/mad/nothing.yaml"}, "there is no file"),
        (
            {"config": "configs/mad/gaussian_loops.yaml", "fixed": {}, "space": {"generations": [5, 6]}},
            "has several arms",
        ),
        ({"cpus_per_trial": 1000}, "asks for 1000 CPUs"),
        ({"register_as": "best"}, "only DDPO trials"),
        ({"budget": {"reward_queries": 5}}, "the MAD loop asks no reward"),
        ({"space": {"sampling_bias": {"uniform": [0.5, 1.0]}}}, "is a range, and a grid takes lists"),
        ({"metric": "w2_square"}, "none that such a run reports; did you mean 'w2_squared'"),
        ({"metric": "fid"}, "there are: w2_squared, variance, mean_square, log_det"),
        ({"metric": "variance"}, "mode: is variance better when it is larger or smaller"),
        ({"seeds": 1001}, "seeds: "),
        ({"trials": 10**9}, "trials: "),
        ({"search": "optuna", "space": {"n_ini": {"integers": [30, 60]}, "fresh_fraction": [0.5]}}, "n_ini"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight_sweep(configure(PHASE, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "reward/meen"}, "did you mean 'reward/mean'"),
        ({"metric": None}, "metric 'evaluator/full' is none that such a run reports"),
        ({"metric": "unseen/full"}, "is none that such a run reports"),
        (
            {"metric": "policy/clip_fraction", "fixed": {"training.objective": "negative_aware"}},
            "is none that such a run",
        ),
        ({"metric": "policy/loss"}, "mode: is policy/loss better"),
    ],
)
def test_a_metric_that_no_trial_reports_is_refused_before_it_starts(
    tiny: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight_sweep(configure(tiny, **changes))


def test_the_metrics_of_closed_form_families_are_those_that_they_measure() -> None:
    from pipelines.generators.categorical import CategoricalGenerator, CategoricalSettings
    from pipelines.generators.gaussian import GaussianGenerator, GaussianSettings
    from pipelines.generators.mixture import measure_points, mode_centres

    for name, kind, own in (
        ("gaussian", GaussianGenerator, GaussianSettings()),
        ("categorical", CategoricalGenerator, CategoricalSettings()),
    ):
        model: Any = kind
        assert tuple(model.fit(own, model.truth(own, [0], 0, 50), [0]).measure()) == GENERATORS.find(name).metrics
    points = np.random.default_rng(0).normal(size=(2, 30, 2))
    assert tuple(measure_points(*points, mode_centres(4))) == GENERATORS.find("mixture").metrics


POINTS = st.dictionaries(
    st.sampled_from(["a.rate", "b.rate", "rule", "größe"]),
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(),
        st.booleans(),
        st.text("a/_ =-.\x01ø字", max_size=200),
        st.lists(st.sampled_from([0.5, 0.1]), min_size=60, max_size=60),
    ),
    max_size=3,
)


@given(POINTS, POINTS, st.integers(0, 1100), st.integers(0, 1100))
@example({"fresh_fraction": [0.5] * 60}, {"fresh_fraction": [0.5] * 60}, 0, 1)
@example({"fresh_fraction": [0.5] * 60}, {"fresh_fraction": [0.5] * 59 + [0.1]}, 0, 0)
@example({"a": 1}, {"a": True}, 0, 0)
@example({"a": "x"}, {"a": "X"}, 0, 0)
@example({"a": 0.1}, {"a": 0.1 + 1e-16}, 0, 0)
def test_every_trial_has_a_directory_of_its_own(one: Any, other: Any, seed: int, next_seed: int) -> None:
    """Also on a disk that folds capitals, and with room for what is put around the name."""
    first, second = (Trial.of(Path("sweep"), *each) for each in ((one, seed), (other, next_seed)))
    same = exact(one) == exact(other) and seed == next_seed
    assert (first.name.lower() == second.name.lower()) == same
    assert len(first.record.name.encode()) < 200
    assert Path(first.name).name == first.name


SHARES = st.floats(0.05, 1)
SPACES = st.fixed_dictionaries(
    {},
    optional={
        "fresh_fraction": st.lists(
            st.floats(0.05, 1) | st.lists(st.floats(0.05, 1), min_size=4, max_size=4), min_size=1
        ),
        "sampling_bias": st.lists(st.floats(0.01, 1.2), min_size=1, max_size=3) | st.just({"uniform": [0.2, 0.9]}),
        "n_ini": st.lists(st.integers(1, 60), min_size=1, max_size=3) | st.just({"integers": [20, 60]}),
        "covariance": st.lists(st.sampled_from(["sample", "unbiased", "maximum_likelihood", 3]), min_size=1),
        "dimension": st.lists(st.integers(0, 3) | st.just(2.0) | st.just(True), min_size=1, max_size=3),
    },
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    SPACES,
    st.sampled_from(["grid", "random", "optuna"]),
    st.integers(1, 3),
    st.sampled_from([None, "w2_squared", "fid"]),
)
@example({"fresh_fraction": [0.5, 0.5, 1.0]}, "grid", 2, None)
def test_an_accepted_sweep_can_run_every_trial(space: Any, search: str, seeds: int, metric: str | None) -> None:
    """Each of its points is a configuration of the loop, each trial of it has a directory of its own."""
    try:
        config = configure(PHASE, space=space, search=search, seeds=seeds, metric=metric, trials=5)
        preflight_sweep(config)
    except ConfigError:
        return
    trials = [Trial.of(Path("s"), point, seed) for point in config.points for seed in range(seeds)]
    assert len({trial.directory for trial in trials}) == len(trials)
    for trial in trials:
        place = {"output_dir": str(trial.directory), "tracking": {"system_metrics": False}}
        settings = config.trial_config(trial.point, trial.seed, place)
        assert settings.seed_list == [trial.seed]
    assert trials or search == "optuna"
    assert config.direction == "min"


def test_a_scheduler_that_would_see_nothing_is_refused(tiny: dict[str, Any]) -> None:
    late = {"fixed": {"evaluation.every": 6}, "metric": "evaluation/reward", "scheduler": {"kind": "asha"}}
    with pytest.raises(ConfigError, match="has nothing to compare"):
        preflight_sweep(configure(tiny, **late))


def test_a_dry_run_names_every_point() -> None:
    config = configure(PHASE)
    text = describe_sweep(config, preflight_sweep(config))
    assert "6 points × 1 seeds" in text
    assert all(
        f"'fresh_fraction': {share}, 'sampling_bias': {bias}" in text for share in (0.1, 0.9) for bias in (0.5, 1)
    )
    assert "w2_squared, minimum" in text


def test_a_killed_sweep_goes_on_where_it_was(preloaded: None, tmp_path: Path) -> None:
    config = written(tmp_path, PHASE)
    directory = tmp_path / "sweep"
    command = ["sweep", "--config", str(config), f"output_dir={directory}"]
    process = start(command, tmp_path / "first.log")
    wait_until(lambda: len(finished(directory)) >= 2, 300, "two trials")
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for orphan in family:  # as a machine that goes down would take them along
        if orphan.is_running():
            orphan.kill()
    process.wait()
    done = finished(directory)
    assert 2 <= len(done) < 6

    again = start(["resume", str(directory)], tmp_path / "second.log")
    assert again.wait(400) == 0, (tmp_path / "second.log").read_text()
    assert finished(directory).items() >= done.items()  # what was finished was not run again
    content = summary(directory)
    assert len(content["points"]) == 6
    assert [each["status"] for each in content["trials"]] == ["FINISHED"] * 6
    values = [point["mean"] for point in content["points"]]
    assert values == sorted(values)
    assert content["best"]["point"]["fresh_fraction"] == 0.9
    assert all_finished(directory), statuses(directory)
    assert (directory / "figures" / "phase_diagram.png").stat().st_size > 5000

    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    below = client.search_runs(
        [client.get_run(content["mlflow_run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{content['mlflow_run_id']}'",
    )
    assert len(below) >= 6  # one that was killed at its beginning may stand beside
    done = [each for each in below if each.info.status == "FINISHED"]
    assert sorted(each.data.metrics["w2_squared"] for each in done) == pytest.approx(sorted(values))

    trial = directory / "trials" / content["best"]["trial"]
    made = {path: path.stat().st_mtime_ns for path in (trial / "tasks").rglob("*.json")}
    assert not (trial / "figures").exists()
    drawing = start(["resume", str(trial)], tmp_path / "trial.log")
    assert drawing.wait(400) == 0, (tmp_path / "trial.log").read_text()
    assert (trial / "figures" / "curves.png").stat().st_size > 5000
    assert {path: path.stat().st_mtime_ns for path in (trial / "tasks").rglob("*.json")} == made  # nothing was repeated


def test_trials_at_once_are_what_each_would_be_alone(ray_session: None, tmp_path: Path) -> None:
    """By every byte of every task, with workers as a person's are, and results so large that Ray's store holds them."""
    from orchestration.experiments.mad.config import MadConfig
    from orchestration.experiments.mad.loop import run_mad

    small = {"family": "diffusion", "n_ini": 1200, "generations": 2, "data": {"reference": 100}}
    small["diffusion"] = {"channels": 8, "training_steps": 3, "sampling_steps": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    content = {"name": "two", "loop": "mad", "config": str(tmp_path / "small.yaml"), "space": {"rule": ["accumulate"]}}
    config = written(tmp_path, {**content, "search": "grid", "metric": "fid", "seeds": 2, "cpus_per_trial": 1})
    words = ["sweep", "--config", str(config), f"output_dir={tmp_path / 'sweep'}", "tracking.system_metrics=false"]
    process = start(words, tmp_path / "log", afresh=True)
    try:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()

    alone = ["rule=accumulate", "seeds=2", f"output_dir={tmp_path / 'alone'}", "tracking.system_metrics=false"]
    run_mad(load_config(MadConfig, tmp_path / "small.yaml", alone))

    def made(directory: Path) -> dict[str, Any]:
        tasks = {path.parent.name: json.loads(path.read_text()) for path in directory.glob("tasks/*/manifest.json")}
        return {key: task["sha256"] for key, task in tasks.items()}

    expected, trials = made(tmp_path / "alone"), [made(each) for each in (tmp_path / "sweep/trials").iterdir()]
    assert len(trials) == 2
    assert all(each.items() <= expected.items() for each in trials)
    assert len(trials[0].keys() - trials[1].keys()) >= 6  # each has its own


def test_successive_halving_stops_the_worse_and_confirms_the_best(
    tiny: dict[str, Any], ray_session: None, tmp_path: Path
) -> None:
    content = {**tiny, "scheduler": {"kind": "asha", "interval": 2, "reduction": 2}, "trials": 4}
    content |= {"confirm_seeds": 1, "register_as": "tiny-best"}
    directory = tmp_path / "sweep"
    found = swept(content, directory)
    searched = [each for each in found["trials"] if each["seed"] == 0]
    stopped = [each for each in searched if each["status"] == "STOPPED"]
    complete = [each for each in searched if each["status"] == "FINISHED"]
    assert len(searched) == 4
    assert stopped
    assert complete
    assert {each["step"] for each in stopped} <= {2, 4}
    assert {each["step"] for each in complete} == {6}
    journal = directory / "trials" / complete[0]["name"] / "metrics.jsonl"
    reported = {key for line in journal.read_text().splitlines() for key in json.loads(line)}
    example = configure(content).example
    odd = {"step", "timestamp_ms", "_digest", "seconds/evaluate", "seconds/commit"}
    timesteps = {key for key in reported if key.startswith("first_update_error/")}
    assert reported - odd - timesteps == set(ddpo_metrics(example, ["a", "b", "c", "d"], []))
    assert found["reward_queries"] == sum(12 * each["step"] for each in found["trials"])
    assert found["best"]["mean"] == max(each["value"] for each in complete)
    assert len(found["confirmation"]["best"]) == len(found["confirmation"]["unchanged"]) == 1
    runs = statuses(directory)
    assert "RUNNING" not in {status for _, status in runs}
    assert all((each["name"], "KILLED") in runs for each in stopped)

    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    version = client.get_model_version_by_alias("tiny-best", "best")
    assert f"models:/tiny-best/{version.version}" == found["model"]
    assert client.get_run(version.run_id).info.run_name in {each["name"] for each in complete}
    artifacts = {file.path for file in client.list_artifacts(version.run_id, "pipeline")}
    assert "pipeline/model_index.json" in artifacts


def test_a_population_copies_the_better(tiny: dict[str, Any], ray_session: None, tmp_path: Path) -> None:
    content = {**tiny, "scheduler": {"kind": "pbt", "interval": 2}, "trials": 4, "fixed": {"training.steps": 4}}
    directory = tmp_path / "sweep"
    found = swept(content, directory)
    assert [each["status"] for each in found["trials"]] == ["FINISHED"] * 4
    manifests = [json.loads(path.read_text()) for path in directory.glob("trials/*/manifest.json")]
    adopted = [manifest for manifest in manifests if manifest.get("adopted")]
    assert adopted  # somebody took over other weights and another learning rate
    for manifest in adopted:
        rates = [each["before"]["training"]["learning_rate"] for each in manifest["adopted"]]
        assert rates[-1] != manifest["config"]["training"]["learning_rate"]
        assert [each["step"] for each in manifest["adopted"]] == [2]
        assert 1e-4 <= manifest["config"]["training"]["learning_rate"] <= 1e-2
    for path in directory.glob("trials/*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert all_finished(directory)


def test_a_budget_of_reward_queries_stops_a_sweep_that_can_go_on(
    tiny: dict[str, Any], ray_session: None, tmp_path: Path
) -> None:
    directory = tmp_path / "sweep"
    content = {**tiny, "search": "optuna", "fixed": {"training.steps": 4}}
    found = swept(content | {"budget": {"reward_queries": 60}}, directory)
    assert found["budget_spent"]
    assert 60 <= found["reward_queries"] < 3 * 48
    assert "RUNNING" not in {status for _, status in statuses(directory)}

    before = finished(directory)
    more = swept(content, directory)
    assert finished(directory).items() >= before.items()  # what was finished was not run again
    assert [each["status"] for each in more["trials"]] == ["FINISHED"] * 3
    assert more["reward_queries"] == 3 * 48
    assert {each["name"] for each in found["trials"]} <= {each["name"] for each in more["trials"]}
    assert all_finished(directory)


def pretend(directory: Path, point: dict[str, Any], seed: int, value: float | None, status: str = "FINISHED") -> None:
    """A trial as its process leaves it: one that has a ``value`` has finished, or been stopped by the scheduler."""
    trial = Trial.of(directory, point, seed)
    trial.directory.mkdir(parents=True)
    trial.note(error="ValueError: it broke" if status == "FAILED" else None)
    manifest = {"loop": "mad", "status": "FINISHED" if value is not None else status, "total_steps": 5, "config": {}}
    write_manifest(trial.directory, manifest)
    arm = {"metrics": {"w2_squared": {"mean": [9.0] * 4 + [value]}}}
    if value is not None:
        (trial.directory / "summary.json").write_text(json.dumps({"arms": {"only": arm}}))
    if status == "STOPPED":
        trial.note(stopped=5)


def test_what_a_sweep_finds_is_where_people_look(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it goes on and at its end: report.html, ``runs show``, and MLflow's run. Stopped and failed trials are
    shown and have no rank, however good they looked. Another sweep is refused there."""
    from orchestration.cluster.ray_cluster import Machine
    from orchestration.experiments.sweep import report
    from orchestration.experiments.sweep.run import SweepRun
    from orchestration.runs.browse import RunInfo, everything, render_show
    from orchestration.runs.display import Terminal

    directory = tmp_path / "swept"
    directory.mkdir()
    shutil.copy(empty_store, directory / "mlflow.db")
    content = {**PHASE, "seeds": 2, "output_dir": str(directory), "tracking": {"system_metrics": False}}
    points = configure(content).points
    with contextlib.suppress(ZeroDivisionError), SweepRun(configure(content), Machine(2, 0)) as run:
        report.report_so_far(run)  # too early: it costs time
        assert not (directory / "report.html").exists()
        pretend(directory, points[0], 0, 7.0)
        pretend(directory, points[1], 0, None, "RUNNING")
        run.next_report = 0.0
        report.report_so_far(run)
        assert "none yet: no point has finished all of its seeds" in (directory / "report.html").read_text()
        assert json.loads((directory / "summary.json").read_text())["best"] is None
        assert "running at 0" in (directory / "report.html").read_text()
        for seed in (0, 1):  # since the last report
            pretend(directory, points[4], seed, 8.0)
        raise ZeroDivisionError
    page = (directory / "report.html").read_text()
    assert "FAILED" in page  # it does not go on saying that it runs
    assert "killed at 0" in page
    found = summary(directory)
    assert found["best"]["point"] == points[4]
    assert {each["status"] for each in found["trials"]} == {"FINISHED", "KILLED"}
    for seed in (0, 1):
        shutil.rmtree(Trial.of(directory, points[4], seed).directory)
        Trial.of(directory, points[4], seed).record.unlink()

    shutil.rmtree(Trial.of(directory, points[1], 0).directory)
    pretend(directory, points[0], 1, 5.0)
    pretend(directory, points[2], 1, 4.0)
    pretend(directory, points[3], 0, 0.5, "STOPPED")
    for seed, status in enumerate(("FAILED", "FINISHED")):
        pretend(directory, points[1], seed, 0.1 if seed else None, status)
    with SweepRun(configure(content), Machine(2, 0)) as run:
        pretend(directory, points[2], 0, 3.0)
        run.ended(Trial.of(directory, points[2], 0), None)
        report.report(run, report.Table(run))
    found = summary(directory)
    assert [each["point"] for each in found["points"]] == [points[2], points[0], points[1], points[3]]
    assert [each["complete"] for each in found["points"]] == [True, True, False, False]
    assert found["best"]["trial"] == Trial.of(directory, points[2], 0).name

    command = "ouroboros mad --config configs/mad/gaussian.yaml"
    share = f"fresh_fraction={points[2]['fresh_fraction']}"
    said = capsys.readouterr().out
    Terminal().print(render_show(everything(RunInfo(directory))))
    shown, page = capsys.readouterr().out, (directory / "report.html").read_text()
    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    mlflow = client.get_run(found["mlflow_run_id"])
    note = mlflow.data.tags["mlflow.note.content"]
    for text in (said, shown, page):
        assert command in text
        assert share in text
        assert "2 of the 30 seeds it takes" in text
    assert note.startswith("best w2_squared 3.5 at fresh_fraction=")
    assert "path=figures/glance.png" in note
    assert mlflow.data.tags["point/01"].startswith(f"3.5 at {share}")
    assert len([tag for tag in mlflow.data.tags if tag.startswith("point/")]) == 4
    for text in (said, shown, page):
        assert "ValueError: it broke" in text
        assert "stopped at 5" in text
    assert mlflow.data.tags["best/command"].startswith(command)
    assert mlflow.data.tags["best/point"].startswith(share)
    assert mlflow.data.metrics["A first look/best"] == pytest.approx(found["best"]["mean"])
    artifacts = {file.path for file in client.list_artifacts(found["mlflow_run_id"])}
    assert {"report.html", "figures", "summary.json"} <= artifacts
    images = {Path(file.path).stem for file in client.list_artifacts(found["mlflow_run_id"], "figures")}
    assert images == {"responses", "parallel_coordinates", "phase_diagram", "glance"}
    assert all(caption in page for caption in ("Each setting against the metric", "The plane of the first two"))
    with pytest.raises(ConfigError, match=r"holds a sweep with another space, .*ouroboros resume"):
        SweepRun(configure(content, space={"fresh_fraction": [0.1]}), Machine(2, 0))


def test_the_shipped_sweeps_can_run() -> None:
    checkout = Path(__file__).parent.parent
    for path in sorted((checkout / "configs" / "sweeps").glob("*.yaml")):
        config = load_config(SweepConfig, path)
        assert preflight_sweep(config).cpus >= 1, path
