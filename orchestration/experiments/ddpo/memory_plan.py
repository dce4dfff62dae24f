"""What a run will hold in memory, estimated before anything is loaded: role by role, and GPU by GPU where roles share.

Parameters are counted in the headers of a model's files; a model that is still on the hub has to be a known one.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from actors.allocation import Offer, Role, cards_of
from orchestration.experiments.ddpo.config import DdpoConfig
from pipelines.denoisers import inspect
from pipelines.storage.locations import find
from pipelines.storage.model_files import Shapes, weight_shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 0.6e9  # bytes of an actor that has imported torch, diffusers and transformers
KNOWN = Path(__file__).with_name("known_models.yaml")


def memory_plan(config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer]) -> list[str]:
    """Lines for people, in GB (1e9 bytes). What follows a role in brackets are the parts of its sum."""
    return memory_lines(memory_of(config, roles, offers))


def memory_of(config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer]) -> dict[str, Any]:
    """Bytes of an actor of each role and of their parts, of GPUs that roles share, and of everything."""
    training, size = config.training, BYTES[config.model.dtype]
    model, captioner = counted(config.model.path, config.model.lora_targets), counted(config.captioner.path)
    encoders = sum(count for part, count in model.items() if part.startswith("text_encoder"))
    network, vae, text = (size * count for count in (model["unet"] + model["transformer"], model["vae"], encoders))
    adapter = BYTES["float32"] * model["lora"] * config.model.lora_rank  # float32 whatever the network is
    trained = adapter or network * BYTES["float32"] // size
    latents = training.images_per_step * (config.sampling.steps + 1) * model["latent"] * BYTES["float32"]
    drawing = {"network": network, "autoencoder": vae, "text encoders": text}
    learning = drawing | {"LoRA": adapter, "gradient": trained, "optimiser": 2 * trained, "start of the step": trained}
    learning |= {"first model": trained * bool(training.kl_weight), "average": trained * bool(training.ema_decay)}
    learning |= {"weights before": trained * training.depth, "trajectories": latents}
    learning |= {"float32 weights": trained * (trained != network and not adapter)}
    captioning = {"weights": BYTES["float32"] * captioner.total()}
    held = {"sampler": drawing, "learner": learning, "captioner": captioning}
    away = {"sampler": text, "learner": text + vae}  # from the GPU, but for moments
    sums = {role.name: sum(held.get(role.name, {}).values()) for role in roles}
    return {
        "roles": [
            {"role": role.name, "actors": role.count, "device": role.device, "bytes": sums[role.name]}
            | {"parts": {name: amount for name, amount in held.get(role.name, {}).items() if amount}}
            for role in roles
        ],
        "gpus": [
            {"gpus": count, "actors": dict(Counter(names)), "bytes": sum(sums[n] - away.get(n, 0) for n in names)}
            | {"while_encoding": sum(sums[n] for n in names)}
            for names, count in Counter(map(tuple, cards_of(roles, offers))).items()
        ],
        "together": sum(role.count * (PROCESS + sums[role.name]) for role in roles),
    }


def memory_lines(known: Mapping[str, Any]) -> list[str]:
    """What ``memory_of`` found, for people."""
    lines = []
    for each in known["roles"]:
        shown = ", ".join(f"{name} {amount / 1e9:.3g}" for name, amount in each["parts"].items())
        of = f"{each['bytes'] / 1e9:.3g} GB ({shown or 'models not counted'})"
        lines.append(f"  {each['actors']} × {each['role']} on {each['device']}: {of}")
    for each in known["gpus"]:
        shared = " + ".join(f"{count} {name}" for name, count in each["actors"].items()) or "no actor"
        least, most = each["bytes"] / 1e9, each["while_encoding"] / 1e9
        lines.append(f"  {each['gpus']} × GPU with {shared}: {least:.3g} GB, {most:.3g} while prompts are encoded")
    together = known["together"] / 1e9
    return [*lines, f"  together {together:.1f} GB, of it {PROCESS / 1e9} GB for each process; activations apart"]


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
    counts["latent"] = math.prod(files.latent_shape)
    return counts


def _sizes(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
