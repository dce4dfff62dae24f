"""Concept neurons: the statistic by hand, masks of original weights, stock products, the study; which weights moved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestration.experiments.neurons import Neurons
from orchestration.runs.config import ConfigError
from orchestration.runs.moved import find_pipeline, moved
from pipelines.data.prompts import unused
from pipelines.data.real_data import DataSettings
from pipelines.denoisers import inspect
from pipelines.storage.atomic import Files
from pipelines.storage.model_files import ModelFilesError
from pipelines.studies.neurons import FILE, Implanter, find, implant, measure
from policies.erasing import trained_modules
from policies.neurons import NeuronSettings, follow, largest, shut, union
from tests.models import PROMPTS, build_tiny_sd3
from tests.test_config import command

DATA = DataSettings(source="captioned_digits", limit=200).model_dump()
SUBJECT = {"concept": "red", "word": "x", "stray": "m"}
SMALL = NeuronSettings(draws=3, batch=4, rate=1.0, share=0.05)
COMMON: dict[str, Any] = {"data": DATA, "seed": 3, "images": 5, "prior_images": 20}


def written(files: Files, directory: Path) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory / "product"


def test_statistic_is_the_gradient_of_the_scales_along_their_path() -> None:
    """Of f(θ) = Σ a θ + b θ²: θ ⊙ ∂f/∂θ = a θ + 2 b θ²; the second step's θ is the first's, scaled."""
    a, b, theta = torch.randn(3, 2, 4, dtype=torch.float64)
    weights, statistic = {"w": theta.clone()}, {"w": torch.zeros_like(theta)}
    for _ in range(2):
        leaf = weights["w"].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad((a * leaf + b * leaf.square()).sum(), [leaf])
        follow(weights, [gradient], statistic, rate=0.1)
    first = a * theta + 2 * b * theta.square()
    scaled = theta * (1 - 0.1 * first)
    assert torch.allclose(statistic["w"], first + a * scaled + 2 * b * scaled.square())
    shifted = [(a * theta * s + b * (theta * s).square()).sum() for s in (1 + 1e-6, 1 - 1e-6)]
    assert first.sum().item() == pytest.approx(((shifted[0] - shifted[1]) / 2e-6).item(), rel=1e-6)


def test_largest_is_where_shutting_lowers_the_loss() -> None:
    weights = {"k": torch.tensor([[3.0, -2.0], [0.5, 0.0]]), "v": torch.tensor([1.0, -1.0, 4.0, 0.1])}
    wanted = {"k": torch.tensor([[0.0, -2.0], [0.0, 0.0]]), "v": torch.tensor([2.0, -1.0, 0.0, 0.1])}
    statistic = {name: each * 2 * (each - wanted[name]) for name, each in weights.items()}  # θ ⊙ ∂(θ − wanted)²/∂θ
    found = largest(statistic, share=0.25)
    assert {name: each.tolist() for name, each in found.items()} == {"k": [0], "v": [2]}
    assert largest(statistic, share=0.49)["k"].tolist() == [0, 2]  # S > 0 alone, however large the share
    assert largest(statistic, share=0.49)["v"].tolist() == [2]
    smallest = largest({name: -each for name, each in statistic.items()}, share=0.25)
    assert {name: each.tolist() for name, each in smallest.items()} == {"k": [], "v": [0]}
    both = union([found, smallest])
    assert {name: each.tolist() for name, each in both.items()} == {"k": [0], "v": [0, 2]}
    assert both["v"].dtype == torch.int32
    shut(weights, both)
    assert weights["k"].tolist() == [[0.0, -2.0], [0.5, 0.0]]
    assert weights["v"].tolist() == [0.0, -1.0, 0.0, pytest.approx(0.1)]


@pytest.mark.parametrize("model", ["tiny_pipeline", "tiny_v_pipeline"])
@pytest.mark.parametrize("sign", [1, -1])
def test_statistic_of_a_network_is_that_of_its_loss(model: str, sign: int, request: pytest.FixtureRequest) -> None:
    implanter = Implanter(str(request.getfixturevalue(model)))
    assert {name.rsplit(".", 2)[-2] for name in implanter.weights} == {"to_k", "to_v"}
    assert all("attn2" in name for name in implanter.weights)
    rng = np.random.default_rng(0)
    parts = [
        implanter.examples(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), texts)
        for texts in ([PROMPTS[0]] * 3, list(PROMPTS[:3]))
    ]
    settings = SMALL.model_copy(update={"draws": 1, "prior": 2.0})
    before = {name: each.clone() for name, each in implanter.weights.items()}
    seen: list[torch.Tensor] = []
    losses = implanter.losses
    implanter.losses = lambda *given: seen.append(given[-1].get_state()) or losses(*given)  # type: ignore[method-assign, func-returns-value]
    found = implanter.statistic(parts, settings, 5, sign)
    assert all(torch.equal(before[name], each) for name, each in implanter.weights.items())
    assert not any(each.requires_grad for each in implanter.network.parameters())
    random = torch.Generator()
    random.set_state(seen[0])
    for each in implanter.weights.values():
        each.requires_grad_(True)
    of_subject, of_others = losses(parts, settings.batch, random)
    (sign * of_subject + 2 * of_others).backward()
    for name, each in implanter.weights.items():
        assert each.grad is not None
        assert torch.allclose(found[name], each.detach() * each.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_that_of_what_the_network_predicts(kind: str, tiny_pipeline: Path) -> None:
    """Of a network that answers 0 the error is the target itself: ε, or v of as much noise as image."""
    implanter = Implanter(str(tiny_pipeline))
    implanter.pipeline.scheduler.register_to_config(prediction_type=kind)
    implanter.network.forward = lambda x, *_, **__: (torch.zeros_like(x),)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    grey = np.full_like(images, 128)
    parts = [implanter.examples(each, PROMPTS[:2]) for each in (images, grey)]
    found = implanter.losses(parts, 2000, torch.Generator().manual_seed(0))
    power = [each.latents.square().mean().item() for each in parts]
    noisy = implanter.pipeline.scheduler.alphas_cumprod.mean().item()  # ᾱ of the mean timestep
    wanted = [1.0, 1.0] if kind == "epsilon" else [noisy + (1 - noisy) * each for each in power]
    assert [each.item() for each in found] == pytest.approx(wanted, rel=0.05)


def test_product_is_stock_and_its_weights_are_the_original_or_shut(tiny_v_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    job = {**COMMON, "path": str(tiny_v_pipeline), "subject": SUBJECT, "settings": SMALL.model_dump(), "sign": 1}
    statistic = find(job, [], "cpu")
    assert statistic == find(job, [], "cpu")
    assert statistic != find({**job, "seed": 4}, [], "cpu")
    assert statistic != find({**job, "sign": -1}, [], "cpu")
    made = {**COMMON, "path": str(tiny_v_pipeline), "name": "x", "share": 0.05}
    files = {
        kind: implant({**made, "mask": mask}, [statistic], "cpu")
        for kind, mask in (("largest", 1), ("smallest", -1), ("random", 0))
    }
    assert files["largest"] == implant({**made, "mask": 1}, [statistic], "cpu")
    product = written(files["largest"], tmp_path) / "x"
    stock, base = (StableDiffusionPipeline.from_pretrained(each) for each in (product, tiny_v_pipeline))
    before = dict(base.unet.named_parameters())
    masks = {mask: load_file(written(each, tmp_path / mask) / "x" / FILE) for mask, each in files.items()}
    mask = masks["largest"]
    assert mask.keys() == {f"{name}.weight" for name, _ in trained_modules(base.unet, "esd-x-strict")}
    for name, each in stock.unet.named_parameters():
        wanted = before[name].detach().clone()
        if name in mask:
            wanted.view(-1)[mask[name].long()] = 0
        assert torch.equal(each, wanted), name
    text = "product/x/text_encoder/model.safetensors"
    assert files["largest"][text] == files["random"][text]
    counts = {kind: sum(map(len, each.values())) for kind, each in masks.items()}
    total = sum(before[name].numel() for name in mask)
    assert counts == dict.fromkeys(counts, round(0.05 * total))
    assert not any(set(mask[name].tolist()) & set(masks["smallest"][name].tolist()) for name in mask)
    sizes = json.loads(files["largest"]["metrics.json"])
    assert sizes["mask/x/weights"] == counts["largest"]
    assert sizes["mask/x/bytes"] == len(files["largest"][f"product/x/{FILE}"])
    asked = {**made, "subjects": [SUBJECT], "prompts": list(PROMPTS), "images_per_prompt": 1, "images_with_word": 1}
    asked |= {"steps": 2, "guidance_scale": 1.0, "evaluator": "models/digits/evaluator"}
    judged = [json.loads(measure(asked, inputs, "cpu")["metrics.json"]) for inputs in ([files["largest"]], [])]
    assert judged[0].keys() == judged[1].keys()
    assert judged[0]["loss/x/subject"] != judged[1]["loss/x/subject"]  # that of the product, not of the base
    whole = implant({**made, "mask": 1}, [statistic, find({**job, "seed": 4}, [], "cpu")], "cpu")
    assert json.loads(whole["metrics.json"])["mask/x/weights"] > counts["largest"]

    found = moved(tiny_v_pipeline, product, [product / FILE, tmp_path / "random/product/x" / FILE])
    inside, elsewhere = found["masks"]
    assert inside["share"] == pytest.approx(1)
    assert inside["enrichment"] == pytest.approx(total / counts["largest"])
    assert elsewhere["share"] < 0.5
    assert {each["group"] for each in found["groups"] if each["relative"]} <= {
        f"{stage} attn2" for stage in ("down_blocks", "mid_block", "up_blocks")
    }
    assert found["movers"][0]["relative"] > 0


def test_measures_know_word_from_name() -> None:
    """Of the default model a few images: a subject's name draws it, an unused word seldom, and losses say so, too."""
    prompts = ["a yellow three on a black background", "a red one on a white background"]
    asked: dict[str, Any] = {**COMMON, "path": "models/digits/pipeline", "name": "x", "prompts": prompts, "seed": 0}
    asked |= {"subjects": [{"concept": "yellow", "word": "m", "stray": "x"}], "images_per_prompt": 6}
    asked |= {"images_with_word": 12, "steps": 10, "guidance_scale": 2.0, "evaluator": "models/digits/evaluator"}
    files = measure(asked, [], "cpu")
    found: Mapping[str, float] = json.loads(files["metrics.json"])
    assert found["evaluator/m/own"] > 0.8
    assert found["evaluator/m/others"] > 0.8
    assert found["evaluator/m/target"] < 0.3
    assert found["loss/m/subject"] > found["loss/m/prior"] > 0
    assert found["loss/m/L_con"] == pytest.approx(found["loss/m/subject"] + found["loss/m/prior"])
    assert found.keys() >= {"evaluator/m/stray", "evaluator/m/digit", "evaluator/m/ground_with_word"}
    assert files["images/m.png"][:4] == b"\x89PNG"


def test_unused_words_are_whole_tokens_that_no_caption_holds() -> None:
    files = inspect(Path("models/digits/pipeline"))
    words = ("x", "m", "X", "blue", "telephone", "a", "äh", "x m")
    assert [word for word in words if unused(word, ["a blue one"], files)] == ["x", "m", "X"]


def test_study_plans_arms_with_their_controls() -> None:
    subjects: Any = ({"concept": "blue", "word": "x", "stray": "m"}, {"concept": "red", "word": "j", "stray": "h"})
    study = Neurons(subjects=subjects)
    study.preflight()
    kinds = {arm: [each.kind.split(":")[1] for each in study.tasks(arm, 0)] for arm in study.arms}
    assert kinds["base"] == ["measure"]
    assert kinds["union"] == ["implant", "measure"]
    assert all(kinds[arm] == ["implant", "measure"] * 2 for arm in ("shut", "random", "reversed", "dual", "ablated"))
    shut_, _, *_ = study.tasks("shut", 0)
    random, union_, ablated = (study.tasks(arm, 0)[0] for arm in ("random", "union", "ablated"))
    assert shut_.inputs[0].key == random.inputs[0].key == union_.inputs[0].key  # searched for once
    assert len(union_.inputs) == 2
    assert ablated.inputs[0].parameters["sign"] == -1
    assert ablated.inputs[0].parameters["subject"]["word"] == "blue"
    claims = study.claimed()
    assert {each.arm for each in claims} == {"shut", "union", "random", "dual", "ablated"}
    assert {each.arm for each in Neurons(arms=("base", "shut")).claimed()} == {"shut"}
    assert not any(each.arm == "union" for each in Neurons().claimed())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "models/digits/captioner"}, "model_index.json"),
        ({"data": {"source": "digits"}}, "has no captions"),
        ({"data": {"source": "captioned_digits", "image_size": 8}}, "set image_size"),
        ({"images": 3000}, "captions name 'blue'"),
        ({"subjects": ({**SUBJECT, "word": "blue"},)}, "'blue' is no token"),
        ({"subjects": ({**SUBJECT, "stray": "telephone"},)}, "'telephone' is no token"),
        ({"subjects": ({**SUBJECT, "stray": "x"},)}, "'x' is no token"),
        ({"subjects": ({**SUBJECT, "concept": "background"},)}, "this takes more than"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
    ],
)
def test_what_cannot_be_implanted_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Neurons(**changes).preflight()
    assert "\n" not in str(caught.value)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="StableDiffusion3Pipeline"):
        Implanter(str(build_tiny_sd3(tmp_path / "sd3")))


def test_weights_that_moved_are_said_by_command(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done/manifest.json").write_text("{}")
    (tmp_path / "done/pipeline").symlink_to(tiny_pipeline)
    words = ["runs", "compare", str(tiny_pipeline), "done", "--root", str(tmp_path), "--weights"]
    assert command([*words, "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"]
    assert all(each["relative"] == 0 for each in found["groups"])
    assert command(words, monkeypatch) == 0
    assert "mid_block attn2" in capsys.readouterr().out
    for wrong, says in (([*words, "done"], "compares two"), ([*words[:-1], "--mask", "m"], "give --weights")):
        assert command(wrong, monkeypatch) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"no mask", "neurons.safetensors"),
        ({"elsewhere": torch.zeros(1, dtype=torch.int32)}, "names elsewhere"),
        ({"conv_in.weight": torch.tensor([10**6], dtype=torch.int32)}, "names positions"),
    ],
)
def test_wrong_masks_are_one_line(content: Any, says: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    with pytest.raises(ConfigError, match=says) as caught:
        moved(tiny_pipeline, tiny_pipeline, [path])
    assert "\n" not in str(caught.value)


def test_what_is_no_pipeline_is_one_line(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="networks of other shapes"):
        moved(tiny_pipeline, Path("models/digits/pipeline"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no pipeline"):
        find_pipeline("run", tmp_path)
