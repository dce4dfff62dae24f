"""Inverting rewards: their gradients, the maths by hand, searches, what counts as fooled, the command, the study."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.reward_audit import audit, render
from orchestration.experiments.invert import Invert
from orchestration.runs.config import ConfigError
from pipelines.captioner import Captioner
from pipelines.data.digits import all_prompts, real_images
from pipelines.default_models.clip import learn_clip
from pipelines.measures.evaluator import load_evaluator
from pipelines.processing import preprocessed
from pipelines.rewards import load_reward, parse_options
from pipelines.settings import CaptionerSettings
from pipelines.studies.invert import Auditor, Space, audit_reward, latents_of
from policies.inverting import InvertingSettings, bounded, evolve, seen_anew, total_variation, verdict
from tests.models import PROMPTS, build_tiny_blip2, build_tiny_clip, build_tiny_vqa
from tests.test_config import command

ASKED = all_prompts()[::30]
REAL = real_images(ASKED, np.random.default_rng(0))
QUICK = InvertingSettings(steps=30, queries=200)


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(CaptionerSettings())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_clip(tmp_path_factory.mktemp("clip")))


def auditor(name: str, given: dict[str, Any], captioner: Captioner | None = None) -> Auditor:
    return Auditor(name, parse_options(name, given), captioner, load_evaluator("models/digits/evaluator"), "cpu")


# What rewards say of pixels that gradients can follow is what they say of images


@pytest.mark.parametrize("shape", [(16, 16), (24, 20), (40, 64)])
def test_preprocessing_is_the_processors(shape: tuple[int, int], clip: str, captioner: Captioner) -> None:
    from transformers import CLIPImageProcessorPil

    smooth = np.linspace(0, 255, 4 * np.prod(shape) * 3).reshape(4, *shape, 3).astype(np.uint8)
    for processor in (CLIPImageProcessorPil.from_pretrained(clip), captioner.image_processor):
        expected = processor(list(smooth), return_tensors="pt")["pixel_values"]
        found = preprocessed(processor, pixels(smooth))
        rounding = 0 if shape == (16, 16) else 2.5 / 255 / min(processor.image_std)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=rounding + 1e-5)


def test_a_processor_of_another_kind_is_refused(captioner: Captioner) -> None:
    class Odd:
        size = {"longest_edge": 9}  # noqa: RUF012

    with pytest.raises(ValueError, match="neither a shortest_edge nor a height and a width"):
        preprocessed(Odd(), pixels(REAL))


def test_gradients_follow_the_score_of_clip_and_its_head(clip: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file({"layers.0.weight": torch.randn(1, 12), "layers.0.bias": torch.ones(1)}, tmp_path / "head.safetensors")
    head = {"model": clip, "head": str(tmp_path / "head.safetensors")}
    for name, given in (("clip_score", {"model": clip}), ("aesthetic", head)):
        options = parse_options(name, given)
        function = load_reward(name, options)
        scores = function(REAL, PROMPTS[:3] * 2, None)  # first without gradients, as its texts are kept
        pleased = options.differentiable(function, None)
        assert pleased is not None
        x = pixels(REAL).requires_grad_(True)
        values = pleased(x, PROMPTS[:3] * 2)
        np.testing.assert_allclose(values.detach().numpy(), scores, atol=1e-5)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        step = 1e-2 * gradient[:1] / gradient[:1].norm()
        with torch.no_grad():
            apart = (pleased(x[:1] + step, PROMPTS[:1]) - pleased(x[:1] - step, PROMPTS[:1])).item() / 2
        assert apart == pytest.approx(1e-2 * gradient[0].norm().item(), rel=0.05)


def test_vqa_tells_its_logarithm(tmp_path: Path) -> None:
    path = str(build_tiny_vqa(tmp_path))
    options = parse_options("blip_vqa", {"model": path, "question": "a {prompt}", "answer": "red"})
    function = load_reward("blip_vqa", options)
    pleased = options.differentiable(function, None)
    assert pleased is not None
    asked = [PROMPTS[n % 3] for n in range(len(REAL))]
    x = pixels(REAL).requires_grad_(True)
    np.testing.assert_allclose(pleased(x, asked).exp().detach().numpy(), function(REAL, asked, None), rtol=1e-3)
    assert torch.autograd.grad(pleased(x, asked).sum(), x)[0].abs().sum() > 0


def test_captioners_log_probability_is_its_own_loss(captioner: Captioner) -> None:
    said = captioner.log_probability()
    assert said is not None
    texts = ["a red zero", *ASKED[1:]]  # of other lengths
    found = said(pixels(REAL), texts)
    for number, text in enumerate(texts):
        tokens = captioner.tokenizer(text, return_tensors="pt")["input_ids"]  # [CLS] … [SEP]
        with torch.no_grad():
            seen = captioner.pixels(REAL[number : number + 1])
            loss = captioner.model(pixel_values=seen, input_ids=tokens, labels=tokens).loss
        assert found[number].item() == pytest.approx(-loss.item() * (tokens.shape[1] - 1), abs=1e-3)
    captions = captioner.caption(REAL)
    others = [ASKED[(n + 1) % len(ASKED)] for n in range(len(ASKED))]
    assert (said(pixels(REAL), captions) > said(pixels(REAL), others)).all()


def test_what_has_no_gradient_says_so(captioner: Captioner, tmp_path: Path) -> None:
    for name in ("jpeg_compressibility", "strict", "tests.rewards:redness"):
        options = parse_options(name, {}).resolved(name)
        assert options.differentiable(load_reward(name, options), captioner) is None
    cosine = parse_options("sentence_cosine", {})
    assert cosine.differentiable(load_reward("sentence_cosine", cosine), None) is None
    blip2 = Captioner(CaptionerSettings(path=str(build_tiny_blip2(tmp_path))))
    assert blip2.log_probability() is None


class Green:
    """One's own reward, with a method that torch can differentiate."""

    def __call__(self, images: np.ndarray, prompts: Any, captions: Any) -> np.ndarray:
        return (images[..., 1].astype(float) - images[..., 0]).mean(axis=(1, 2)) / 255

    def differentiable(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return (images[:, 1] - images[:, 0]).mean(dim=(1, 2))


def test_ones_own_reward_may_have_a_gradient() -> None:
    own = auditor("tests.test_inverting:Green", {})
    images = own.find(ASKED, Space((3, 16, 16)), QUICK, 0)
    assert own.scores(images, ASKED).min() > 0.9
    own.sign = -1.0
    assert own.scores(own.find(ASKED, Space((3, 16, 16)), QUICK, 0), ASKED).min() > 0.9


# The maths


def test_total_variation_by_hand() -> None:
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 0] = 3.0
    assert total_variation(image).item() == pytest.approx(3 + 3 + 3 + 0, abs=1e-3)
    flat = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    assert torch.autograd.grad(total_variation(flat).sum(), flat)[0].isfinite().all()


def test_views_are_of_their_image_and_stay_within_their_bounds() -> None:
    images = torch.rand(3, 3, 16, 16)
    still = InvertingSettings(views=2, shift=0, scale=(1.0, 1.0), colour=0, noise=0)
    views = seen_anew(images, still, torch.Generator().manual_seed(0))
    assert torch.allclose(views, images.repeat(2, 1, 1, 1), atol=1e-5)
    dot = torch.zeros(1, 1, 16, 16)
    dot[..., 7:9, 7:9] = 1.0
    views = seen_anew(
        dot, InvertingSettings(views=200, scale=(1.0, 1.0), colour=0, noise=0), torch.Generator().manual_seed(0)
    )
    middles = (views.sum(dim=2) * torch.arange(16.0)).sum(dim=2) / views.sum(dim=(2, 3))
    assert 2.6 < (middles - 7.5).abs().max() < 3.01
    scaled = InvertingSettings(views=200, shift=0, colour=0, noise=0)
    sizes = seen_anew(dot, scaled, torch.Generator().manual_seed(0)).sum(dim=(1, 2, 3))
    assert sizes.min() < 4 * 0.8 < 4 * 1.2 < sizes.max()


def test_gradients_are_bounded_image_by_image() -> None:
    gradient = torch.stack([torch.full((3, 2, 2), 10.0), torch.full((3, 2, 2), 1e-3)])
    found = bounded(gradient, 1.0)
    assert found[0].norm().item() == pytest.approx(1.0)
    assert torch.equal(found[1], gradient[1])


def test_evolution_finds_the_top_of_a_hill_within_its_queries() -> None:
    asked = 0
    tops = np.stack([np.full(20, 3.0), np.linspace(-2, 2, 20)])

    def score(points: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += points.shape[1]
        return -((points - tops[:, None]) ** 2).sum(axis=-1)

    found = evolve(score, np.zeros((2, 20)), 2000, np.random.default_rng(0))
    assert asked <= 2000
    assert np.abs(found - tops).max() < 0.1


@pytest.mark.parametrize(
    ("fooled", "of", "said"), [(24, 24, "easily fooled"), (0, 24, "not fooled by this search"), (9, 24, "undecided")]
)
def test_verdict_has_an_exact_interval(fooled: int, of: int, said: str) -> None:
    found, low, high = verdict(np.arange(of) < fooled)
    assert found == said
    assert low <= fooled / of <= high
    if fooled == 0:
        assert high == pytest.approx(1 - 0.025 ** (1 / of))


# Searches


def test_gradients_fool_the_captioner_and_an_image_is_its_own(captioner: Captioner) -> None:
    cosine = auditor("sentence_cosine", {}, captioner)
    assert cosine.pleased is not None
    space = Space((3, 16, 16))
    images = cosine.find(ASKED, space, QUICK, 0)
    assert cosine.scores(images, ASKED).mean() > 0.99
    assert np.array_equal(images, cosine.find(ASKED, space, QUICK, 0))
    alone = cosine.find(ASKED[:1], space, QUICK, 0)
    assert np.abs(alone[0].astype(int) - images[0]).max() <= 2
    assert not np.array_equal(images, cosine.find(ASKED, space, QUICK, 1))
    found = cosine.audit(images, ASKED, 0).found
    assert found["rank"].mean() > 0.9
    assert found["fooled"].mean() > 0.5
    true = cosine.audit(REAL, ASKED, 0)
    assert true.seen["full"].all()
    assert not true.found["fooled"].any()


def test_queries_alone_shrink_a_jpeg() -> None:
    jpeg, space = auditor("jpeg_compressibility", {}), latents_of("models/digits/pipeline", "cpu")
    assert jpeg.pleased is None
    few, many = (jpeg.find(ASKED[:2], space, InvertingSettings(queries=queries), 0) for queries in (40, 400))
    assert (jpeg.scores(many, ASKED[:2]) > jpeg.scores(few, ASKED[:2])).all()


def test_latents_are_searched_through_the_decoder() -> None:
    green, space = auditor("tests.test_inverting:Green", {}), latents_of("models/digits/pipeline", "cpu")
    start = green.find(ASKED[:2], space, InvertingSettings(steps=1, learning_rate=1e-6), 0)
    found = green.find(ASKED[:2], space, InvertingSettings(steps=10, views=2), 0)
    assert (green.scores(found, ASKED[:2]) > green.scores(start, ASKED[:2]) + 0.02).all()


def test_fooled_is_as_good_as_every_real_image_and_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = auditor("jpeg_compressibility", {})
    real, found = np.array([[1.0] * 16, [1.0] * 16, [0.5] * 8 + [2.0] * 8]), np.array([1.0, 1.5, 1.0])
    monkeypatch.setattr(jpeg, "scores", lambda images, prompts: real.ravel() if len(images) == 48 else found)
    blank = np.zeros((3, 16, 16, 3), np.uint8)
    numbers = jpeg.audit(np.stack([blank[0], REAL[1], blank[2]]), ASKED[:3], 0).found
    assert numbers["fooled"].tolist() == [True, False, False]
    assert numbers["rank"].tolist() == [1, 1, 0.5]
    assert numbers["gap"].tolist() == [1, 0, 0.5]
    assert numbers["real"].tolist() == [1, 1, 1.25]


# The command


def digits(**reward: Any) -> DdpoConfig:
    return DdpoConfig.model_validate({"reward": reward})


def test_audit_of_a_configuration(clip: str, tmp_path: Path) -> None:
    functions = {"sentence_cosine": 1.0, "clip_score": 1.0, "jpeg_compressibility": -1.0}
    config = digits(function=functions, options={"clip_score": {"model": clip}})
    told: list[str] = []
    settings = InvertingSettings(steps=30, queries=20)
    found = audit(config, [], 12, settings, None, tmp_path / "pictures", told.append)
    assert told[0] == "sentence_cosine: gradients, pixels, 30 steps, no views"
    assert told[1].startswith("sentence_cosine: easily fooled; fooled by ")
    assert told[2::2] == [
        "clip_score: gradients, pixels, 30 steps, no views",
        "jpeg_compressibility: not differentiable, so queries alone: latents, 20 an image, 240 in all",
    ]
    assert list(found) == list(functions)
    assert found["sentence_cosine"][1] == "easily fooled"
    assert found["jpeg_compressibility"][0]["score"] > 0  # what it is to raise is the size
    assert all((tmp_path / "pictures" / f"{name}.png").stat().st_size > 10_000 for name in functions)
    assert render(found).row_count == 3


def test_what_cannot_be_audited_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="'clip' is no reward function of this configuration, which has sentence_cos"):
        audit(digits(), ["clip"], 4, QUICK, None, tmp_path, print)
    blind = DdpoConfig.model_validate({"evaluation": {"evaluator": None}})
    with pytest.raises(ConfigError, match="needs a judge that is not the reward"):
        audit(blind, [], 4, QUICK, None, tmp_path, print)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name another directory"):
        audit(digits(), [], 4, QUICK, None, tmp_path / "file", print)
    assert command(["reward", "audit", "strict", "seed=1"], monkeypatch) == 2
    assert "'strict' is no reward function" in capsys.readouterr().err


# The study


def test_study_asks_others_of_the_same_images() -> None:
    study = Invert(images=6)
    study.preflight()
    plain, others = study.tasks("plain", 0), study.tasks("others", 0)
    assert [each.label.split(",")[0] for each in plain] == ["captioner", "CLIP", "clip"]
    assert plain[1].key == others[1].key
    assert plain[0].parameters | {"asked_as": "others"} == others[0].parameters
    views, smooth = (study.tasks(arm, 0)[0].parameters["settings"] for arm in ("views", "smooth"))
    assert views == smooth | {"views": 8}
    assert study.tasks("latents", 0)[0].parameters["path"]
    assert {each.arm for each in study.claimed()} == set(study.arms)
    assert len(Invert(clip=None).claimed()) < len(study.claimed())
    assert {each.arm for each in Invert(arms=("views",)).claimed()} == {"views"}


def test_tasks_repeat_and_the_control_differs(clip: str) -> None:
    job = {"key": "captioner", "reward": "sentence_cosine", "options": {}, "captioner": "models/digits/captioner"}
    job |= {"evaluator": "models/digits/evaluator", "path": None, "settings": QUICK.model_dump(), "asked_as": "own"}
    job |= {"seed": 0, "prompts": ASKED}
    files = audit_reward(job, [], "cpu")
    assert files == audit_reward(job, [], "cpu")
    others = audit_reward({**job, "asked_as": "others"}, [], "cpu")
    found, others = (json.loads(each["metrics.json"]) for each in (files, others))
    assert found["captioner/over"] > -0.05 > others["captioner/over"]
    assert 0 <= found["evaluator/captioner/full"] <= found["evaluator/captioner/digit"] <= 1
    assert files["images/captioner.png"].startswith(b"\x89PNG")
    made = learn_clip({"seed": 0, "steps": 2}, [], "cpu")
    job |= {"key": "clip", "reward": "clip_score", "captioner": None}
    numbers = json.loads(audit_reward(job, [made], "cpu")["metrics.json"])
    assert numbers["clip/score"] <= 1
    assert made == learn_clip({"seed": 0, "steps": 2}, [], "cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"captioner": None, "clip": None}, "name one at least"),
        ({"path": "models/digits/captioner"}, "model_index.json"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
        ({"clip": "models/nowhere"}, "clip: there is no directory 'models/nowhere'"),
        ({"inverting": {"views": 0}}, "leave it out of arms"),
        ({"images": 500}, "holds 180 prompts, fewer than 500"),
        ({"prompts": "configs/prompts/simple_animals.txt", "images": 4}, "names no digit"),
    ],
)
def test_what_cannot_be_inverted_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Invert(**changes).preflight()
    assert "\n" not in str(caught.value)
