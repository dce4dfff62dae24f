"""Both loops on two nodes that share no disk: each has its own view of the file system, in which the checkout and the
runs are empty. What a node has, Ray brought there; what a run has, its driver wrote."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import load_config
from pipelines.storage.locations import CHECKOUT
from tests import prefork
from tests.nodes import Nodes, environment
from tests.processes import wait_until

KINDS = ("first", "second")
# In a mount namespace: $1, the checkout, holds nothing but the Python environment $2; $3, where tests write, is empty.
APART = """
set -e
mkdir "$4/environment"
mount --bind "$2" "$4/environment"
mount -t tmpfs none "$1"
mkdir -p "$2"
mount --bind "$4/environment" "$2"
mount -t tmpfs none "$3"
cd /
shift 4
exec "$@"
"""
UNSHARE = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
# What tasks see on either node, and on which of them the actors of earlier runs were.
PROBE = """
import json, os, sys
import ray
from orchestration.cluster.ray_cluster import connected

@ray.remote(num_cpus=0.1)
def look():
    from pipelines.storage.locations import CHECKOUT
    return str(CHECKOUT), [os.listdir(path) for path in hidden]

hidden = sys.argv[2:]
with connected(gpus=0):
    seen = {kind: ray.get(look.options(resources={kind: 0.001}).remote()) for kind in json.loads(sys.argv[1])}
    kinds = {node["NodeID"]: kind for node in ray.nodes() for kind in seen if kind in node["Resources"]}
    known = [a for a in ray._private.state.actors().values() if a["ActorClassName"] != "Watchman"]
    actors = {a["ActorClassName"]: kinds[a["Address"]["NodeID"]] for a in known}
print(json.dumps({"seen": seen, "actors": actors}))
"""


def ouroboros(*words: str, address: str) -> subprocess.CompletedProcess[str]:
    """The command, on the cluster at ``address``."""
    command = prefork.command("-m", "orchestration.cli", *words)
    options: dict[str, Any] = {"env": environment(address), "cwd": CHECKOUT, "timeout": 600, "text": True}
    return subprocess.run(command, capture_output=True, **options)


@pytest.fixture(scope="module")
def nodes(preloaded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head with the resource ``first``; the other node has ``second``."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody have a file system view of one's own")
    hidden = str(tmp_path_factory.getbasetemp())
    apart = [*UNSHARE, "sh", "-c", APART, "sh", str(CHECKOUT), sys.prefix, hidden]
    with Nodes(apart) as nodes:
        for kind in KINDS:
            nodes.begin(kind)
        yield nodes


@pytest.fixture(scope="module")
def cluster(nodes: Nodes) -> str:
    """The address."""
    return nodes.address


STEPS = 4
TINY_DDPO = [
    "name=tiny",
    "reward.function=tests.rewards:redness",
    "evaluation.images=6",
    "evaluation.interim_images=6",
    "evaluation.every=0",
    "sampling.steps=4",
    f"training.steps={STEPS}",
    "training.images_per_step=12",
    "training.images_per_prompt=6",
    "training.updates_per_step=2",
    "training.learning_rate=1e-3",
    "checkpoint.every=1",
    "actors.images_per_call=5",
    "actors.threads.learner=1",
    "tracking.system_metrics=false",
]
FEWER_ACTORS = ["captioner.path=null", "evaluation.evaluator=null"]  # which decide neither weights nor images
NODES = {"learner": "first", "sampler": "second", "captioner": "second", "reward": "first", "evaluator": "second"}


@pytest.fixture(scope="module")
def ddpo_runs(cluster: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same DDPO run on one node and on two, the samplers on another than the learner."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    one, two = (tmp_path_factory.mktemp("ddpo") / name for name in ("one", "two"))
    run_ddpo(load_config(DdpoConfig, None, [*TINY_DDPO, *FEWER_ACTORS, "actors.samplers=1", f"output_dir={one}"]))
    nodes = [f"actors.nodes.{role}={node}" for role, node in NODES.items()]
    apart = ouroboros("ddpo", *TINY_DDPO, *nodes, f"output_dir={two}", address=cluster)
    assert apart.returncode == 0, apart.stderr
    return [one, two]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_weights_and_images_are_those_of_one_node(ddpo_runs: list[Path]) -> None:
    assert len({read_json(run / "summary.json")["weights_sha256"] for run in ddpo_runs}) == 1
    for step in (0, STEPS):
        images = [np.load(run / "evaluations" / f"step-{step:06d}.npz")["images"] for run in ddpo_runs]
        np.testing.assert_array_equal(*images)
    journals = [(run / "metrics.jsonl").read_text().splitlines() for run in ddpo_runs]
    rewards = [[json.loads(line)["reward/mean"] for line in journal] for journal in journals]
    assert len(rewards[0]) == STEPS
    assert rewards[0] == rewards[1]
    for files in ("pipeline", f"checkpoints/step-{STEPS:06d}"):
        hashes = [read_json(run / files / "manifest.json")["sha256"] for run in ddpo_runs]
        tensors = [{name: value for name, value in each.items() if name.endswith(".safetensors")} for each in hashes]
        assert tensors[0] == tensors[1] != {}


def test_a_stock_pipeline_reads_what_the_learner_sent(ddpo_runs: list[Path]) -> None:
    import torch

    from pipelines.denoisers import load_family
    from pipelines.rl.weights import checksum, to_numpy
    from pipelines.storage.atomic import read_directory

    _, manifest = read_directory(ddpo_runs[1] / "pipeline")  # every file as its hash says
    unet = load_family(str(ddpo_runs[1] / "pipeline"), torch.float32).network
    assert checksum({name: to_numpy(value) for name, value in unet.named_parameters()}) == manifest["weights_sha256"]


MAD_ARMS = ["arms.moments={family: gaussian, dimension: 3}", "arms.images={family: diffusion}"]
TINY_MAD = [
    "name=tiny",
    "n_ini=60",
    "generations=2",
    "seeds=1",
    "data.limit=120",
    "data.reference=40",
    "diffusion.channels=8",
    "diffusion.training_steps=10",
    "diffusion.sampling_steps=2",
    "tracking.system_metrics=false",
    *MAD_ARMS,
]


@pytest.fixture(scope="module")
def mad_runs(cluster: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same MAD experiment on one node, and with every task on another node than the driver and its images."""
    from orchestration.experiments.mad.loop import run_mad

    directory = tmp_path_factory.mktemp("mad")
    strokes, labels = load_digits(return_X_y=True)
    for number, (stroke, label) in enumerate(zip(strokes[:150], labels[:150], strict=True)):
        (directory / "data" / f"{label}").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((stroke.reshape(8, 8) * 15).astype(np.uint8))
        picture.save(directory / "data" / f"{label}" / f"{number}.png")
    data = f"data.source={directory / 'data'}"
    run_mad(load_config(MadConfig, None, [*TINY_MAD, data, f"output_dir={directory / 'one'}"]))
    nodes = "workers.nodes=second"
    apart = ouroboros("mad", *TINY_MAD, data, nodes, f"output_dir={directory / 'two'}", address=cluster)
    assert apart.returncode == 0, apart.stderr
    return [directory / "one", directory / "two"]


def test_tasks_give_on_another_node_what_they_give_here(mad_runs: list[Path]) -> None:
    def tasks(run: Path) -> dict[str, dict[str, Any]]:
        found = {path.parent.name: read_json(path) for path in (run / "tasks").glob("[0-9a-f]*/manifest.json")}
        return {
            key: {part: about[part] for part in ("kind", "parameters", "inputs", "sha256")}
            for key, about in found.items()
        }

    one, two = (tasks(run) for run in mad_runs)
    assert {task["kind"] for task in one.values()} == {"data", "extractor", "floor", "fit", "sample", "measure"}
    assert one == two
    arms = [read_json(run / "summary.json")["arms"] for run in mad_runs]
    assert arms[0] == arms[1]


def test_nodes_had_what_ray_brought_and_wrote_nothing(
    cluster: str, ddpo_runs: list[Path], mad_runs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    command = [sys.executable, "-c", PROBE, json.dumps(KINDS), str(CHECKOUT), str(tmp_path_factory.getbasetemp())]
    probe = subprocess.run(command, env=environment(cluster), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert probe.returncode == 0, probe.stderr
    found = json.loads(probe.stdout.splitlines()[-1])
    imported = {kind: Path(checkout) for kind, (checkout, _) in found["seen"].items()}
    assert all("working_dir_files" in checkout.parts for checkout in imported.values())
    assert imported["first"] != imported["second"]
    for _, (checkout, temporary) in found["seen"].values():
        assert not {"actors", "models", "tests"} & set(checkout)  # what is there is the Python environment at most
        assert temporary == []
    names = {"learner": "LearnerActor", "reward": "RewardActor", "sampler": "Sampler"}
    names |= {"captioner": "CaptionerActor", "evaluator": "EvaluatorActor"}
    assert found["actors"] == {names[role]: kind for role, kind in NODES.items()}


def test_a_model_that_is_not_on_every_node_is_named_with_the_node(
    cluster: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    words = [
        *TINY_DDPO,
        *FEWER_ACTORS,
        "actors.samplers=1",
        f"model.path={tiny_pipeline}",
        f"output_dir={tmp_path / 'run'}",
    ]
    failed = ouroboros("ddpo", *words, "actors.nodes.learner=second", address=cluster)
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert f"FileNotFoundError: there is no {tiny_pipeline} on node {platform.node()}" in message
    assert "put it on every node" in message


def test_nodes_of_a_kind_that_is_not_there_are_missed_before_anything_starts(cluster: str, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'run'}", "actors.nodes.sampler=third"]
    refused = ouroboros("ddpo", *words, address=cluster)
    assert refused.returncode == 2
    assert "actors.nodes.sampler is third, but no node advertises a resource of that name" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_lost_node_is_done_without(nodes: Nodes, ddpo_runs: list[Path], tmp_path: Path) -> None:
    """Last, as the node is gone for good: the run goes back to its last commit on the one that is left."""
    words = [*TINY_DDPO, *FEWER_ACTORS, "actors.samplers=2", f"output_dir={tmp_path / 'run'}"]
    command = prefork.command("-m", "orchestration.cli", "ddpo", *words)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, env=environment(nodes.address), cwd=CHECKOUT, stdout=log, stderr=log)
    wait_until(lambda: (tmp_path / "run/checkpoints").exists() or driver.poll() is not None, 400, "the first commit")
    family = nodes.family("second")
    names = [child.name() for child in family]
    for child in family:
        child.kill()
    assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert any("Sampler" in name or "Learner" in name for name in names)  # there was something to lose
    summaries = [read_json(run / "summary.json") for run in (tmp_path / "run", ddpo_runs[0])]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    journal = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in journal] == [*range(1, STEPS + 1)]
