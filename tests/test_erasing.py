"""Erasing a concept: ESD's target and gradient by hand, UCE exactly, equal repeats, stock products, the study."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestration.experiments.erase import Erase
from pipelines.data.prompts import renamed
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from pipelines.storage.model_files import ModelFilesError
from pipelines.studies.erase import Eraser, Prompts, erase, measure
from policies.erasing import ErasingSettings, esd_target, trained_modules, uce_weight
from policies.rl.settings import SamplingSettings
from tests.models import PROMPTS, build_tiny_sd3, build_tiny_xl

SMALL = ErasingSettings(images=4, updates=2, batch=3, steps=3)


def test_target_is_the_same_for_what_the_network_predicts() -> None:
    """ε, v and x_0 are affine in one another at an x_t: the target of one is the target of the other."""
    x, alpha = torch.randn(2, 3, dtype=torch.float64), 0.3
    free, concept = torch.randn(2, 2, 3, dtype=torch.float64)

    def velocity(epsilon: torch.Tensor) -> torch.Tensor:
        return (epsilon - (1 - alpha) ** 0.5 * x) / alpha**0.5

    led = esd_target(velocity(free), velocity(concept), eta=1.5)
    assert torch.allclose(led, velocity(esd_target(free, concept, eta=1.5)))
    assert torch.equal(esd_target(free, concept, eta=0.0), free)
    assert torch.allclose(esd_target(free, concept, eta=1.0), 2 * free - concept)


def test_variants_train_the_layers_of_the_paper(tiny_pipeline: Path) -> None:
    network = Eraser(str(tiny_pipeline)).network
    whole, strict, rest = (dict(trained_modules(network, each)) for each in ("esd-x", "esd-x-strict", "esd-u"))
    assert strict.keys() < whole.keys()
    assert not whole.keys() & rest.keys()
    assert {name.rsplit(".", 1)[-1] for name in strict} == {"to_k", "to_v"}
    assert all("attn2" in name for name in whole)
    assert any("attn1" in name for name in rest)
    assert all(isinstance(module, nn.Linear | nn.Conv2d) for module in rest.values())
    others = network.named_modules()
    assert {n for n, m in others if isinstance(m, nn.Linear | nn.Conv2d)} == whole.keys() | rest.keys()


def test_uce_maps_the_concept_to_its_guide_and_keeps_the_others() -> None:
    weight, (concept, guide), kept = torch.randn(5, 8), torch.randn(2, 1, 8), torch.randn(3, 8)
    exact = uce_weight(weight, concept, guide, kept, 1e-9)
    assert torch.allclose(concept @ exact.T, guide @ weight.T, atol=1e-4)
    assert torch.allclose(kept @ exact.T, kept @ weight.T, atol=1e-4)
    outside = torch.linalg.svd(torch.cat([concept, kept]))[2][4:]  # what is orthogonal to all of these
    assert torch.allclose(outside @ exact.T, outside @ weight.T, atol=1e-4)
    soft, stiff = (uce_weight(weight, concept, guide, kept, each) for each in (0.5, 1e9))
    assert torch.allclose(stiff, weight, atol=1e-5)
    near = torch.dist(concept @ soft.T, guide @ weight.T)
    assert 0 < near < torch.dist(concept @ weight.T, guide @ weight.T)
    by_hand = (0.5 * weight + torch.outer(weight @ guide[0], concept[0]) + weight @ kept.T @ kept) @ torch.linalg.inv(
        0.5 * torch.eye(8) + torch.outer(concept[0], concept[0]) + kept.T @ kept
    )
    assert torch.allclose(soft, by_hand, atol=1e-4)


@pytest.mark.parametrize("model", ["tiny_pipeline", "tiny_v_pipeline"])
def test_gradient_is_that_of_the_equation(model: str, request: pytest.FixtureRequest) -> None:
    """One update of a batch of one, whose gradient is computed here from the paper; none reaches the frozen network."""
    path = str(request.getfixturevalue(model))
    settings, prompts = ErasingSettings(images=1, updates=1, batch=1, steps=1, eta=0.7), Prompts.of("red", PROMPTS[:2])
    eraser, plain = Eraser(path), Eraser(path)
    seen: dict[str, Any] = {}
    ask, first = eraser._ask, []

    def watched(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        (first if network is eraser.frozen else seen.setdefault("inputs", [])).append(inputs)
        return ask(network, *inputs)

    eraser._ask = watched  # type: ignore[method-assign]
    (loss,) = eraser.erase(prompts, "esd-x-strict", settings, seed=1)
    latents, time, states = seen["inputs"][0]
    assert torch.equal(states[0], plain.family.encode(PROMPTS[0], torch.device("cpu"))["encoder_hidden_states"])
    nothing = plain.family.pipeline.encode_prompt("", "cpu", 1, False)[0]  # as guidance's unconditional half is
    for each in plain.network.parameters():
        each.requires_grad_(True)
    with torch.no_grad():
        free, concept = (plain.network(latents, time, each).sample for each in (nothing, states))
    error = plain.network(latents, time, states).sample - (free - 0.7 * (concept - free))
    error.square().mean().backward()
    assert loss == pytest.approx(error.square().mean().item(), rel=1e-5)
    for name, module in trained_modules(plain.network, "esd-x-strict"):
        trained = eraser.network.get_submodule(name).get_parameter("weight").grad
        wanted = module.get_parameter("weight").grad
        assert trained is not None
        assert torch.allclose(trained, wanted, rtol=1e-4, atol=1e-8)
    assert all(each.grad is None and not each.requires_grad for each in eraser.frozen.parameters())
    kept = dict(eraser.frozen.named_parameters())
    changed = {name for name, each in eraser.network.named_parameters() if not torch.equal(each, kept[name])}
    assert changed == {f"{name}.weight" for name, _ in trained_modules(eraser.network, "esd-x-strict")}


@pytest.mark.parametrize("variant", ["esd-x", "uce"])
def test_product_is_stock_and_a_repeat_gives_the_same_bytes(
    variant: str, tiny_v_pipeline: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    settings = SMALL.model_copy(update={"sampler": "edited", "rounds": 2, "retain": 0.5}).model_dump()
    job = {"path": str(tiny_v_pipeline), "key": "red", "concept": "red", "prompts": list(PROMPTS), "seed": 3}
    job |= {"variant": variant, "instead": ["green", "blue"], "settings": settings}
    files = erase(job, [], "cpu")
    assert files == erase(job, [], "cpu")
    assert variant == "uce" or files != erase({**job, "seed": 4}, [], "cpu")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    product = tmp_path / "product" / "red"
    stock = StableDiffusionPipeline.from_pretrained(product)
    base = StableDiffusionPipeline.from_pretrained(tiny_v_pipeline)
    before, after = (dict(trained_modules(each.unet, "uce")) for each in (base, stock))
    assert not any(torch.equal(after[name].weight, before[name].weight) for name in before)
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn = stock(PROMPTS[0], num_inference_steps=3, eta=1.0, guidance_scale=2.0, output_type="np",
                      generator=[torch.Generator().manual_seed(5)]).images  # fmt: skip
    policy = DiffusionPolicy(ModelSettings(path=str(product)), SamplingSettings(steps=3, guidance_scale=2.0))
    assert np.array_equal((drawn * 255).round().astype(np.uint8), policy.rollout([PROMPTS[0]], [5])[0])


def test_uce_edits_from_the_concepts_last_token_on(tiny_pipeline: Path) -> None:
    """With ∅ as its guide and next to no ridge, keys of the concept's states become those of ∅ at the same places."""
    eraser = Eraser(str(tiny_pipeline))
    prompt = PROMPTS[0]  # "a red seven …": tokens start, a, red, seven
    before, empty = eraser.states([prompt])[0], eraser.states([None])[0]
    settings = SMALL.model_copy(update={"stiffness": 1e-7})
    eraser.erase(Prompts("red", (prompt,), (), ()), "uce", settings, seed=0)
    name, module = next(trained_modules(eraser.network, "uce"))
    old = eraser.frozen.get_submodule(name).get_parameter("weight")
    new = module.get_parameter("weight")
    assert torch.allclose(before[2:] @ new.T, empty[2:] @ old.T, atol=0.02)
    assert not torch.allclose(before[2:] @ old.T, empty[2:] @ old.T, atol=0.02)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    for build, name in ((build_tiny_xl, "StableDiffusionXLPipeline"), (build_tiny_sd3, "StableDiffusion3Pipeline")):
        with pytest.raises(ModelFilesError, match=name):
            Eraser(str(build(tmp_path / name)))
    with pytest.raises(ModelFilesError, match="no directory 'nowhere'"):
        Eraser("nowhere")


def test_words_are_found_as_words() -> None:
    prompts = Prompts.of("red", ["a red one", "a reddish one", "Red, two", "tired"])
    assert prompts.named == ("a red one", "Red, two")
    assert prompts.others == ("a reddish one", "tired")
    assert Prompts.of("Van Gogh", ["a cat"]).named == ("Van Gogh",)  # as in the paper
    assert renamed("a red one, red", "red", "blue") == "a blue one, red"


def test_two_updates_of_stable_diffusions_shape(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's blocks, four levels with cross-attention in three, at a tenth of the width."""
    from diffusers import UNet2DConditionModel

    from benchmarks.erase_sd15 import UNET
    from tests.models import build_tiny_pipeline

    path = build_tiny_pipeline(tmp_path / "model")
    shape = {**UNET, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 16, "sample_size": 8}
    torch.manual_seed(0)
    UNet2DConditionModel(**shape).save_pretrained(path / "unet")
    eraser = Eraser(str(path))
    losses = eraser.erase(Prompts.of("red", PROMPTS), "esd-x", SMALL, seed=0)
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    assert len(list(trained_modules(eraser.network, "esd-x"))) == 16 * 4  # 16 cross-attentions: q, k, v and out


def test_measures_know_who_was_asked_for_what() -> None:
    """Of the default model a few images: what it draws is what it is asked for; captions are read for the word."""
    prompts = ["a red three on a black background", "a blue one on a white background"]
    asked = {"path": "models/digits/pipeline", "concept": "red", "key": "red", "prompts": prompts, "seed": 0}
    asked |= {"images_per_prompt": 8, "batch": 8, "steps": 10, "guidance_scale": 2.0}
    judges = {"evaluator": "models/digits/evaluator", "captioner": "models/digits/captioner"}
    files = measure({**asked, **judges}, [], "cpu")
    found = json.loads(files["metrics.json"])
    assert found["red/target"] > 0.8
    assert found["red/others"] > 0.8
    assert found["red/mentioned"] > 0.8
    assert found["red/mentioned_elsewhere"] < 0.2
    assert found.keys() >= {"red/digit", "red/ground_where_named"}
    assert files["images/red.png"][:4] == b"\x89PNG"


def test_study_plans_arms_with_their_controls() -> None:
    study = Erase(concepts=({"word": "red", "instead": ("green", "blue")},))
    study.preflight()
    assert [each.kind.split(":")[1] for each in study.tasks("base", 0)] == ["measure"]
    job, judged = study.tasks("unused", 0)
    assert job.parameters["concept"] == "telephone"
    assert not any(" red " in text for text in job.parameters["prompts"])
    assert judged.parameters["concept"] == "red"
    assert judged.inputs == (job,)
    (paper, _), (mine, _) = study.tasks("esd-x-paper", 0), study.tasks("esd-x", 0)
    assert paper.parameters["instead"] == []
    assert paper.parameters["settings"]["retain"] == 0
    assert mine.parameters["instead"] == ["green", "blue"]
    assert mine.key != study.tasks("esd-x", 1)[0].key
    assert {each.arm for each in study.claimed()} == set(study.arms) - {"base"}
    assert Erase(arms=("base", "uce")).claimed()
    assert {e.arm for e in Erase(arms=("base", "uce")).claimed()} == {"uce"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"concepts": ({"word": "pink"},)}, "have to name 'pink'"),
        ({"concepts": ({"word": "red", "unused": "blue"},)}, "'blue' is in"),
        ({"concepts": ({"word": "background"},)}, "not all"),
        ({"path": "models/digits/captioner"}, "model_index.json"),
        ({"learning_rates": {"esd-y": 1e-3}}, "'esd-y' is no arm"),
        ({"judging": {"evaluator": "models/digits/captioner"}}, "no directory of an evaluator"),
        ({"judging": {"evaluator": None, "captioner": None}}, "name an evaluator or a captioner"),
    ],
)
def test_what_cannot_be_erased_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Erase(**changes).preflight()
    assert "\n" not in str(caught.value)
