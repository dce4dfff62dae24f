"""A task that several workers do together: a worker group of Ray Train, whose members share its training.

All do the whole task (:mod:`pipelines.sharing`), the first one's result counts. Train reserves their places at once,
begins anew when one is lost, from what they had come to, which is kept in ``at``: all nodes have to reach it if the
members are on several.
"""

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.failures import MARKS_OF_A_PEER
from policies.rl.health import DegenerateBatch

_OF_THE_WORK = (ValueError, TypeError, KeyError, DegenerateBatch)  # would come again


@dataclass(frozen=True)
class TrainGroup:
    """How many ``workers`` there are at least and at most, and what each takes (and a GPU, if ``on_gpu``). ``timeout``:
    the longest wait for one another, in seconds; ``at``: where their progress is kept, every ``pause`` seconds;
    ``losses``: how many a task withstands."""

    workers: tuple[int, int]
    resources: dict[str, float]
    on_gpu: bool
    timeout: float
    at: str
    pause: float
    losses: int


def divided(group: TrainGroup, **options: Any) -> Any:
    """A remote function like :func:`actors.tasks.perform`, done by a ``group``. It takes nothing itself, and runs on
    this node, where the progress is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def launch(work: Any, key: str, *given: Any) -> tuple[dict[str, Any], Any]:
        return _launch(group, work, key, *given)

    remote: Any = ray.remote(launch)
    return remote.options(num_cpus=0, scheduling_strategy=here, **options)


def _launch(group: TrainGroup, work: Any, key: str, *given: Any) -> tuple[dict[str, Any], Any]:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of a task are those of the driver
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # workers wait as long when they hand over a commit
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = group.workers
    each = group.resources | ({"GPU": 1.0} if group.on_gpu else {})
    workers: Any = {"num_workers": most if least == most else (least, most), "use_gpu": group.on_gpu}
    trainer = TorchTrainer(
        _member,
        train_loop_config={"work": work, "key": key, "given": given, "pause": group.pause},
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if group.on_gpu else "gloo", timeout_s=int(group.timeout)),
        scaling_config=ScalingConfig(**workers, resources_per_worker=each),
        run_config=RunConfig(name=key, storage_path=group.at, failure_config=FailureConfig(group.losses)),
    )
    result: Any = trainer.fit()
    found = result.return_value
    shutil.rmtree(Path(group.at, key), ignore_errors=True)
    if isinstance(found, Exception):
        raise found
    about, made = found
    return about, made


def _member(config: dict[str, Any]) -> Any:
    """In each worker: do the task, sharing its training. Returns the first one's result, or an error of the work's."""
    import ray.train
    import torch

    from actors.tasks import perform
    from pipelines.sharing import Sharing, shared
    from policies.rl.group import Group

    context, kept = ray.train.get_context(), ray.train.get_checkpoint()
    group = Group(context.get_world_rank(), context.get_world_size())
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    with ExitStack() as stack:
        place = Path(stack.enter_context(kept.as_directory())) if kept else None
        stack.enter_context(shared(Sharing(group, _keep, place, config["pause"])))
        started = time.process_time()
        try:
            about, made = perform(config["work"], config["key"], *config["given"])
        except _OF_THE_WORK as error:
            if any(mark in str(error) for mark in MARKS_OF_A_PEER):
                raise
            return error  # in all of them: Train takes one that raises for a loss, and has it done again
        spent = group.gather(torch.tensor([time.process_time() - started])).sum()
    if group.rank:
        return None
    return about | {"cpu_seconds": round(float(spent), 4), "train_workers": group.size}, made


def _keep(directory: Path | None) -> None:
    """Give Train what the group has come to: of the first member a directory, of others their word."""
    import ray.train

    ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(directory) if directory else None)
