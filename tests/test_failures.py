"""What fails in an actor is told by its first cause; what is gone for good is told apart from what failed."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError

from actors.failures import ActorFailure, ActorLost, _explain
from actors.pool import wait_for
from actors.tasks import TaskRunner
from actors.worker import Worker, device_is_lost, is_short_of_memory
from pipelines.rewards import RewardError
from pipelines.rl.trajectory import Trajectory
from pipelines.storage.atomic import Files
from pipelines.storage.tasks import Task, TaskStore
from policies.rl.health import DegenerateBatch


class Member:
    """Somebody's actor, and its end."""

    def fails(self) -> None:
        raise ValueError("no such colour")

    def is_sick(self) -> None:
        raise DegenerateBatch("the loss is nan")

    def dies(self) -> None:
        print("the last thing it said", file=sys.stderr, flush=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(self) -> None:
        time.sleep(3600)

    def put(self) -> list[Any]:
        import ray

        return [ray.put("something")]

    def get(self, references: list[Any]) -> Any:
        import ray

        return ray.get(references[0])


@pytest.fixture
def member(ray_session: None) -> Any:
    import ray

    actor: Any = ray.remote(Member)
    return actor.options(num_cpus=0)


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("fails", ActorFailure, "step 3: ValueError: no such colour"),
        ("is_sick", DegenerateBatch, "step 3: the loss is nan"),
        ("dies", ActorLost, "step 3: .*its last lines: .*the last thing it said"),
        ("hangs", ActorLost, "step 3: nothing finished within 1 s"),
    ],
)
def test_the_first_cause_is_told(method: str, kind: type[Exception], message: str, member: Any) -> None:
    actor = member.remote()
    wait_for([actor.put.remote()], "it begins", 30)
    with pytest.raises(kind, match=message) as told:
        wait_for([getattr(actor, method).remote()], "step 3", 1 if method == "hangs" else 60)
    assert told.type is kind


def test_work_on_what_is_gone_is_a_loss_and_no_failure(member: Any) -> None:
    """As of a sampler that is to take weights whose node is lost."""
    import ray

    owner, user = member.remote(), member.remote()
    references = wait_for([owner.put.remote()], "it begins", 30)[0]
    ray.kill(owner)

    def use_until_it_is_gone() -> None:
        for _ in range(100):
            wait_for([user.get.remote(references)], "sending weights", 60)
            time.sleep(0.1)

    with pytest.raises(ActorLost, match="sending weights: OwnerDiedError"):
        use_until_it_is_gone()


class Memory:
    """A captioner whose device has room for two images, and a reward whose device fails once."""

    def caption(self, images: np.ndarray) -> list[str]:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [str(image[0, 0, 0]) for image in images]

    def rollout(self, source: Any, prompts: list[str], seeds: list[int]) -> tuple[np.ndarray, Trajectory]:
        self.caption(np.zeros((len(prompts), 1, 1, 3)))
        latents, size = np.array(seeds, dtype=np.float32).reshape(-1, 1, 1, 1, 1), len(seeds)
        return np.array(seeds), Trajectory(prompts, seeds, latents, np.zeros((size, 1)), source)

    def judge(self, images: np.ndarray, prompts: list[str]) -> Any:
        return {"full": np.array(prompts) == self.caption(images)}, {"digit": self.caption(images)}


def test_where_memory_is_short_half_of_the_images_are_done_after_the_other() -> None:
    class Short(Memory, Worker):
        caption, rollout, judge = Memory.caption, Memory.rollout, Memory.judge

        def __init__(self) -> None:
            super().__init__(1)

    worker, images = Short(), np.arange(7).repeat(3).reshape(7, 1, 1, 3)
    said = [str(number) for number in range(7)]
    assert worker.caption(images) == said
    drawn, trajectory = worker.rollout(5, said, list(range(7)))
    assert drawn.tolist() == trajectory.seeds == list(range(7))
    assert (trajectory.prompts, trajectory.weights_version, len(trajectory.latents)) == (said, 5, 7)
    verdicts, seen = worker.judge(images, said)
    assert verdicts["full"].all()
    assert seen == {"digit": said}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: out of memory")])
def test_short_of_memory_for_one_image_is_a_loss(error: Exception) -> None:
    """Others may hold the card: the run begins anew from its last commit."""
    with pytest.raises(ActorLost, match="drawing"):
        _explain(RayTaskError("rollout", "", error), "drawing")
    assert is_short_of_memory(error)
    assert not device_is_lost(error)


class Fragile(Worker):
    """Its device fails once, as a card that fell off the bus."""

    def __init__(self, mark: Path) -> None:
        super().__init__(1)
        self.mark = mark

    def score(self, images: np.ndarray) -> int:
        if not self.mark.exists():
            self.mark.touch()
            try:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            except torch.AcceleratorError as error:
                raise RewardError("the reward function failed") from error
        return os.getpid()


def test_an_actor_whose_device_is_lost_begins_anew_and_does_the_work_again(ray_session: None, tmp_path: Path) -> None:
    import ray

    actor: Any = ray.remote(Fragile)
    fragile = actor.options(num_cpus=0, max_restarts=2, max_task_retries=-1).remote(tmp_path / "mark")
    wait_for([fragile.ready.remote()], "it begins", 60)
    assert wait_for([fragile.score.remote(np.zeros(2))], "scoring", 60)
    assert (tmp_path / "mark").exists()


def hangs_if_told(kind: str, parameters: dict[str, Any], inputs: list[Files], device: str) -> Files:
    if Path(parameters["mark"]).exists():
        time.sleep(3600)
    return {"number": b"1"}


def test_a_task_that_hangs_gives_its_place_back(ray_session: None, tmp_path: Path) -> None:
    import ray

    mark, cpus = tmp_path / "hang", ray.cluster_resources()["CPU"]
    task = Task("sample", {"mark": str(mark)}, label="sampling G1")
    store = TaskStore(tmp_path / "tasks")
    mark.touch()
    with pytest.raises(ActorLost, match="sampling G1: nothing finished within 5 s"):
        list(TaskRunner(hangs_if_told, store, cpus, 0, timeout=5).run([task]))
    mark.unlink()
    assert list(TaskRunner(hangs_if_told, store, cpus, 0, timeout=60).run([task])) == [task]
    assert store.load(task.key) == {"number": b"1"}


def counts(kind: str, parameters: dict[str, Any], inputs: list[Files], device: str) -> Files:
    return {"number": b"%d" % (1 + len(inputs))}


def test_a_task_takes_nothing_but_what_it_asked_for(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives one process the objects of another if both gave theirs one name: it is seen, and nothing is stored."""
    import ray

    store, put = TaskStore(tmp_path / "tasks"), ray.put
    sample = Task("sample", {})
    assert list(TaskRunner(counts, store, 1, 0, timeout=60).run([sample])) == [sample]
    fit = Task("fit", {}, (sample,))

    def another(value: Any) -> Any:
        return put(("another", value[1]) if isinstance(value, tuple) else value)

    monkeypatch.setattr(ray, "put", another)
    with pytest.raises(ActorFailure, match=f"asked for the result of task {sample.key}, Ray gave that of another"):
        list(TaskRunner(counts, store, 1, 0, timeout=60).run([fit]))
    assert fit.key not in store


def test_what_is_made_of_a_task_may_be_seen_before_the_task(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose files were forgotten is done again for another one, whose end is noticed first."""
    import ray

    store = TaskStore(tmp_path / "tasks")

    def run(kind: str) -> list[str]:
        sample, twin = (Task("sample", {}, kept=False) for _ in range(2))  # one task, as two arms name it
        runner = TaskRunner(counts, store, 1, 0, timeout=60)
        return [task.kind for task in runner.run([sample, Task(kind, {}, (twin,))])]

    assert run("fit") == ["sample", "fit"]
    wait = ray.wait

    def latest_first(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return wait(references, num_returns=len(references))[0][::-1], []

    monkeypatch.setattr(ray, "wait", latest_first)
    assert run("measure") == ["measure", "sample"]
    key = Task("measure", {}, (Task("sample", {}),)).key
    assert store.load(key) == {"number": b"2"}
