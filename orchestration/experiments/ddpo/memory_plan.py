"""What a run will hold in memory, estimated before anything is loaded: role by role, and GPU by GPU where roles share.

Parameters are counted in the headers of a model's files; a model that is still on the hub has to be a known one.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
    lines, crowds = [], Counter(map(tuple, cards_of(roles, offers)))
    for role in roles:
        parts = {name: amount / 1e9 for name, amount in held.get(role.name, {}).items() if amount}
        shown = ", ".join(f"{name} {amount:.3g}" for name, amount in parts.items()) or "models not counted"
        lines.append(f"  {role.count} × {role.name} on {role.device}: {sum(parts.values()):.3g} GB ({shown})")
    for names, count in crowds.items():
        shared = " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "no actor"
        most, least = (sum(sum(held[n].values()) - out.get(n, 0) for n in names) / 1e9 for out in ({}, away))
        lines.append(f"  {count} × GPU with {shared}: {least:.3g} GB, {most:.3g} while prompts are encoded")
    everything = sum(role.count * (PROCESS + sum(held.get(role.name, {}).values())) for role in roles) / 1e9
    return [*lines, f"  together {everything:.1f} GB, of it {PROCESS / 1e9} GB for each process; activations apart"]


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
