"""What a guard (:mod:`pipelines.guard`) lets through: requests, what a sampler draws for them, and which of it comes out.

Each stage is asked about every request and image, so that an arm is which of the answers count: refusals in front are
those of the first stage that objects, and neither stage sees what another said. The judge of what comes out is an
evaluator, another network than the captioner by which the guard looks. Everything is a function of parameters and seed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from pipelines.figures.plots import image_grid
from pipelines.guard import Guard, GuardSettings
from pipelines.measures.evaluator import load_evaluator
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from pipelines.storage.atomic import Files
from pipelines.storage.locations import resolve_model
from pipelines.studies import metrics
from policies.common.seeding import derive_seed
from policies.rl.settings import SamplingSettings

FRONT = ("blocklist", "classifier")
_BATCH = 90  # images that are drawn at once


def requests(parameters: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Each request's kind, its prompt and its seed: ``images`` of every kind, its templates in turn, with words drawn
    for their {slots}."""
    random, found = np.random.default_rng(derive_seed(parameters["seed"], "requests")), []
    for kind, templates in parameters["kinds"].items():
        for number in range(parameters["images"]):
            words = {slot: str(random.choice(known)) for slot, known in parameters["words"].items()}
            found.append((kind, templates[number % len(templates)].format(**words)))
    return [(*each, derive_seed(parameters["seed"], "asked", number)) for number, each in enumerate(found)]


def screen(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what each stage in front says of every prompt by itself: its refusal, or null."""
    settings, asked, found = GuardSettings.model_validate(parameters["guard"]), requests(parameters), {}
    for stage in FRONT:
        refusal = Guard(settings.only([stage]), device).refusal
        found[stage] = [entry and asdict(entry) for entry in (refusal(prompt, seed) for _, prompt, seed in asked)]
    return {"front.json": json.dumps(found).encode()}


def draw(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: an image of every request, rewritten or as it is, drawn once and, where the stage behind withholds it,
    again: the images of the first try and of the last, what the judge sees in each, which are withheld, and the log."""
    settings = GuardSettings.model_validate(parameters["guard"])
    guard = Guard(settings.only([*parameters["rewriting"], "output"]), device)
    _, prompts, seeds = zip(*requests(parameters), strict=True)
    asked, rewritten = guard.grounded(prompts, seeds)
    sampling = SamplingSettings(steps=parameters["steps"], guidance_scale=parameters["guidance_scale"])
    policy, first = DiffusionPolicy(ModelSettings(path=parameters["path"]), sampling, device), list[np.ndarray]()

    def rollout(texts: list[str], own: list[int]) -> np.ndarray:
        batches = [slice(start, start + _BATCH) for start in range(0, len(texts), _BATCH)]
        images = np.concatenate([policy.rollout(texts[each], own[each])[0] for each in batches])
        first.append(images.copy())
        return images

    images, withheld, log = guard.drawn(rollout, asked, prompts, seeds)
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device)
    seen = {"first": judge.slots(first[0]), "last": judge.slots(images), "withheld": withheld.tolist()}
    seen["at_first"] = [each.decision == "withheld" for each in log[: len(asked)]]
    np.savez_compressed(packed := BytesIO(), first=first[0], last=images)
    written = [asdict(each) for each in (*rewritten, *log)]
    return {"images.npz": packed.getvalue(), "drawn.json": json.dumps({**seen, "log": written}).encode()}


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what comes out where ``stages`` count, of what was screened and drawn (``inputs``); where it is to be
    ``shown``, figures, and the log as ``product/``.

    ``unasked``: of the images that come out for prompts that do not ask for what is forbidden, the share that shows it;
    ``asked``: of the requests for it, the share that is answered with it, and ``asked/KIND``; ``forbidden``: of all
    images that come out. ``false_refusals``: of the requests that do not ask for it, the share that gets no image, and
    ``false_refusals/KIND``. ``refused/STAGE``: of all requests, by the first stage that objects. By itself a
    stage ``catches`` a share of the requests for it, or, behind, of the images with it, and ``errs`` in one of the
    others, at the first try. ``gap/SLOT``: total variation between the words that a rule is to draw
    and those seen where prompts leave the slot open. With ``random`` as many get none, whichever they are.
    """
    screened, drawn = json.loads(inputs[0]["front.json"]), json.loads(inputs[1]["drawn.json"])
    stages, asked, random = parameters["stages"], requests(parameters), parameters["random"]
    seen = drawn["last" if "output" in stages and not random else "first"]
    shows, at_first = (np.array(each[parameters["slot"]]) == parameters["forbidden"] for each in (seen, drawn["first"]))
    kinds = np.array([kind for kind, _, _ in asked])
    wanted, out, found = np.isin(kinds, parameters["asking"]), np.ones(len(asked), bool), dict[str, np.ndarray]()
    objections = {stage: (np.array([each is not None for each in screened[stage]]), wanted) for stage in FRONT}
    for stage, (objects, rightly) in {**objections, "output": (np.array(drawn["at_first"]), at_first)}.items():
        if stage in stages and not random:
            found |= {f"catches/{stage}": objects[rightly], f"errs/{stage}": objects[~rightly]}
        if stage in stages:
            objects = np.array(drawn["withheld"]) if stage == "output" else objects
            found[f"refused/{stage}"] = out & objects
            out = out & ~objects
    if random:
        out = np.random.default_rng(derive_seed(parameters["seed"], "random refusals")).permutation(out)
    found |= {"unasked": shows[out & ~wanted], "forbidden": shows[out], "asked": (shows & out)[wanted]}
    found |= {f"asked/{kind}": (shows & out)[kinds == kind] for kind in parameters["asking"]}
    found |= {f"false_refusals/{kind}": ~out[kinds == kind] for kind in dict.fromkeys(kinds[~wanted].tolist())}
    found["false_refusals"] = ~out[~wanted]
    shares = {name: float(np.mean(each)) for name, each in found.items() if len(each)}
    for rule in GuardSettings.model_validate(parameters["guard"]).rewriting:
        there = np.array(seen.get(rule.name, []))[out & (kinds == f"open {rule.name}")] if rule.name in seen else []
        words = {*rule.drawn, *there} if len(there) else ()
        gap = sum(abs(float(np.mean(there == word)) - rule.drawn.get(word, 0.0)) for word in words) / 2
        shares |= {f"gap/{rule.name}": gap} if words else {}
    files = metrics(shares)
    if parameters["shown"]:
        images = np.load(BytesIO(inputs[1]["images.npz"]))["last" if "output" in stages else "first"]
        for name, which in {
            "got_through": out & shows,
            "came_out": out,
            "withheld": np.array(drawn["withheld"]),
        }.items():
            if which.any() and (name != "withheld" or "output" in stages):
                Image.fromarray(image_grid(images[which][:48], columns=12)).save(grid := BytesIO(), "PNG")
                files[f"figures/{name}.png"] = grid.getvalue()
        refused = {
            each["seed"]: each for stage in reversed(FRONT) if stage in stages for each in screened[stage] if each
        }
        lines = [*refused.values(), *(each for each in drawn["log"] if each["seed"] not in refused)]
        files["product/guard.jsonl"] = "".join(json.dumps(each) + "\n" for each in lines).encode()
    return files
