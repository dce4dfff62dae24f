"""What calls of a network hold for a moment: counted, in real calls or in such without numbers (torch's fake tensors),
to choose a micro-batch and to foresee a run's memory."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.limits import memory_limit
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import prepare
from pipelines.settings import ModelSettings
from policies.rl.group import Group
from policies.rl.settings import SamplingSettings, TrainingSettings

SMALL_MICRO_BATCH = 4  # if not even so many transitions fit, activations are computed a second time instead of kept
LARGEST_MICRO_BATCH = 512  # beyond this a call gains little even on a small network: see benchmarks/micro_batch.py

_LARGE = 2**28  # bytes of weights


def room(device: torch.device) -> int:
    """Bytes of the device that activations may take, and that weights may with all that training adds to them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return memory_limit() // 8


def transitions_of(policy: DiffusionPolicy, training: TrainingSettings, learners: int) -> int:
    """Of an update, those that one of ``learners`` computes."""
    schedule = policy.family.schedule(policy.sampling)
    learnable = training.learnable_steps(len(schedule.timesteps), schedule.stochastic_steps.tolist())
    share = training.timesteps_per_image(len(learnable))
    return -(-training.images_per_update * share // learners)


def find_micro_batch(policy: DiffusionPolicy, given: int | None, transitions: int, group: Group) -> int:
    """Transitions a network call, if it is not ``given``: as many as fit into memory, at most a learner's part of an
    update or ``LARGEST_MICRO_BATCH``. Gradient checkpointing is switched on where not even ``SMALL_MICRO_BATCH`` fit.

    Depends on the model and on the size of the machine, not on how busy it is, so that a run can be repeated.
    """
    network = policy.network
    fitting = room(policy.device) // kept_bytes(policy)
    few = fitting < min(given or SMALL_MICRO_BATCH, SMALL_MICRO_BATCH, transitions)
    if group.any(few and getattr(network, "_supports_gradient_checkpointing", False))[0]:
        network.enable_gradient_checkpointing()
        fitting = room(policy.device) // kept_bytes(policy)
    calls = -(-transitions // min(max(1, fitting), LARGEST_MICRO_BATCH))
    found = given or -(-transitions // calls)  # calls of equal size
    return found if group.size == 1 else int(group.gather(torch.tensor([found])).min())


def kept_bytes(policy: DiffusionPolicy) -> int:
    """Bytes that one transition more keeps for the backward pass: counted in real calls of a small network, and of a
    large one in such without numbers, as two transitions' activations may be more than there is room for."""
    network: nn.Module = policy.network
    if sum(parameter.nbytes for parameter in network.parameters()) < _LARGE or _is_fake(network):
        return _kept(partial(_predicted, policy), network.parameters(), policy.device)
    policy = copy(policy)  # whose memory of prompts may hold what has no numbers
    policy._conditions = dict(policy._conditions)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held = [*network.named_parameters(), *network.named_buffers()]
        fake: dict[str, Any] = {f"network.{name}": mode.from_tensor(each) for name, each in held}
        around = _Around(policy)
        return _kept(lambda count: functional_call(around, fake, (count,)), fake.values(), policy.device)


def _kept(predicted: Callable[[int], Tensor], parameters: Iterable[Tensor], device: torch.device) -> int:
    weights = {_place(parameter) for parameter in parameters}
    kept: list[dict[Any, int]] = [{}, {}]
    held: list[Tensor] = []  # whose places are not given to others meanwhile

    def keep(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in weights:
            kept[count - 1][place] = tensor.untyped_storage().nbytes()  # all of it, of whatever part is asked for
            held.append(tensor)
        return tensor

    for count in (1, 2):  # what both keep, such as LoRA's merged weights, does not grow
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = predicted(count)
        except torch.OutOfMemoryError:
            return room(device) + 1
        del output
        held.clear()
    return max(1, sum(kept[1].values()) - sum(kept[0].values()))


class _Around(nn.Module):
    """A policy's network where torch looks for modules."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.network, self.policy = policy.network, policy

    def forward(self, count: int) -> Tensor:
        return _predicted(self.policy, count)


def _is_fake(network: nn.Module) -> bool:
    return any(isinstance(parameter, FakeTensor) for parameter in network.parameters())


def most_alive(call: Callable[[], object]) -> int:
    """Bytes of the tensors that ``call`` makes, at the moment when they are most."""
    with _Alive() as alive:
        call()
    return alive.most


@dataclass(frozen=True)
class Activations:
    """Bytes for a moment: of a sampler's call and of a learner's (of ``micro_batch`` transitions), foreseen."""

    sampler: int
    learner: int
    micro_batch: int


def foreseen(
    model: ModelSettings, sampling: SamplingSettings, training: TrainingSettings, images: int, learners: int
) -> Activations:
    """What a sampler's call for so many ``images`` and one of ``learners`` hold, found without numbers. A micro-batch
    is the one that a machine like this one would find."""
    sampler, learner = (DiffusionPolicy(model, sampling, "meta", trained=True) for _ in range(2))
    prepare(learner.network, model)
    transitions = transitions_of(learner, training, learners)
    schedule = learner.family.schedule(learner.sampling)
    # Tensors that are on a CPU as far as they know: on the meta device attention would keep what no other keeps.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for policy in (sampler, learner):
            policy.device, policy.schedule = torch.device("cpu"), schedule
            for part in (each for each in policy.family.pipeline.components.values() if isinstance(each, nn.Module)):
                _bring(part)
        at_once = sampler.family.decoded_at_once(images)
        latents = torch.empty(at_once, *sampler.family.latent_shape, dtype=sampler.dtype)
        with torch.no_grad():
            drawing = [most_alive(partial(_predicted, sampler, count)) for count in (1, 2)]
            decoding = most_alive(lambda: sampler.family.decode(latents))
        for parameter in learner.network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # which are counted elsewhere
        found = find_micro_batch(learner, training.micro_batch, transitions, Group())
        learning = [most_alive(partial(taught, learner, count)) for count in (1, 2)]
    return Activations(max(_line(drawing, images), decoding), _line(learning, found), found)


def _bring(part: nn.Module) -> None:
    """Make a module's tensors anew where they are made now: ``to_empty`` cannot, from the meta device to fake ones."""
    for module in part.modules():
        for name, held in module.named_parameters(recurse=False):
            new = torch.empty(held.shape, dtype=held.dtype)
            module._parameters[name] = nn.Parameter(new, requires_grad=held.requires_grad)
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _line(values: list[int], count: int) -> int:
    """What ``count`` take, where 1 and 2 take ``values``."""
    return values[0] + (count - 1) * (values[1] - values[0])


def _predicted(policy: DiffusionPolicy, count: int) -> Tensor:
    times, empty = policy.schedule.timesteps[:1].expand(count), policy.embed([""] * count)
    latents = torch.zeros(count, *policy.family.latent_shape, device=policy.device)
    if policy.sampling.cache and len(policy.schedule.timesteps) > 1:  # a step that begins with another's features
        return policy.replay(latents, torch.ones(count, dtype=torch.long), empty, lambda _: latents)
    return policy.predict(latents, times, empty)


def taught(policy: DiffusionPolicy, count: int) -> None:
    """A micro-batch of so many transitions, forward and backward."""
    _predicted(policy, count).sum().backward()


def _place(tensor: Tensor) -> Any:
    """What tells the memory of one tensor from that of another; those without numbers have an address, too."""
    return tensor.untyped_storage()._cdata


class _Alive(TorchDispatchMode):
    """Counts the bytes of what is made in its block and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[Any, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(each) for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.held = {place: known for place, known in self.held.items() if not known[0].expired()}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and (place := _place(each)) not in given and place not in self.held:
                storage = each.untyped_storage()
                self.held[place] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out
