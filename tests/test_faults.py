"""Faults: what is hit is replaced, what was lost is done again, and the end is that of an undisturbed run.

The long form, with random faults in both loops, is ``python -m tests.chaos``.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chaos
from tests.servers import MlflowServer, mlflow_server

pytestmark = pytest.mark.usefixtures("preloaded")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    os.environ[chaos.MARK] = str(path)
    return path


@pytest.fixture(scope="module")
def arguments(directory: Path, server: MlflowServer) -> list[str]:
    own = ["training.images_per_step=24", "training.ratio_tolerance=recompute", "model.kernels=[channels_last]"]
    return [*chaos.ddpo_arguments(directory, server.uri, steps=10), *own]


@pytest.fixture(scope="module")
def expected(directory: Path, arguments: list[str], server: MlflowServer) -> dict[str, Any]:
    return chaos.undisturbed(directory / "undisturbed", arguments, server)


FAULTS = [
    ("sampler", "SIGKILL"),
    ("captioner", "SIGSTOP"),
    ("MLflow", "SIGKILL"),
    ("learner", "SIGKILL"),
    ("raylet", "SIGKILL"),
    ("driver", "SIGKILL"),
]


def test_a_run_under_fire_ends_as_an_undisturbed_one(
    directory: Path, arguments: list[str], expected: dict[str, Any], server: MlflowServer
) -> None:
    stage = chaos.Stage(directory, server, {"ddpo": arguments}, random.Random(0))
    strikes = [chaos.Strike(*fault, due=number) for number, fault in enumerate(FAULTS, start=1)]
    found = chaos.disturbed(stage, "ddpo", directory / "run", strikes)
    assert [(strike.target, strike.how) for strike in stage.strikes] == FAULTS
    assert not chaos.differences(directory / "run", found, expected)
