"""Editing videos with a frozen UNet and two frozen adapters that were never trained together (FDD, 2403.09334).

A ControlNet edits single frames: it sees the frame as it was and reads the caption of what it is to be. Motion modules
draw videos. Stacked on one UNet they edit videos, after a fashion; LoRA on the UNet makes them fit each other
(:mod:`policies.factorised`). All parts are diffusers' classes. Videos' latents are (n, frames, channels, height,
width), inputs as a ControlNet takes them, (n, frames, 3, height, width) in [0, 1].
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers import ControlNetModel, UNetMotionModel
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from pipelines.animation import controlled, predict
from pipelines.rl.lora import attach
from pipelines.training import descend
from policies.diffusion.ddim import DenoisingSchedule
from policies.factorised import (
    AligningSettings,
    critic_loss,
    maker_loss,
    score_distillation,
    visits,
)

_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out")  # that get LoRA
_NEARLY_CLEAN = 50  # the time that critics tell the networks whose features they see
_WIDTH = 32  # of a critic
_TOGETHER = 16  # videos, or frames, at once
Said = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of noisy latents, times, states and inputs


def schedule_of(scheduler: Any) -> DenoisingSchedule:
    """All times of a scheduler of diffusers, step s being time s."""
    alphas = scheduler.alphas_cumprod.double()
    times, kind = torch.arange(len(alphas)), scheduler.config.prediction_type
    return DenoisingSchedule(times, alphas, alphas, torch.zeros_like(alphas), kind)


def edit(
    said: Said, schedule: DenoisingSchedule, noise: Tensor, times: Tensor, states: Tensor, inputs: Tensor
) -> Tensor:
    """x_0 from ``noise`` in the steps of DDIM (η = 0) that visit ``times`` (calls, n). Gradients, if any are asked for,
    flow through the last call."""
    latents = noise
    for call, here in enumerate(times):
        last = call + 1 == len(times)
        with torch.set_grad_enabled(torch.is_grad_enabled() and last):
            output = said(latents, here, states, inputs)
            clean = schedule.denoised(latents, output, here)
            if not last:
                alpha = schedule.alpha[here].view(-1, *[1] * (clean.ndim - 1))
                error = (latents.double() - alpha.sqrt() * clean) / (1 - alpha).sqrt()
                latents = schedule.diffuse(clean, error, times[call + 1]).to(noise)
    return clean.to(noise)


class Critic(nn.Module):
    """D of videos, or of frames (those of one frame): what a frozen network makes of nearly clean latents, seen place
    by place, and across time where there is any. One score a place, in the middle of the network and at its end."""

    def __init__(self, network: Any, said: Said, seed: int) -> None:
        super().__init__()
        self.said, self.blocks = said, [network.mid_block, network.up_blocks[-1]]  # a list, as they are not its own
        widths = network.config["block_out_channels"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.ModuleList(nn.Conv3d(each, _WIDTH, (3, 1, 1), padding=(1, 0, 0)) for each in widths[::-1])
            self.last = nn.ModuleList(nn.Conv3d(_WIDTH, 1, 1) for _ in widths)

    def features(self, clean: Tensor, states: Tensor, inputs: Tensor) -> list[Tensor]:
        """Of ``clean`` (n, frames, …), each (n, channels, frames, height, width)."""
        seen = list[Tensor]()
        hooks = [block.register_forward_hook(lambda *given: seen.append(given[2])) for block in self.blocks]
        self.said(clean, torch.full((len(clean),), _NEARLY_CLEAN, device=clean.device), states, inputs)
        for hook in hooks:
            hook.remove()
        return [each.unflatten(0, clean.shape[:2]).transpose(1, 2) for each in seen]

    def forward(self, features: list[Tensor]) -> Tensor:
        scores = [
            last(leaky_relu(first(each), 0.2)).flatten(1)
            for first, last, each in zip(self.first, self.last, features, strict=True)
        ]
        return torch.cat(scores, dim=1)


class Editor:
    """The frozen parts, and the student: motion network with LoRA on what is not a motion module."""

    def __init__(self, pipeline: Any, control: ControlNetModel, motion: UNetMotionModel) -> None:
        self.pipeline, self.control, self.motion = pipeline, control, motion
        self.schedule = schedule_of(pipeline.scheduler)
        for part in (pipeline.unet, control, motion):
            part.requires_grad_(False).eval()
        self.frame_said: Said = partial(controlled, pipeline.unet, control)

    def video_said(self, noisy: Tensor, times: Tensor, states: Tensor, inputs: Tensor) -> Tensor:
        """The video teacher's, who sees no inputs."""
        return predict(self.motion, noisy, times, states)

    def align(
        self,
        student: nn.Module,
        states: Tensor,
        inputs: Tensor,
        real: dict[str, tuple[Tensor, Tensor, Tensor]],
        settings: AligningSettings,
        seed: int,
    ) -> dict[str, list[float]]:
        """Train ``student``, of :func:`student_of`, on ``inputs`` (n, frames, …) to be edited as the ``states`` (n,
        tokens, width) of their captions say. ``real``: of each teacher, "frames" and "videos", what it drew: latents
        (m, frames, …), states and inputs. Returns the losses of each step."""
        random, total, kinds = torch.Generator().manual_seed(seed), len(self.schedule.timesteps), ("frames", "videos")
        said: dict[str, Said] = {"frames": self.frame_said, "videos": self.video_said}
        networks = {"frames": self.pipeline.unet, "videos": self.motion}
        critics = {kind: Critic(networks[kind], said[kind], seed) for kind in kinds}
        with torch.no_grad():
            known = {kind: _in_parts(critics[kind].features, real[kind]) for kind in kinds if settings.critic_from < 1}
        optimizers = {kind: torch.optim.AdamW(critics[kind].parameters(), settings.critic_rate) for kind in kinds}
        course: dict[str, list[float]] = defaultdict(list)
        made, number = dict[str, list[Tensor]](), count()
        student_said, begin = partial(controlled, student, self.control), settings.critic_from * settings.steps
        shape = _shape(self.pipeline, inputs)

        def draw() -> tuple[Tensor, ...]:
            which = torch.randint(len(inputs), (settings.batch_size,), generator=random)
            noise = torch.randn(3, len(which), *shape, generator=random)
            times = torch.randint(total, (2, len(which)), generator=random)
            return (which, visits(total, settings.calls, len(which), random).T, times.T, *noise)

        def loss(_: nn.Module, which: Tensor, visited: Tensor, times: Tensor, *noises: Tensor) -> Tensor:
            told, shown, step = states[which], inputs[which], next(number)
            clean = edit(student_said, self.schedule, noises[0], visited.T, told, shown)
            made.clear()
            parts = []
            for kind, when, noise in zip(kinds, times.T, noises[1:], strict=True):
                if settings.sds_weight:
                    noisy = self.schedule.diffuse(clean.detach(), noise, when).to(clean)
                    with torch.no_grad():
                        output = said[kind](noisy, when, told, shown)
                    distilled = score_distillation(self.schedule, clean, noisy, noise, output, when)
                    course[f"{kind}/distilled"].append(distilled.item())
                    parts.append(settings.sds_weight * distilled)
                if step >= begin:
                    rows = (clean, told, shown) if kind == "videos" else _frame_by_frame(clean, told, shown)
                    features = critics[kind].features(*rows)
                    made[kind] = [each.detach() for each in features]
                    scores = critics[kind](features)
                    course[f"{kind}/critic"].append(scores.mean().item())
                    parts.append(maker_loss(scores))
            return torch.stack(parts).sum() / 2

        trained = [each for each in student.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, settings.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        for _ in descend(student, draw, loss, settings.steps, optimizer, schedule, 1.0, divisible=False):
            for kind, features in made.items():
                chosen = torch.randint(len(known[kind][0]), (len(features[0]),), generator=random)
                lost = critic_loss(critics[kind]([each[chosen] for each in known[kind]]), critics[kind](features))
                optimizers[kind].zero_grad()
                lost.backward()
                optimizers[kind].step()
                course[f"{kind}/hinge"].append(lost.item())
        return dict(course)


def draw_edits(pipeline: Any, said: Said, states: Tensor, inputs: Tensor, calls: int, seed: int) -> Tensor:
    """The latents of ``inputs`` (n, frames, …), edited in so many calls, from noise that is each frame's own."""
    noise = torch.randn(len(inputs), *_shape(pipeline, inputs), generator=torch.Generator().manual_seed(seed))
    schedule = schedule_of(pipeline.scheduler)
    times = visits(len(schedule.timesteps), calls, len(inputs))

    def some(noise: Tensor, times: Tensor, states: Tensor, inputs: Tensor) -> list[Tensor]:
        return [edit(said, schedule, noise, times.T, states, inputs)]

    with torch.no_grad():
        return _in_parts(some, (noise, times.T, states, inputs))[0]


def _shape(pipeline: Any, inputs: Tensor) -> tuple[int, ...]:
    shrink = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return inputs.shape[1], pipeline.vae.config.latent_channels, *(each // shrink for each in inputs.shape[-2:])


def student_of(motion: UNetMotionModel, rank: int, seed: int) -> UNetMotionModel:
    """A copy with LoRA on the layers that it has of the UNet of images, which changes nothing yet."""
    student = deepcopy(motion).requires_grad_(False)
    names = [name for name, _ in student.named_modules() if "motion_modules" not in name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(student, rank, tuple(name for name in names if name.endswith(_LAYERS)))
    return student


def _frame_by_frame(clean: Tensor, states: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each frame as a video of its own."""
    return clean.flatten(0, 1)[:, None], states.repeat_interleave(clean.shape[1], 0), inputs.flatten(0, 1)[:, None]


def _in_parts(found: Callable[..., list[Tensor]], rows: tuple[Tensor, ...]) -> list[Tensor]:
    """What ``found`` makes of all rows, some at a time."""
    parts = [found(*some) for some in zip(*(each.split(_TOGETHER) for each in rows), strict=True)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]
