"""Everything that can be wrong with a run, found before anything is started, and what a dry run prints."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.allocation import Offer, Role, plan_roles, reward_roles
from orchestration.cluster.ray_cluster import Machine, find_machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.memory_plan import memory_plan
from orchestration.runs.config import ConfigError, about
from orchestration.runs.run import TEMPLATES, check_output
from pipelines.data.prompts import read_prompts, unseen_words
from pipelines.denoisers import check_cache, check_guidance, check_lora, denoising_steps, inspect, network_calls
from pipelines.guard import NO_GUARD, Entry, Guard, read_guard
from pipelines.pages import fill
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import check_model, find
from pipelines.storage.model_files import encoder_parts, read_json, weight_shapes
from pipelines.videos import apart
from policies.common.seeding import derive_seed


@dataclass(frozen=True)
class Plan:
    """A run that can be started: prompts, those of evaluations alone, actors, the nodes that they are to fit on, what
    is worth a warning, the guard, the prompts that it has refused, and of how many frames videos are (1: images)."""

    prompts: list[str]
    unseen: list[str]
    roles: list[Role]
    offers: Sequence[Offer]
    notes: Sequence[str] = ()
    guard: Guard = NO_GUARD
    refused: Sequence[Entry] = ()
    frames: int = 1


def preflight_ddpo(config: DdpoConfig, machine: Machine | None = None) -> Plan:
    """Check ``config`` against the files and a machine, by default the one it would run on. Raises ConfigError."""
    with about():
        notes, refused, size, frames = list[str](), list[Entry](), (512, 512), 1
        prompts, unseen = read_prompts(config.prompt_files["path"])
        guard = NO_GUARD
        if (path := config.prompt_files.get("guard")) is not None:
            guard = Guard(read_guard(path, "prompts.guard"))
            refused = [entry for prompt in (*prompts, *unseen) if (entry := guard.refusal(prompt))]
            dropped = {entry.prompt for entry in refused}
            prompts, unseen = ([each for each in some if each not in dropped] for some in (prompts, unseen))
            if not prompts:
                raise ValueError(f"prompts.guard {path} leaves no prompt to train on: {refused[0].line}")
        drawn, _ = guard.grounded([*prompts, *unseen], range(len(prompts) + len(unseen)))
        check_model(config.model.path, "model_index.json", "model.path")
        if directory := find(config.model.path):  # the hub is asked by the actors that load
            files = inspect(directory)
            size, frames = files.image_size, files.frames
            check_guidance(files, config.sampling.guidance_scale)
            check_cache(files, config.sampling.cache)
            notes = unseen_words(drawn, files)
            if config.model.lora_rank:
                check_lora(files, config.model.lora_targets)
        if config.captioner.path:
            check_model(config.captioner.path, "config.json", "captioner.path")
            _check_caption_length(config.captioner)
        elif config.reward.needs_captions:
            raise ValueError(f"reward.function {config.reward.title} compares captions, but captioner.path is null")
        _check_rewards(config, drawn, size, frames)
        if config.evaluation.evaluator:
            _check_evaluator(config.evaluation.evaluator, drawn)
        _check_sizes(config, prompts)
        check_output(config.output_dir)
        roles, offers = place_roles(config, machine or find_machine(config.actors.device))
        notes += _guarded(guard, refused, config)
    return Plan(prompts, unseen, roles, offers, notes, guard, refused, frames)


def _guarded(guard: Guard, refused: Sequence[Entry], config: DdpoConfig) -> list[str]:
    """What a person should know of what a guard does to a run."""
    many = f"{len(refused)} prompt{'s' * (len(refused) > 1)}"
    lines = [f"the guard drops {many}; the first by its {refused[0].line}"] if refused else []
    if guard.settings.output and config.captioner.path is None:
        lines.append("the guard's output stage reads captions, but captioner.path is null: no guard/unasked")
    return lines


def place_roles(config: DdpoConfig, machine: Machine) -> tuple[list[Role], Sequence[Offer]]:
    """The actors of a run, and the nodes of ``machine`` that they are to fit on. Raises ValueError if they do not."""
    parts = {"captioner": config.captioner.path is not None, "evaluator": config.evaluation.evaluator is not None}
    offers = machine.offers or ({"CPU": machine.cpus, "GPU": machine.gpus},)
    rewards = reward_roles(config.reward)
    return plan_roles(config.actors, machine.cpus, machine.gpus, **parts, offers=offers, rewards=rewards), offers


def replan(config: DdpoConfig, plan: Plan) -> Plan:
    """The plan of a run that lost actors: for the nodes that are left, if need be with fewer learners, or the same, to
    wait for others."""
    if config.actors.on_node_loss == "wait":
        return plan
    for count in range(config.actors.learners, 0, -1):
        actors = config.actors.model_copy(update={"learners": count})
        with contextlib.suppress(ConfigError) if count > 1 else contextlib.nullcontext():
            return preflight_ddpo(config.model_copy(update={"output_dir": None, "actors": actors}))
    return plan


def learnable_steps(config: DdpoConfig) -> int:
    """Denoising steps to learn from, the fewest where they move. Raises ValueError where the model's scheduler has none
    of so many."""
    path, sampling, training = config.model.path, config.sampling, config.training
    learnable = (
        training.learnable_steps(len(each.kept), denoising_steps(path, each).stochastic) for each in sampling.everywhere
    )
    return min(len(each) for each in learnable)


def _check_rewards(config: DdpoConfig, prompts: Sequence[str], size: tuple[int, int], frames: int) -> None:
    videos = np.random.default_rng(derive_seed(0, "tried")).integers(0, 256, (2, *size, 3), np.uint8)
    images = apart(videos, frames)[:, 0]
    asked = [prompts[0], prompts[-1]]
    for name, given in config.reward.functions.items():
        options = given.resolved(name)
        if options.of_videos and frames == 1:
            raise ValueError(f"reward.function {name} scores videos, and model.path {config.model.path} draws images")
        for option, path in options.model_paths.items():
            marker = options.models[option]
            check_model(path, marker, f"reward.options.{name}.{option}")
            if marker and (found := find(path)):
                (encoder_parts if marker == "modules.json" else weight_shapes)(found)
        options.check_call(name)
        with about(f"reward.function {name}"):
            options.check(prompts)
        tried = apart(videos, frames) if options.of_videos else images
        given.try_out(name, tried, asked, asked if config.captioner.path else None)


def _check_evaluator(path: str, prompts: list[str]) -> None:
    from pipelines.data.digits import SLOTS, parse

    check_model(path, "config.json", "evaluation.evaluator")
    for prompt in prompts:
        if not all(parse(prompt)[slot] for slot in SLOTS):
            judged = f"evaluation.evaluator judges {', '.join(SLOTS)}, but the prompt {prompt!r} does not name them all"
            raise ValueError(f"{judged}: set evaluation.evaluator=null")


def _check_caption_length(captioner: CaptionerSettings) -> None:
    if (directory := find(captioner.path or "")) is None:
        return
    weight_shapes(directory)
    content = read_json(directory / "config.json")
    if (kind := content.get("model_type")) not in ("blip", "blip-2"):
        raise ValueError(f"captioner.path {captioner.path}: {kind} is no model of BLIP or BLIP-2")
    text = content.get("text_config")
    positions = text.get("max_position_embeddings", 512) if isinstance(text, dict) else 512
    if isinstance(positions, int) and captioner.max_new_tokens > positions:
        raise ValueError(
            f"captioner.max_new_tokens ({captioner.max_new_tokens}) is more than the {positions} positions "
            f"of {captioner.path}"
        )


def _check_sizes(config: DdpoConfig, prompts: list[str]) -> None:
    training, evaluation = config.training, config.evaluation
    if not learnable_steps(config):
        raise ValueError(
            f"sampling.steps ({config.sampling.steps}) leaves no step with a density to learn from, as the scheduler "
            f"of {config.model.path} makes the last one deterministic: ask for more, or widen training.timestep_window "
            "or the part of sampling.eta"
        )
    if training.prompts_per_step > len(prompts):
        held = f"{len(prompts)}{' that the guard does not refuse' if 'guard' in config.prompt_files else ''}"
        wanted = f"training.images_per_step / images_per_prompt asks for {training.prompts_per_step} prompts a step"
        raise ValueError(f"{wanted}, {config.prompt_files['path']} holds {held}")
    if config.advantage.compares == "group" and training.images_per_prompt < 2:
        remedy = "set training.images_per_prompt to 2 or more"
        raise ValueError(f"advantage.baseline group compares images of one prompt: {remedy}")
    if evaluation.interim_images > evaluation.images:
        raise ValueError("evaluation.interim_images is larger than evaluation.images")


def describe_ddpo(config: DdpoConfig, plan: Plan) -> str:
    """What a dry run prints: arithmetic, actors and an estimate of memory. Raises ConfigError where models, tried out,
    do not fit together."""
    from pipelines.rehearsal import rehearse

    with about():
        judge = config.evaluation.evaluator
        rehearse(config.model, config.sampling, config.captioner, config.reward, judge, plan.prompts)
    learnable = learnable_steps(config)
    share, memory = config.training.timesteps_per_image(learnable), memory_plan(config, plan.roles, plan.offers)
    template = TEMPLATES / "ddpo_plan.txt"
    twice = network_calls(config.model.path, config.sampling.guidance_scale) > 1
    return fill(template, config=config, plan=plan, learnable=learnable, share=share, memory=memory, twice=twice)
