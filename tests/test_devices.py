"""Where tensors are: a learner and a sampler on a card that is not there, and on one if there is one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.storage.locations import CHECKOUT
from tests import prefork


def printed(*words: str) -> str:
    done = subprocess.run(prefork.command(*words), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pretend_card_refuses_what_a_card_would() -> None:
    lines = printed("-m", "tests.pretend_card").splitlines()
    assert len(lines) == 3
    assert all("same device" in line for line in lines[:2])
    assert lines[2].startswith("TypeError") or "numpy" in lines[2]


LEARNERS = pytest.mark.parametrize(
    ("rank", "objective"), [(0, "importance_sampling"), (4, "importance_sampling"), (0, "negative_aware")]
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@LEARNERS
def test_a_gpu_computes_what_the_cpu_does(tiny_v_pipeline: Path, rank: int, objective: str) -> None:
    words = ["tests.on_pretend_card", str(tiny_v_pipeline), str(rank), objective, "cuda"]
    found: dict[str, Any] = json.loads(printed("-m", *words).splitlines()[-1])
    assert found["on card"] == [0.0, 1.0]
    assert found["images"] <= 3  # TF32 and other kernels
    assert found["weights"] < 1e-2
    assert found["changed"][0] == found["changed"][1] == found["tensors"]


@LEARNERS
def test_everything_of_an_update_a_restore_and_a_publish_is_on_the_card(
    tiny_v_pipeline: Path, rank: int, objective: str
) -> None:
    found: dict[str, Any] = json.loads(
        printed("-m", "tests.on_pretend_card", str(tiny_v_pipeline), str(rank), objective).splitlines()[-1]
    )
    assert found["on card"] == [0.0, 1.0]  # weights, masters, averages and moments, and not one of the CPU's
    assert found["images"] <= 1  # levels of 255; kernels are others
    assert found["weights"] < 1e-4
    assert found["divergence"] < 1e-2
    assert found["changed"][0] == found["changed"][1] == found["tensors"]
    waits = found["waits"]
    assert waits["publish"] <= found["tensors"] + 1  # each is brought to the machine once
    assert waits["draw"] < 10
    assert waits["learn"] < 60  # whatever the number of tensors
