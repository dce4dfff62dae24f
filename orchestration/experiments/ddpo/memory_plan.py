"""What a run will hold in memory, estimated before anything is loaded: role by role, and GPU by GPU where roles share.

Parameters are counted in the headers of a model's files; a model that is still on the hub has to be a known one.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from actors.allocation import Offer, Role, cards_of, reward_roles
from orchestration.experiments.ddpo.config import DdpoConfig
from pipelines.denoisers import inspect
from pipelines.rewards import Reward
from pipelines.storage.locations import find
from pipelines.storage.model_files import Shapes, weight_shapes
from pipelines.storage.tensor_files import PART

if TYPE_CHECKING:
    from pipelines.rl.activations import Activations

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 0.6e9  # bytes of an actor that has imported torch, diffusers and transformers
LIGHT = 0.15e9  # of one that needs none of them
KNOWN = Path(__file__).with_name("known_models.yaml")


def memory_plan(config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer]) -> list[str]:
    """Lines for people, in GB (1e9 bytes). What follows a role in brackets are the parts of its sum."""
    return memory_lines(memory_of(config, roles, offers, foreseen_activations(config, roles)))


def foreseen_activations(config: DdpoConfig, roles: Sequence[Role]) -> "Activations | None":
    """What calls hold for a moment, found by such without numbers; None while the model is still on the hub."""
    from pipelines.rl.activations import foreseen

    if find(config.model.path) is None:
        return None
    learners = next((role.count for role in roles if role.name == "learner"), 1)
    images = min(config.actors.images_per_call, config.training.images_per_step)
    return foreseen(config.model, config.sampling, config.training, images, learners)


def memory_of(
    config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer], activations: "Activations | None" = None
) -> dict[str, Any]:
    """Bytes of an actor of each role and of their parts, of GPUs that roles share, and of everything; where
    ``activations`` are known, theirs too."""
    training, size = config.training, BYTES[config.model.dtype]
    model, captioner = counted(config.model.path, config.model.lora_targets), counted(config.captioner.path)
    encoders = sum(count for part, count in model.items() if part.startswith("text_encoder"))
    network, vae, text = (size * count for count in (model["unet"] + model["transformer"], model["vae"], encoders))
    adapter = BYTES["float32"] * model["lora"] * config.model.lora_rank  # float32 whatever the network is
    trained = adapter or network * BYTES["float32"] // size
    latents = training.images_per_step * (config.sampling.calls + 1) * model["latent"] * size
    drawing = {"network": network, "autoencoder": vae, "text encoders": text}
    learning = drawing | {"LoRA": adapter, "gradient": trained, "optimiser": 2 * trained, "start of the step": trained}
    learning |= {"first model": trained * bool(training.kl_weight), "average": trained * bool(training.ema_decay)}
    learning |= {"weights before": trained * training.depth}
    learning |= {"float32 weights": trained * (trained != network and not adapter)}
    captioning = {"weights": BYTES["float32"] * captioner.total()}
    if activations:
        drawing = drawing | {"activations": activations.sampler}
        learning |= {"activations": activations.learner}
    held = {"sampler": drawing, "learner": learning, "captioner": captioning}
    scoring = list(zip(config.reward.functions.values(), reward_roles(config.reward), strict=True))
    for options, role_name in scoring:
        held[role_name] = {"weights": BYTES["float32"] * sum(counted(path).total() for path in models_of(options))}
    away = {"sampler": text, "learner": text + vae}  # from the GPU, but for moments
    sums = {role.name: sum(held.get(role.name, {}).values()) for role in roles}
    # In the machine's memory, wherever a network is: pages of the object store with weights that were sent, which stay
    # until the next but one came, and with what was drawn; what a sampler drew with at first; parts of the finished
    # pipeline, as bytes, pickled, and in pages of two. Weights to be sent are copied when the step's start is gone.
    sent, versions = adapter or network, 2 + bool(training.ema_decay)
    beside = {
        "sampler": {"first weights": size * model["bound"] if adapter else network, "weights sent": versions * sent},
        "learner": {"weights sent": versions * sent, "parts sent": 4 * min(PART, network), "trajectories": latents},
    }
    light = {role_name for options, role_name in scoring if not (options.needs_captions or options.on_gpu)}
    described: list[dict[str, Any]] = []
    for role in roles:
        name, on_host = role.name, beside.get(role.name, {})
        of_models = away.get(name, 0) if role.device == "cuda" else sums[name]
        process = (LIGHT if name in light else PROCESS) + of_models + sum(on_host.values())
        parts = {part: amount for part, amount in held.get(name, {}).items() if amount}
        row = {"role": name, "actors": role.count, "device": role.device, "bytes": sums[name], "parts": parts}
        described.append(
            row | {"host": {part: amount for part, amount in on_host.items() if amount}, "process": process}
        )
    return {
        "roles": described,
        "activations": activations is not None,
        "gpus": [
            {"gpus": count, "actors": dict(Counter(names)), "bytes": sum(sums[n] - away.get(n, 0) for n in names)}
            | {"while_encoding": sum(sums[n] for n in names)}
            for names, count in Counter(map(tuple, cards_of(roles, offers))).items()
        ],
        "together": sum(row["actors"] * row["process"] for row in described),
    }


def memory_lines(known: Mapping[str, Any]) -> list[str]:
    """What ``memory_of`` found, for people."""
    lines = []
    for each in known["roles"]:
        shown = ", ".join(f"{name} {amount / 1e9:.3g}" for name, amount in each["parts"].items())
        of = f"{each['bytes'] / 1e9:.3g} GB ({shown or 'models not counted'})"
        host = ", ".join(f"{name} {amount / 1e9:.3g}" for name, amount in each["host"].items())
        process = f"process {each['process'] / 1e9:.3g} GB{host and f' (beside models: {host})'}"
        lines.append(f"  {each['actors']} × {each['role']} on {each['device']}: {of}; {process}")
    for each in known["gpus"]:
        shared = " + ".join(f"{count} {name}" for name, count in each["actors"].items()) or "no actor"
        least, most = each["bytes"] / 1e9, each["while_encoding"] / 1e9
        lines.append(f"  {each['gpus']} × GPU with {shared}: {least:.3g} GB, {most:.3g} while prompts are encoded")
    together = known["together"] / 1e9
    apart = "" if known["activations"] else "; activations apart"
    return [*lines, f"  together {together:.1f} GB of the machines' memory{apart}"]


def models_of(reward: Reward) -> list[str]:
    """The models that a reward loads, as far as they are directories or on the hub."""
    from pipelines.rewards.text import default_encoder

    named = [path for path in reward.model_paths.values() if (found := find(path)) is None or found.is_dir()]
    return named if named or getattr(reward, "model", "") is not None else [str(default_encoder())]


def counted(path: str | None, targets: Sequence[str] = ()) -> Counter[str]:
    """Parameters of a model's parts, and of LoRA on ``targets`` for each rank; numbers of a latent. Empty: unknown."""
    counts: Counter[str] = Counter()
    directory = find(path) if path else None
    if directory is None:
        return Counter(yaml.safe_load(KNOWN.read_text(encoding="utf-8")).get(path))
    if not (directory / "model_index.json").is_file():
        return Counter({directory.name: _sizes(weight_shapes(directory))})
    files = inspect(directory)
    counts.update({part: _sizes(shapes) for part, shapes in files.shapes.items()})
    ends = tuple(f".{target}.weight" for target in targets)
    network = files.shapes[files.kind.network].items()
    counts["lora"] = sum(s[0] + math.prod(s[1:]) for name, s in network if f".{name}".endswith(ends))
    counts["bound"] = sum(math.prod(s) for name, s in network if f".{name}".endswith(ends))  # weights with LoRA
    counts["latent"] = math.prod(files.latent_shape)
    return counts


def _sizes(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
