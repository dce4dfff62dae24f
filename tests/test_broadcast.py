"""Weights that go from the learner to the samplers by torch.distributed: the same weights, and a loss costs nothing."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestration.experiments.ddpo import worker_group
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from policies.rl.broadcast import Broadcast, BroadcastLostError, leave
from policies.rl.group import meeting_place
from tests.models import build_tiny_pipeline


def run(directory: Path, *more: str, on_step: Any = None) -> list[dict[str, Any]]:
    """A run's journal."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    (directory / "prompts.txt").write_text("a red seven\na blue two\na green one\n")
    pipeline = directory / "pipeline"
    given = [
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={pipeline if pipeline.exists() else build_tiny_pipeline(pipeline)}",
        f"output_dir={directory / '-'.join(('run', *more)).replace('/', '_')}",
        f"tracking.uri=sqlite:///{directory / 'mlflow.db'}",
        *("captioner.path=null", "reward.function=tests.rewards:redness", "evaluation.evaluator=null"),
        *("evaluation.images=4", "evaluation.interim_images=4", "evaluation.every=1", "sampling.steps=3"),
        *("training.steps=3", "training.images_per_step=12", "training.images_per_prompt=6"),
        *("training.learning_rate=1e-3", "training.ema_decay=0.5", "checkpoint.every=2", "actors.images_per_call=5"),
        *("actors.threads.learner=1", "tracking.system_metrics=false"),
    ]
    config = load_config(DdpoConfig, None, [*given, *more])
    summary = run_ddpo(config, *([on_step] if on_step else []))
    return [json.loads(line) for line in summary.with_name("metrics.jsonl").read_text().splitlines()]


def numbers(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    same = ("weights/checksum", "reward/mean", "evaluation/reward")
    return [{key: line.get(key) for key in same} for line in journal]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broadcast")


@pytest.mark.parametrize(
    "more", [(), ("model.lora_rank=2",), ("training.depth=1", "model.dtype=bfloat16"), ("actors.learners=2",)]
)
def test_weights_that_are_broadcast_are_those_of_the_object_store(
    more: tuple[str, ...], place: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, taken = run(place, *more), watched(monkeypatch)
    assert numbers(run(place, *more, "name=broadcast")) == numbers(stored)
    assert taken.count("receive") >= 2 * len(stored)
    assert "set_weights" not in taken


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What samplers are asked for from now on, in runs that broadcast."""
    from actors.roles.sampler import Samplers

    asked, usual = list[str](), Samplers._call

    def call(self: Samplers, member: int, method: str, *others: Any) -> Any:
        asked.append(method)
        return usual(self, member, method, *others)

    monkeypatch.setattr(worker_group, "linkable", lambda _: True)
    monkeypatch.setattr(Samplers, "_call", call)
    return asked


def test_a_sampler_that_is_killed_costs_the_broadcast_and_nothing_else(
    place: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    stored, asked, groups = run(place, "name=undisturbed"), watched(monkeypatch), list[Any]()
    usual = worker_group.WorkerGroup._link
    monkeypatch.setattr(worker_group.WorkerGroup, "_link", lambda group, *a: (groups.append(group), usual(group, *a)))

    def kill(run: Any) -> None:
        if run.step == 1:
            ray.kill(groups[0].samplers.members[1], no_restart=False)

    assert numbers(run(place, "name=disturbed", on_step=kill)) == numbers(stored)
    assert asked.count("receive") == 2 * 4  # twice before the first step's end, for its evaluation, and then in vain
    assert asked.count("set_weights") >= 2 * 4
    assert len(groups) == 1  # nothing was begun again


@pytest.fixture
def members() -> Iterator[list[Broadcast]]:
    """Three of a broadcast, in one process."""
    store = meeting_place("127.0.0.1")
    with ThreadPoolExecutor(3) as pool:
        yield list(pool.map(lambda rank: Broadcast("127.0.0.1", store.port, rank, 3, "cpu", 9.0), range(3)))


def test_what_arrives_is_what_was_sent(members: list[Broadcast]) -> None:
    sent = [torch.arange(6.0).view(2, 3), torch.randn(5).bfloat16(), torch.randn(4, 3).half().t()]
    held = [sent, *([torch.zeros_like(each).contiguous() for each in sent] for _ in members[1:])]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(Broadcast.transfer, members, held)) == [True] * 3
    assert all(torch.equal(each, sent[number]) for other in held[1:] for number, each in enumerate(other))


def test_a_difference_in_one_number_is_seen(members: list[Broadcast], monkeypatch: pytest.MonkeyPatch) -> None:
    usual, held = Broadcast._wait, [[torch.randn(50)], [torch.zeros(50)], [torch.zeros(50)]]

    def damaged(self: Broadcast, work: Any) -> None:
        usual(self, work)
        if self is members[2]:
            held[2][0][3] *= 1.001

    monkeypatch.setattr(Broadcast, "_wait", damaged)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(Broadcast.transfer, members, held)) == [True, True, False]


def test_nobody_waits_for_one_that_is_gone(members: list[Broadcast]) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(each.transfer, [torch.ones(50)]) for each in members[:2]]
        time.sleep(0.5)
        assert not any(each.done() for each in waiting)
        leave("127.0.0.1", members[0].meeting[1])
        for each in waiting:
            with pytest.raises(BroadcastLostError):
                each.result()
    assert time.monotonic() - started < 6
