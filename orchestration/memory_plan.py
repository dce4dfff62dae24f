"""What a run will hold in memory, estimated before anything is loaded: role by role, and GPU by GPU where roles share.

Parameters are counted in the headers of a model's files; a model that is still on the hub has to be a known one.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence

from safetensors import safe_open

from actors.settings import Offer, Role
from orchestration.config import DdpoConfig
from pipelines.locations import find

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 0.6e9  # bytes of an actor that has imported torch, diffusers and transformers
# Of models on the hub: parameters of each part, of LoRA on the default targets for each rank, and numbers of a latent.
_SD_1 = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "lora": 199_296, "latent": 16_384}
_SD_3 = {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}
_HUB = {
    "CompVis/stable-diffusion-v1-4": _SD_1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD_1,
    "stabilityai/stable-diffusion-2-1": _SD_1
    | {"unet": 865_910_724, "text_encoder": 340_387_840, "lora": 207_488, "latent": 36_864},
    "stabilityai/stable-diffusion-xl-base-1.0": _SD_1
    | {"unet": 2_567_463_684, "text_encoder_2": 694_659_840, "lora": 1_451_520, "latent": 65_536},
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD_3
    | {"transformer": 2_028_328_000, "lora": 294_912, "latent": 262_144},
    "stabilityai/stable-diffusion-3.5-medium": _SD_3
    | {"transformer": 2_243_171_520, "lora": 454_656, "latent": 262_144},
    "Salesforce/blip-image-captioning-base": {"captioner": 223_971_644},
}


def memory_plan(config: DdpoConfig, roles: Sequence[Role], offers: Sequence[Offer]) -> list[str]:
    """Lines for people, in GB (1e9 bytes)."""
    counts = {path: _count(path, config.model.lora_targets) for path in (config.model.path, config.captioner.path)}
    model, size = counts[config.model.path], BYTES[config.model.dtype]
    weights = size * (model.total() - model["lora"] - model["latent"])
    adapter = BYTES["float32"] * model["lora"] * config.model.lora_rank  # float32 whatever the network is
    network, autoencoder = size * (model["unet"] + model["transformer"]), size * model["vae"]
    trained = adapter or network
    on_card = {role.name for role in roles if role.device == "cuda"}
    path = config.training.images_per_step * (config.sampling.steps + 1) * model["latent"] * BYTES["float32"]
    others = {
        "captioner": counts[config.captioner.path],
        "reward": _count(config.reward.encoder),
        "evaluator": _count(config.evaluation.evaluator),
    }
    learning = {"gradient": trained, "optimiser": 2 * trained, "start of the step": trained, "trajectories": path}
    learning |= {
        "first model": trained * (config.training.kl_weight > 0),
        "average": trained * (config.training.ema_decay > 0),
    }
    held: dict[str, dict[str, float]] = {
        "sampler": {"weights": network + autoencoder if "sampler" in on_card else weights},
        "learner": {"weights": (network if "learner" in on_card else weights) + adapter, **learning},
        **{name: {"weights": BYTES["float32"] * count.total()} for name, count in others.items()},
    }
    total = {role.name: sum(held[role.name].values()) for role in roles}
    lines = [f"  {path}: neither here nor known, so left out" for path, count in counts.items() if path and not count]
    for role in roles:
        parts = ", ".join(f"{name} {amount / 1e9:.3g}" for name, amount in held[role.name].items() if amount)
        lines.append(f"  {role.count} × {role.name} on {role.device}: {total[role.name] / 1e9:.3g} GB ({parts or '–'})")
    everything = sum(role.count * (total[role.name] + PROCESS) for role in roles)
    lines.append(f"  together {everything / 1e9:.1f} GB, {PROCESS / 1e9:.1f} GB of each a process; activations apart")
    if on_card and (waiting := weights - network - autoencoder):
        lines.append(
            f"  text encoders wait on the host: {waiting / 1e9:.3g} GB, of a GPU only while prompts are encoded"
        )
    for names, cards in Counter(map(tuple, _cards(roles, offers))).items():
        shared = " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nobody"
        lines.append(f"  {cards} × GPU with {shared}: {sum(total[name] for name in names) / 1e9:.3g} GB")
    return lines


def _count(path: str | None, targets: Sequence[str] = ()) -> Counter[str]:
    """Parameters of a model's parts, and of LoRA on ``targets`` for each rank; numbers of a latent. Empty: unknown."""
    counts: Counter[str] = Counter()
    directory = find(path) if path else None
    if directory is None:
        return Counter(_HUB.get(path or ""))
    for file in (*directory.glob("*.safetensors"), *directory.glob("*/*.safetensors")):
        part = file.parent.name
        if ".fp16." in file.name or part == "safety_checker":  # not loaded
            continue
        with safe_open(file, "np") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        counts[part] += sum(map(math.prod, shapes.values()))
        if part in ("unet", "transformer"):
            ends = tuple(f".{target}.weight" for target in targets)
            counts["lora"] += sum(s[0] + math.prod(s[1:]) for name, s in shapes.items() if name.endswith(ends))
    for network in (*directory.glob("unet/config.json"), *directory.glob("transformer/config.json")):
        shape = json.loads(network.read_text())
        counts["latent"] = shape["in_channels"] * shape["sample_size"] ** 2
    return counts


def _cards(roles: Sequence[Role], offers: Sequence[Offer]) -> list[list[str]]:
    """Who is on each GPU, as Ray seats ``roles``: of the node with most room, on the fullest GPU that has enough."""
    free = [[1.0] * int(offer.get("GPU", 0)) for offer in offers]
    names: list[list[list[str]]] = [[[] for _ in node] for node in free]
    for role in [each for each in roles for _ in range(each.count) if each.gpus]:
        kinds = [n for n, offer in enumerate(offers) if role.demand.keys() <= offer.keys()]
        cards = [(n, c) for n in kinds for c, left in enumerate(free[n]) if left >= role.gpus - 1e-6]
        if cards:
            node, card = min(cards, key=lambda at: (-sum(free[at[0]]), free[at[0]][at[1]]))
            free[node][card] -= role.gpus
            names[node][card].append(role.name)
    return [card for node in names for card in node]
