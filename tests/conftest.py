"""What every test starts from: no network, one thread, fixed seeds, and tiny models built once."""

import contextlib
import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "600000"  # Ray's dashboard, which nobody looks at, asks for every process
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from orchestration.cluster.forks import SWITCH
from tests.models import build_tiny_captioner, build_tiny_pipeline

os.environ.setdefault(SWITCH, "0")  # the tests' own forks do
torch.set_num_threads(1)
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")  # the machine may be, which says nothing of a test

# The files that take minutes come first, so that no worker is left with one of them when the others are done.
LONG = ("faults", "multinode", "mad", "loop", "sweep", "jobs", "remote_rewards", "listeners", "overlap")


def pytest_configure(config: pytest.Config) -> None:
    """Processes that run tests side by side have one server of forks."""
    gc.disable()  # what is imported, until all tests are collected, is there to stay
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from tests import prefork

        (several := contextlib.ExitStack()).enter_context(prefork.serving())
        config.add_cleanup(several.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{each}" for each in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _unless_ray_reads(change: Callable[..., None]) -> Callable[..., None]:
    """Ray's threads read the environment, and the C library guards nobody who reads while another writes: as long as
    Ray lives, what a test changes there is seen by Python and by what is started with it, and by no thread of Ray's."""

    def careful(*words: bytes) -> None:
        if not getattr(sys.modules.get("ray"), "is_initialized", bool)():
            change(*words)

    return careful


os.putenv, os.unsetenv = _unless_ray_reads(os.putenv), _unless_ray_reads(os.unsetenv)  # what os.environ calls


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key that seals runs is the tests' own, also in what they start."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion pipeline of 16 px that predicts ε; every step is stochastic."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion pipeline of 16 px that predicts v; its last step is deterministic."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("v_pipeline"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP captioner of 16 px."""
    return build_tiny_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create."""
    from orchestration.tracking.tracker import Tracker, TrackingSettings

    directory = tmp_path_factory.mktemp("store")
    Tracker(directory, TrackingSettings(experiment="template", system_metrics=False), "template").finish("FINISHED")
    return directory / "mlflow.db"


@pytest.fixture(scope="session")
def preloaded() -> Iterator[None]:
    """Workers of a Ray that is started in this process, or by a command that is, are forks."""
    from tests import prefork

    with prefork.preloaded():
        yield


@pytest.fixture(scope="module")
def ray_session(preloaded: None) -> Iterator[None]:
    """One Ray for the runs of this process; a run leaves a Ray that it did not start as it was."""
    import ray

    from orchestration.cluster.ray_cluster import connected

    with connected(gpus=0):
        assert ray.is_initialized()
        yield
