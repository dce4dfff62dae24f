"""Rewards that look at the image, on genuine classes of random weights, against the models' own arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
)

from pipelines.rewards import RewardError, load_reward, parse_options, score
from pipelines.rewards.images import VqaOptions
from pipelines.settings import RewardSettings
from pipelines.storage.locations import check_model
from tests.models import PROMPTS, build_tiny_clip, build_tiny_vqa

IMAGES = np.random.default_rng(3).integers(0, 256, size=(24, 20, 20, 3), dtype=np.uint8)
ASKED = [PROMPTS[i % 3] for i in range(24)]
QUESTIONS = {
    PROMPTS[0]: [("one red?", "red seven"), ("background?", "black")],
    PROMPTS[1]: [("a gray two", "two")],
    PROMPTS[2]: [("one", "nine"), ("a", "nine"), ("blue", "a blue nine")],
}


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_vqa(tmp_path_factory.mktemp("vqa")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_clip(tmp_path_factory.mktemp("clip")))


def reward_scores(
    name: str, given: dict[str, Any], images: np.ndarray = IMAGES, asked: list[str] = ASKED
) -> np.ndarray:
    return score(load_reward(name, parse_options(name, given)), images, asked, None)


def answer_probability(path: str, image: np.ndarray, question: str, answer: str) -> float:
    """From the model's own loss, the mean of −log p over the tokens of the answer and its end."""
    model, tokenizer = BlipForQuestionAnswering.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    pixels = BlipImageProcessorPil.from_pretrained(path)([image], return_tensors="pt")["pixel_values"]
    ids = [5, *tokenizer.convert_tokens_to_ids(answer.split()), tokenizer.sep_token_id]  # 5 is [DEC]
    with torch.no_grad():
        loss = model(pixel_values=pixels, **tokenizer(question, return_tensors="pt"), labels=torch.tensor([ids])).loss
    return float(np.exp(-loss.item() * (len(ids) - 1)))


def test_vqa_is_the_probability_of_the_answer(vqa: str) -> None:
    scores = reward_scores("blip_vqa", {"model": vqa, "question": "a {prompt}", "answer": "red seven"})
    expected = [answer_probability(vqa, i, f"a {p}", "red seven") for i, p in zip(IMAGES, ASKED, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert scores.max() > 1.5 * scores.min() > 0


def test_all_answers_of_a_token_add_up_to_one(vqa: str) -> None:
    """Σ over answers of one token, of p(answer, end), is at most 1: no probability is counted twice."""
    words = ("red", "seven", "black", "one")
    single = [reward_scores("blip_vqa", {"model": vqa, "answer": word}) for word in words]
    assert (np.sum(single, axis=0) < 1).all()
    assert all((scores > 0).all() for scores in single)


def test_vqa_averages_over_the_questions_of_a_prompt(vqa: str, tmp_path: Path) -> None:
    lines = []
    for prompt, pairs in QUESTIONS.items():
        lines += [f"{prompt}:", *(f"  - {{question: '{question}', answer: {answer}}}" for question, answer in pairs)]
    (tmp_path / "questions.yaml").write_text("\n".join(lines))
    given = {"model": vqa, "questions": str(tmp_path / "questions.yaml")}
    expected = [
        np.mean([answer_probability(vqa, image, *pair) for pair in QUESTIONS[prompt]])
        for image, prompt in zip(IMAGES, ASKED, strict=True)
    ]
    np.testing.assert_allclose(reward_scores("blip_vqa", given), expected, rtol=1e-4)
    with pytest.raises(RewardError, match=r"questions.yaml holds no question for the prompt 'a cat'"):
        reward_scores("blip_vqa", given, asked=["a cat"] * 24)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat: []", r"a cat.*at least 1 item"),
        ("a cat: yes", "not a mapping of prompts"),
        ("a cat: [{question: is it}]", r"answer Field required"),
        ("- {question: is it, answer: yes}", "not a mapping of prompts"),
        ("a cat: [", "not a mapping of prompts"),
    ],
)
def test_a_file_that_holds_no_questions(text: str, message: str, tmp_path: Path, vqa: str) -> None:
    (tmp_path / "questions.yaml").write_text(text)
    options = parse_options("blip_vqa", {"model": vqa, "questions": str(tmp_path / "questions.yaml")})
    with pytest.raises(ValueError, match=message):
        options.check(["a cat"])


def test_an_answer_in_yaml_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "questions.yaml").write_text("a cat: [{question: is it, answer: yes}, {question: how many, answer: 1}]")
    options = VqaOptions(model="any", questions=str(tmp_path / "questions.yaml"))
    assert options.asked("a cat") == [("is it", "yes"), ("how many", "1")]
    with pytest.raises(ValueError, match="no question for the prompt 'a dog'"):
        options.check(["a cat", "a dog"])


def image_embedding(path: str, image: np.ndarray) -> np.ndarray:
    pixels = CLIPImageProcessorPil.from_pretrained(path)([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vector = CLIPModel.from_pretrained(path).eval().get_image_features(pixel_values=pixels).pooler_output[0]
    return vector.double().numpy() / np.linalg.norm(vector.double().numpy())


def test_clip_score_is_the_cosine_of_the_embeddings(clip: str) -> None:
    scores = reward_scores("clip_score", {"model": clip, "template": "one {prompt}"})
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    expected = []
    for image, prompt in zip(IMAGES, ASKED, strict=True):
        with torch.no_grad():
            text = model.get_text_features(**tokenizer(f"one {prompt}", return_tensors="pt")).pooler_output[0].double()
        expected.append(image_embedding(clip, image) @ (text / text.norm()).numpy())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.ptp(scores) > 0.05
    assert np.ptp(reward_scores("clip_score", {"model": clip}, IMAGES[:3], ASKED[:3])) > 1e-3


def test_a_prompt_longer_than_clip_reads_is_cut_off(clip: str) -> None:
    long = "red " * 9
    scores = reward_scores("clip_score", {"model": clip}, IMAGES[:2], [f"{long}one two three", f"{long}one"])
    assert np.isfinite(scores).all()


def test_aesthetic_applies_the_linear_layers_in_order(clip: str, tmp_path: Path) -> None:
    """Layers 0, 2 and 10: their numbers are compared as numbers, and there is nothing between them."""
    generator = np.random.default_rng(5)
    layers, widths = {}, (12, 7, 7, 1)
    for number, into, out in zip((0, 2, 10), widths[:-1], widths[1:], strict=True):
        layers[number] = generator.normal(size=(out, into)), generator.normal(size=out)
    head = {f"layers.{n}.weight": torch.tensor(w, dtype=torch.float32) for n, (w, _) in layers.items()}
    head |= {f"layers.{n}.bias": torch.tensor(b, dtype=torch.float32) for n, (_, b) in layers.items()}
    save_file(head, tmp_path / "head.safetensors")
    expected = []
    for image in IMAGES:
        value = image_embedding(clip, image)
        for weight, bias in layers.values():
            value = weight @ value + bias
        expected.append(value[0])
    given = {"model": clip, "head": str(tmp_path / "head.safetensors")}
    scores = reward_scores("aesthetic", given)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(scores) > 0.5


@pytest.mark.parametrize("shapes", [[], [(1, 11)], [(5, 12)], [(5, 12), (1, 4)], [(2, 12)]])
def test_a_head_that_does_not_fit(clip: str, tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    head = {f"layers.{n}.weight": torch.zeros(shape) for n, shape in enumerate(shapes)}
    head |= {f"layers.{n}.bias": torch.zeros(shape[0]) for n, shape in enumerate(shapes)}
    save_file(head, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"do not lead from the 12 numbers of CLIP to one"):
        load_reward(
            "aesthetic", parse_options("aesthetic", {"model": clip, "head": str(tmp_path / "head.safetensors")})
        )


@pytest.mark.parametrize("name", ["blip_vqa", "clip_score", "aesthetic"])
def test_a_score_does_not_depend_on_its_batch(name: str, vqa: str, clip: str, tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(1, 12), "0.bias": torch.ones(1)}, tmp_path / "head.safetensors")
    given: dict[str, Any] = {"model": vqa if name == "blip_vqa" else clip}
    given |= {"head": str(tmp_path / "head.safetensors")} if name == "aesthetic" else {}
    together = reward_scores(name, given)
    alone = [reward_scores(name, given, IMAGES[i : i + 1], ASKED[i : i + 1])[0] for i in (0, 11, 23)]
    np.testing.assert_allclose(together[[0, 11, 23]], alone, rtol=1e-5)
    assert len(set(together.round(9))) > 12


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("clip_score", {}, "options of clip_score: model: Field required"),
        ("clip_score", {"model": None}, "model: Input should be a valid string"),
        ("aesthetic", {"model": "some/clip"}, "head: Field required"),
        ("blip_vqa", {"model": "some/vqa", "answr": "no"}, "did you mean 'answer'"),
        ("blip_vqa", {"model": "some/vqa", "answer": ""}, "answer: String should have at least 1 character"),
        ("blip_vqa", {"model": "some/vqa", "question": "is it?"}, r"question: 'is it\?' must hold {prompt}"),
        ("clip_score", {"model": "some/clip", "template": "{promt}"}, "must hold {prompt}"),
        ("sentence_cosine", {"template": "{prompt} {}"}, "must hold {prompt}"),
        ("bertscore_f1", {"template": "{prompt"}, "must hold {prompt}"),
        ("bertscore_f1", {"baseline": 1.0}, "baseline: Input should be less than 1"),
        ("bertscore_f1", {"layer": -1}, "layer: Input should be greater than or equal to 0"),
        ("strict", {"ignore": "a"}, "did you mean 'ignored'"),
    ],
)
def test_wrong_options_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(function=name, options={name: given})


def test_files_that_options_name_are_looked_for(tmp_path: Path) -> None:
    """What preflight asks of ``models``: a directory with its marker, or, without one, a file."""
    options = parse_options("aesthetic", {"model": "some/clip", "head": "heads/missing.safetensors"})
    assert options.model_paths == {"model": "some/clip", "head": "heads/missing.safetensors"}
    with pytest.raises(ValueError, match=r"head: there is no file 'heads/missing.safetensors'"):
        check_model(options.model_paths["head"], options.models["head"], "head")
    with pytest.raises(ValueError, match="there is no file"):
        check_model(str(tmp_path), "", "head")
    (tmp_path / "head.safetensors").touch()
    check_model(str(tmp_path / "head.safetensors"), "", "head")
