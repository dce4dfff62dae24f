"""The demonstration in short: default models, language reward and evaluator, on a real Ray and MLflow store."""

import json
from pathlib import Path

import numpy as np
import pytest

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from pipelines.storage.locations import CHECKOUT


@pytest.fixture(scope="module")
def run_directory(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from orchestration.experiments.ddpo.loop import run_ddpo

    directory = tmp_path_factory.mktemp("demo") / "run"
    overrides = [
        f"output_dir={directory}",
        "training.steps=2",
        "training.images_per_step=32",
        "training.images_per_prompt=4",
        "training.updates_per_step=2",
        "evaluation.images=72",
        "evaluation.interim_images=24",
        "evaluation.every=1",
    ]
    run_ddpo(load_config(DdpoConfig, CHECKOUT / "configs/ddpo/digits.yaml", overrides))
    return directory


def test_the_reward_tells_true_images_from_others(run_directory: Path) -> None:
    calibration = json.loads((run_directory / "summary.json").read_text())["calibration"]
    assert calibration["calibration/true"] > 0.95
    assert calibration["calibration/true"] > calibration["calibration/shuffled"] + 0.2
    assert calibration["calibration/true"] > calibration["calibration/noise"] + 0.2


def test_the_evaluator_is_heard_slot_by_slot(run_directory: Path) -> None:
    summary = json.loads((run_directory / "summary.json").read_text())
    assert 0.45 <= summary["evaluator_accuracy_before"] <= 0.70
    assert 0.5 < summary["agreement_before"] <= 1
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        slots = [line[f"evaluator/{slot}"] for slot in ("digit", "ink", "ground")]
        assert line["evaluator/full"] <= min(slots)
        assert line["reward/min"] <= line["reward/mean"] <= line["reward/max"]
        assert line["images/diversity"] > 0


def test_the_figures_and_grids_are_there(run_directory: Path) -> None:
    from PIL import Image

    for name in ("before_after.png", "curves.png"):
        image = np.asarray(Image.open(run_directory / "figures" / name).convert("RGB"))
        assert min(image.shape[:2]) > 200
        assert image.std() > 10
    before = np.load(run_directory / "evaluations" / "step-000000.npz")["images"]
    after = np.load(run_directory / "evaluations" / "step-000002.npz")["images"]
    assert before.shape == after.shape == (12, 16, 16, 3)
    assert (before != after).any()


def test_system_metrics_are_in_mlflow(run_directory: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_directory / 'mlflow.db'}")
    run_id = json.loads((run_directory / "summary.json").read_text())["mlflow_run_id"]
    assert client.get_metric_history(run_id, "system/cpu_utilization_percentage")
