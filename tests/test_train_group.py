"""A task that several workers of Ray Train do: one result, the same numbers, and a lost worker costs only time."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.storage.tasks import TaskStore


# Of 16 channels: 8 would be one to each group of a norm, before which a bias has no gradient but rounding, and Adam
# makes steps of that.
def configured(directory: Path, *more: str) -> MadConfig:
    given = [
        *("family=diffusion", "diffusion.training_steps=30", "rule=fully_synthetic", "arms={}"),
        *("generations=1", "n_ini=100", "n_synthetic=100", "data.reference=60", "seeds=1"),
        *(f"output_dir={directory}", f"tracking.uri=sqlite:///{directory.parent / 'mlflow.db'}"),
    ]
    return load_config(MadConfig, None, [*given, *more])


def fit(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What is known of the only fit of a run, and its weights."""
    store = TaskStore(directory / "tasks")
    (key,) = [each.name for each in store.directory.iterdir() if store.about(each.name)["kind"] == "fit"]
    return store.about(key), load_file(store.path(key) / "unet" / "diffusion_pytorch_model.safetensors")


def test_two_workers_make_what_one_makes_though_one_of_them_is_killed(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors import tasks
    from orchestration.experiments.task_run import TaskRun

    monkeypatch.setattr(tasks, "COMMIT_SECONDS", 0.0)
    run_mad(configured(tmp_path / "one"))
    watch, struck = TaskRun.watch, list[psutil.Process]()

    def strike(run: TaskRun, runner: Any) -> None:
        """Kill a worker as soon as something is kept."""
        watch(run, runner)
        if not struck and list((tmp_path / "two" / "training").glob("*/checkpoint_*/training.pt")):
            workers = [each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in each.name()]
            struck.extend(workers)
            workers[-1].kill()

    monkeypatch.setattr(TaskRun, "watch", strike)
    run_mad(configured(tmp_path / "two", "workers.train_workers=2"))
    assert len(struck) == 2
    (about, one), (other, two) = fit(tmp_path / "one"), fit(tmp_path / "two")
    assert "train_workers" not in about
    assert other["train_workers"] == 2
    assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-5
    assert not list((tmp_path / "two" / "training").iterdir())
    ended = [json.loads((tmp_path / each / "summary.json").read_text()) for each in ("one", "two")]
    assert ended[0]["arms"].keys() == ended[1]["arms"].keys()


def test_workers_for_a_training_are_asked_for_where_there_are_some(tmp_path: Path) -> None:
    from orchestration.experiments.mad.preflight import preflight_mad

    wrong = {
        "workers.train_workers=999": "train_workers is 999, there are",
        "workers.train_workers=[2,1]": "the least comes first",
    }
    for each, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            preflight_mad(configured(tmp_path / "run", each))
    preflight_mad(configured(tmp_path / "run", "workers.train_workers=[1,999]"))
    with pytest.raises(ConfigError, match="nothing here is trained"):
        preflight_mad(load_config(MadConfig, None, ["n_ini=10", "n_synthetic=10", "workers.train_workers=2"]))


def fails(kind: str, parameters: dict[str, Any], inputs: list[Any], device: str) -> dict[str, bytes]:
    """A task that its own input makes impossible; each try leaves a file."""
    Path(parameters["at"], str(uuid4())).touch()
    raise ValueError("no such input")


def test_an_error_of_the_work_is_raised_at_once_and_not_tried_again(ray_session: None, tmp_path: Path) -> None:
    import ray

    from actors.failures import ActorFailure, result
    from actors.train_group import TrainGroup, divided

    tries = tmp_path / "tries"
    tries.mkdir()
    group = TrainGroup((2, 2), {"CPU": 1.0}, False, 60.0, str(tmp_path / "at"), 60.0, losses=3)
    work = divided(group, max_retries=0).remote(ray.put(fails), "key", "kind", {"at": str(tries)}, "cpu", [])
    with pytest.raises(ActorFailure, match="the task: ValueError: no such input"):
        result(work, "the task") if ray.wait([work], timeout=120)[0] else None
    assert len(list(tries.iterdir())) == 2  # one of each worker
