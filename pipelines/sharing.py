"""Training that several processes share. All of them do the same task; what differs is which rows each computes.

Who starts them, and keeps what they have come to, is the caller's business: nothing here knows Ray.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pipelines.rl.activations import room
from pipelines.rl.sharding import shard
from policies.rl.group import Group, gathered

_LOOKS = 100  # of one training, whether to commit it
_FILE = "training.pt"


@dataclass
class Sharing:
    """One of a ``group`` of processes that do the same task.

    ``keep``: given a directory in the first of them, and nothing in the others, at the same step of all, at most every
    ``pause`` seconds. ``kept``: the last such directory of processes before these, which were lost. ``spread``: whether
    weights, gradients and moments are spread over the group; None: where they do not fit.
    """

    group: Group
    keep: Callable[[Path | None], None] = lambda _: None
    kept: Path | None = None
    pause: float = 60.0
    spread: bool | None = None
    begun: int = 0  # trainings of this task

    @contextmanager
    def placed(self, network: nn.Module) -> Iterator[nn.Module]:
        """In this block ``network`` as it is to be trained: itself, or another, of which each of the group holds a part
        and which is written into ``network`` in the end."""
        if self.group.size == 1 or not self.group.any(self._is_too_large(network))[0]:
            yield network
            return
        device = next(network.parameters()).device
        parted = deepcopy(network.to("cpu"))
        shard(parted, self.group.size, device.type)
        self.group.sharded = True
        try:
            yield parted
        finally:
            self.group.sharded = False
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(gathered(parted.get_parameter(name)))
            for name, buffer in network.named_buffers():
                buffer.copy_(parted.get_buffer(name))
        network.to(device)

    def _is_too_large(self, network: nn.Module) -> bool:
        """Whether weights, gradients and both moments do not fit on the device."""
        if self.spread is not None:
            return self.spread
        trained = sum(each.nbytes for each in network.parameters() if each.requires_grad)
        held = sum(each.nbytes for each in network.parameters())
        return held + 3 * trained > room(next(network.parameters()).device)

    def course(self, network: nn.Module, optimizer: Optimizer, schedule: Any, steps: int) -> "Course":
        """The course of the task's next training: from its start, or from where processes that were lost had come."""
        self.begun += 1
        course = Course(self, network, optimizer, schedule, max(1, steps // _LOOKS))
        if self.kept:
            course.restore(self.kept / _FILE)
        return course


@dataclass
class Course:
    """How far a training has come, and its state, which is kept now and then if several share it; all of them ask after
    ``every`` so many steps whether it is time."""

    sharing: Sharing
    network: nn.Module
    optimizer: Optimizer
    schedule: Any
    every: int
    done: int = 0
    committed_at: float = field(default_factory=time.monotonic)

    def advance(self) -> None:
        """Count a step."""
        self.done += 1
        group, late = self.sharing.group, time.monotonic() - self.committed_at > self.sharing.pause
        if group.size > 1 and self.done % self.every == 0 and group.any(late)[0]:
            self._commit()
            self.committed_at = time.monotonic()

    @property
    def _training(self) -> list[Any]:
        """Which of a task's trainings this is, and of what: a task that begins anew may leave out what it has done."""
        return [self.sharing.begun, [[name, [*each.shape]] for name, each in self.network.named_parameters()]]

    def _commit(self) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.network, self.optimizer, options=_options())
        state = {"training": self._training, "done": self.done, "schedule": self.schedule.state_dict()}
        with TemporaryDirectory() as directory:
            if not self.sharing.group.rank:
                torch.save(state | {"model": model, "optimizer": optimizer}, Path(directory, _FILE))
            self.sharing.keep(None if self.sharing.group.rank else Path(directory))

    def restore(self, path: Path) -> None:
        """Go on from what was kept, if it is of this training."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["training"] == self._training:
            parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.network, self.optimizer, **parts, options=_options())
            self.schedule.load_state_dict(state["schedule"])
            self.done = state["done"]


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


_alone = Sharing(Group())
_current: list[Sharing] = []


def sharing() -> Sharing:
    """That of this process; without one, it is alone."""
    return _current[-1] if _current else _alone


@contextmanager
def shared(by: Sharing) -> Iterator[None]:
    """In this block trainings are shared."""
    _current.append(by)
    try:
        yield
    finally:
        _current.pop()
