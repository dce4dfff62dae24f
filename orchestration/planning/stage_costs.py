"""What the stages of a run cost: measured here with the real models, in one process and without Ray; read from a file
of such a measurement; or, for want of both, assumed from floating-point operations.
"""

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError

from actors.allocation import Role, reward_roles
from actors.worker import keep_memory
from orchestration.cluster.forks import ACTORS
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.memory_plan import BYTES, counted
from orchestration.experiments.ddpo.preflight import Plan
from orchestration.planning.cost_model import Cost, Costs
from orchestration.runs.config import ConfigError, explain
from pipelines.denoisers import network_calls
from pipelines.limits import cpu_limit
from policies.rl.settings import Settings

# Not measured: seconds for the driver to ask an actor of Ray for a call and to see that it is done, seconds of an
# exchange between learners, seconds a byte between GPUs of a node and between nodes; and between processes on CPUs.
NETWORK: dict[str, Any] = {"dispatch": 3e-4, "latency": 3e-5, "bus": 5e-12, "link": 8e-11}
LOOPBACK = 1e-9
COUPLING = 2.3  # between threads of a learner that has too few cores: benchmarks/cost_model.py


class StageCosts(Settings):
    """Costs, and what they are of. ``about``: the settings they depend on; ``coupling``: see
    :class:`orchestration.planning.cost_model.Processor`."""

    machine: str
    about: dict[str, str]
    costs: Costs
    micro_batch: int = Field(ge=1)
    coupling: float = Field(COUPLING, ge=1)

    @classmethod
    def read(cls, path: Path, config: DdpoConfig) -> Self:
        """What ``--save`` wrote. Raises ConfigError if it is no such file, or of other models than ``config`` has."""
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ConfigError(f"--costs {path} holds no stage costs: {explain(cls, error)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--costs {path} cannot be read: {error}") from error
        for key, value in settings_behind(config).items():
            if found.about.get(key) != value:
                raise ConfigError(f"--costs {path} was measured for {key} {found.about.get(key)}, not {value}")
        return found


def settings_behind(config: DdpoConfig) -> dict[str, str]:
    """What costs are measured for; the model follows batches, denoising steps and actors by itself."""
    model, guided = config.model, config.sampling.guidance_scale > 1
    kind = ", ".join((model.dtype, *model.kernels, f"LoRA rank {model.lora_rank}", "guided" if guided else "unguided"))
    return {
        "model": f"{Path(model.path).name}, {kind}",
        "captioner": Path(config.captioner.path or "none").name,
        "rewards": ", ".join(config.reward.functions),
    }


def measure(config: DdpoConfig, plan: Plan) -> StageCosts:
    """Some calls of every stage on this machine, on the devices and with the threads that its roles would have."""
    for name, value in ACTORS.items():
        os.environ.setdefault(name, value)
    keep_memory()
    import torch

    from pipelines.captioner import Captioner
    from pipelines.rewards import load_reward, score
    from pipelines.rl.policy import DiffusionPolicy
    from pipelines.rl.weights import checksum

    roles = {role.name: role for role in plan.roles}
    steps, size = config.sampling.calls, min(config.actors.images_per_call, config.training.images_per_step)
    prompts, seeds = [plan.prompts[n % len(plan.prompts)] for n in range(size)], list(range(size))
    policy, drawing = DiffusionPolicy(config.model, config.sampling, roles["sampler"].device), _Clock(roles["sampler"])
    images, trajectory = policy.rollout(prompts, seeds)
    costs: dict[str, Any] = {
        "sample": drawing.fit(lambda n: policy.rollout(prompts[:n], seeds[:n]), size) * (1 / steps)
    }
    captions = None
    if "captioner" in roles:
        captioner = Captioner(config.captioner, roles["captioner"].device, frames=plan.frames)
        captions = captioner.caption(images)
        costs["caption"] = _Clock(roles["captioner"]).fit(lambda n: captioner.caption(images[:n]), size)
    costs["rewards"] = {}
    for (name, options), role in zip(config.reward.functions.items(), reward_roles(config.reward), strict=True):
        reward = load_reward(name, options, roles[role].device, plan.frames)

        def judge(n: int, reward: Any = reward) -> object:
            return score(reward, images[:n], prompts[:n], captions and captions[:n])

        costs["rewards"][name] = _Clock(roles[role]).fit(judge, size)
    of_learning, micro_batch, weights = _learning(config, roles["learner"], trajectory)
    on_cpu = roles["learner"].device == "cpu"
    known = Costs(
        **costs,
        **of_learning,
        publish=drawing(lambda: (policy.load(weights), checksum(weights))),
        weight_bytes=float(sum(each.nbytes for each in weights.values())),
        latent_bytes=trajectory.latents.nbytes / size / (steps + 1),
        **(NETWORK | ({"bus": LOOPBACK} if on_cpu else {})),
    )
    machine = f"{cpu_limit()} CPUs" if on_cpu else torch.cuda.get_device_name()
    return StageCosts(machine=machine, about=settings_behind(config), costs=known, micro_batch=micro_batch)


class _Clock:
    """Least seconds of a call as a role makes it: of one CPU thread its processor time, which is the same on a busy
    machine."""

    def __init__(self, role: Role) -> None:
        self._threads = role.threads
        self._now = time.process_time if role.device == "cpu" and role.threads == 1 else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        import torch

        torch.set_num_threads(self._threads)
        seconds = []
        for _ in range(4):
            began = self._now()
            work()
            seconds.append(self._now() - began)
        return min(seconds[1:])  # the first finds kernels and memory

    def fit(self, work: Callable[[int], object], most: int) -> Cost:
        """The cost of a call with n items, from calls with ``most`` and with a quarter of them."""
        sizes = list(dict.fromkeys((most, -(-most // 4))))
        call, each = _fitted([[1, n] for n in sizes], [self(lambda n=n: work(n)) for n in sizes])  # type: ignore[misc]
        return Cost(call=call, each=each)


def _fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """What each column costs, none less than nothing, by least squares of relative errors."""
    from scipy.optimize import nnls

    scaled = np.array(rows, dtype=float) / np.array(seconds)[:, None]
    return [float(cost) for cost in nnls(scaled, np.ones(len(rows)))[0]]


def _learning(config: DdpoConfig, role: Role, trajectory: Any) -> tuple[dict[str, Any], int, dict[str, np.ndarray]]:
    """Costs, micro-batch and weights of a learner, from steps that differ in images, updates and size of the calls, and
    are small enough for a large model."""
    import torch

    from pipelines.rl.learning import DiffusionLearner
    from pipelines.rl.weights import checksum
    from pipelines.storage.checkpoint import CheckpointStore

    torch.set_num_threads(role.threads)
    training = config.training.model_copy(update={"ratio_tolerance": math.inf, "on_sick_numbers": "skip"})
    learner = DiffusionLearner(config.model, config.sampling, training, config.seed, role.device)
    clock = _Clock(dataclasses.replace(role, threads=1))
    images, whole = len(trajectory.prompts), learner.micro_batch
    learnable = len(training.learnable_steps(config.sampling.calls, learner.policy.schedule.stochastic_steps.tolist()))
    share = min(training.timesteps_per_image(learnable), max(1, 2 * whole // images))

    def learn(count: int, updates: int, micro_batch: int) -> None:
        some = {"timestep_fraction": share / learnable, "updates_per_step": updates, "inner_epochs": 1}
        learner.learner.settings, learner.learner.micro_batch = training.model_copy(update=some), micro_batch
        drawn = dataclasses.replace(trajectory.first(count), weights_version=learner.weights_version)
        learner.learn(drawn, np.linspace(-1, 1, count), seed=0)

    few, small = -(-images // 4), -(-min(whole, images * share) // 4)
    trials = [(images, 1, whole), (images, min(4, images), whole), (images, 1, small), (few, 1, whole)]
    rows = [[1, u, u * math.ceil(n * share / u / m), n * share] for n, u, m in trials]
    seconds = [clock(lambda t=t: learn(*t)) for t in trials]  # type: ignore[misc]
    # Threads share the work: how well, one call by the clock on the wall shows.
    gain = _Clock(role)(lambda: learn(*trials[1])) / seconds[1] if role.device == "cpu" and role.threads > 1 else 1.0
    fixed, update, call, each = (gain * cost for cost in _fitted(rows, seconds))
    with tempfile.TemporaryDirectory() as place:
        commit = clock(lambda: CheckpointStore(Path(place)).commit(1, learner.state().tensors, {}))
    trained = list(learner.masters.values())
    costs = {"gradient": Cost(call=call, each=each), "update": update, "commit": commit, "tensors": len(trained)}
    costs["learn"] = fixed + clock(lambda: checksum(learner.weights()))
    return costs | {"gradient_bytes": float(sum(p.nbytes for p in trained))}, whole, learner.weights()


def assumed(config: DdpoConfig, tflops: float) -> StageCosts:
    """Costs on GPUs that are not there, each of which keeps up ``tflops`` (1e12 operations a second): nothing is
    measured. The backward pass takes twice the forward's operations, of LoRA once as much; a call .02 s a pass more;
    memory moves 1 TB/s, hashes and disks 1 GB/s; a captioner has 600 tokens an image and .3 s a call; a reward 5 ms an
    image. Raises ConfigError for a model whose operations are not known."""
    model, rate, rank = counted(config.model.path, config.model.lora_targets), 1e12 * tflops, config.model.lora_rank
    if not model["forward"]:
        remedy = "run plan where it and a GPU are with --save, then give --costs here"
        raise ConfigError(f"{config.model.path}: its floating-point operations are not known; {remedy}")
    network, size = model["unet"] + model["transformer"], BYTES[config.model.dtype]
    forward = 1e9 * model["forward"] * network_calls(config.model.path, config.sampling.guidance_scale) / rate
    trained = BYTES["float32"] * (model["lora"] * rank or network)
    sent = trained if rank else network * size
    passes = (2 if rank else 3) + bool(config.training.kl_weight)
    captioner = config.captioner.path
    known = Costs(
        sample=Cost(call=0.02, each=forward + 1e9 * model["decode"] / rate / config.sampling.calls),
        caption=Cost(call=0.3, each=2 * 600 * counted(captioner).total() / rate) if captioner else Cost(),
        rewards={name: Cost(each=5e-3) for name in config.reward.functions},
        gradient=Cost(call=0.02 * passes, each=passes * forward),
        **{"update": 5 * trained / 1e12, "learn": sent / 1e9, "publish": sent / 1e9},
        commit=3 * trained / 1e9,
        **NETWORK,
        **{
            "gradient_bytes": float(trained),
            "weight_bytes": float(sent),
            "latent_bytes": 4.0 * model["latent"],
        },
        tensors=256 if rank else 686,  # Stable Diffusion 1.5's
    )
    machine = f"GPUs assumed to keep up {tflops:g} TFLOP/s (nothing was measured)"
    return StageCosts(machine=machine, about=settings_behind(config), costs=known, micro_batch=16)
