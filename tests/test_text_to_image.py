"""A text-to-image model in the self-consuming loop: what it learns and draws, what is read beside its images, and how
they are selected."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from orchestration.experiments.mad.config import ArmSettings, MadConfig
from orchestration.experiments.mad.loop import chain
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.data.digits import all_prompts, captioned, real_images
from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.generators.text_to_image import TextToImageGenerator, TextToImageSettings
from pipelines.mad.captions import load_captioner, recaptioned, refit
from pipelines.mad.drawing import draw
from pipelines.mad.graph import image_source
from pipelines.mad.tasks import measure_words, perform, read_samples, real_data_files
from pipelines.scoring import agreement
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.tasks import in_order
from policies.common.seeding import derive_seed
from policies.loops.samples import Samples
from tests.models import PROMPTS, WORDS

SHARES = {PROMPTS[0]: 3, PROMPTS[1]: 2, PROMPTS[2]: 1}


@pytest.fixture(scope="module")
def settings(tiny_pipeline: Path, tiny_captioner: Path) -> TextToImageSettings:
    about: dict[str, Any] = {"path": str(tiny_pipeline), "captioner": str(tiny_captioner), "evaluator": None}
    return TextToImageSettings(**about, training_steps=2, batch_size=4, sampling_steps=3)


@pytest.fixture(scope="module")
def data() -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 16, 16, 3), dtype=np.uint8)
    return Samples(images, captions=np.array([each for each, count in SHARES.items() for _ in range(count)])[None])


@pytest.fixture(scope="module")
def model(settings: TextToImageSettings, data: Samples) -> TextToImageGenerator:
    return TextToImageGenerator.fit(settings, data, [0])


def test_it_learns_what_words_mean() -> None:
    """From new weights on the default models' autoencoder and text encoder; the judge took no part."""
    images, _, captions = captioned(1)
    grounds = np.array([" ".join(caption.split()[-2:]) for caption in captions])[:600]
    settings = TextToImageSettings(training_steps=60, batch_size=32, sampling_steps=8)
    model = TextToImageGenerator.fit(settings, Samples(images[None, :600], captions=grounds[None]), [0])
    asked = "black background", "white background"
    corners = [model.draw([words] * 24, 1)[:, 0, :3].astype(float).mean() for words in asked]
    assert corners[0] < 90
    assert corners[1] > 165


def test_equal_seeds_give_equal_models_and_images(
    settings: TextToImageSettings, data: Samples, model: TextToImageGenerator
) -> None:
    before = torch.get_rng_state()
    again, other = (TextToImageGenerator.fit(settings, data, [seed]) for seed in (0, 1))
    assert packed(again.save) == packed(model.save) != packed(other.save)
    assert np.array_equal(again.sample(5, [3], 0.5).values, model.sample(5, [3], 0.5).values)
    assert not np.array_equal(model.sample(5, [4], 0.5).values, model.sample(5, [3], 0.5).values)
    loaded = unpacked(packed(model.save), TextToImageGenerator.load)
    assert np.array_equal(loaded.sample(5, [3], 1.0).values, model.sample(5, [3], 1.0).values)
    on, anew = (TextToImageGenerator.fit(settings, data, [0], start=start) for start in (other, None))
    assert packed(on.save) != packed(anew.save) == packed(model.save)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_that_are_given_are_begun_with(settings: TextToImageSettings, data: Samples) -> None:
    given = settings.model_copy(update={"from_scratch": False, "learning_rate": 1e-12, "training_steps": 1})
    model = TextToImageGenerator.fit(given, data, [0])
    stock = StableDiffusionPipeline.from_pretrained(settings.path, safety_checker=None)
    for name, value in stock.unet.named_parameters():
        torch.testing.assert_close(model.fitted()[name], value.detach(), rtol=0, atol=1e-9)


def test_it_asks_for_what_its_training_set_showed(model: TextToImageGenerator, data: Samples) -> None:
    assert model.captions == pytest.approx({prompt: count / 6 for prompt, count in SHARES.items()})
    for count in (6, 30, 60):
        drawn = model.sample(count, [7], 1.0)
        assert drawn.values.shape == (1, count, 16, 16, 3)
        assert drawn.values.dtype == np.uint8
        asked = drawn.captions[0].tolist()
        assert all(abs(asked.count(prompt) - each * count / 6) <= 2 for prompt, each in SHARES.items())
    weighted = replace(data, weights=np.array([1.0, 1, 1, 3, 3, 12]))
    assert TextToImageGenerator.fit(model.settings, weighted, [0]).captions[PROMPTS[2]] == pytest.approx(12 / 21)


@pytest.mark.parametrize("bias", [1.0, 0.25])
def test_the_stock_pipeline_draws_it_and_a_bias_is_guidance(model: TextToImageGenerator, bias: float) -> None:
    stock = StableDiffusionPipeline.from_pretrained(model.settings.path, safety_checker=None)
    stock.unet.load_state_dict(model.fitted())
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(11)
    shown = stock([*PROMPTS], generator=random, num_inference_steps=3, guidance_scale=1 / bias, output_type="pt").images
    expected = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(model.draw(PROMPTS, 11, 1 / bias), expected)


def test_lora_is_all_that_is_kept(settings: TextToImageSettings, data: Samples, model: TextToImageGenerator) -> None:
    adapted = settings.model_copy(update={"lora_rank": 2, "from_scratch": False})
    small = TextToImageGenerator.fit(adapted, data, [0])
    files, whole = packed(small.save), packed(model.save)
    assert sum(map(len, files.values())) < sum(map(len, whole.values())) / 3
    assert all("lora" in name for name in small.fitted())
    loaded = unpacked(files, TextToImageGenerator.load)
    assert np.array_equal(loaded.draw(PROMPTS, 1), small.draw(PROMPTS, 1))
    base = TextToImageGenerator(adapted, small.captions)
    assert not np.array_equal(base.draw(PROMPTS, 1), small.draw(PROMPTS, 1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_captions_are_a_share_of_the_captioners_words(model: TextToImageGenerator, share: float) -> None:
    drawn = model.sample(40, [1], 1.0)
    captioner = load_captioner(model.settings.captioner, None, "cpu")
    read = recaptioned(drawn, share, captioner, 5)
    seen, prompts, captions = read.notes["seen"][0], read.notes["prompt"][0], read.captions[0]
    assert captioner.caption(drawn.values[0]) == seen.tolist()
    assert np.array_equal(prompts, drawn.captions[0])
    assert all(word in WORDS for word in prompts[0].split())
    differ = seen != prompts
    assert differ.sum() > 30
    assert abs(int((captions == seen)[differ].sum()) - share * differ.sum()) < 8
    assert bool(((captions == seen) | (captions == prompts)).all())
    assert int((captions != prompts).sum()) <= round(share * 40)


def test_a_captioner_is_trained_on_what_it_is_fed(settings: TextToImageSettings, data: Samples, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "again", "on")]
    for place in places:
        place.mkdir()
    how = data, 30, 3, "cpu"
    refit(settings.captioner, None, *how, places[0])
    refit(settings.captioner, None, *how, places[1])
    refit(settings.captioner, places[0], *how, places[2])
    content = [(place / "captioner.safetensors").read_bytes() for place in places]
    assert content[0] == content[1] != content[2]

    def loss(place: Path | None) -> float:
        captioner = load_captioner(settings.captioner, place, "cpu")
        ids = captioner.tokenizer(data.captions[0].tolist(), return_tensors="pt", padding=True).input_ids
        with torch.no_grad():
            given = {"pixel_values": captioner.pixels(data.values[0]), "input_ids": ids, "labels": ids}
            return float(captioner.model(**given).loss)

    assert loss(places[2]) < loss(places[0]) < loss(None)


def test_candidates_of_a_prompt_are_told_apart_by_their_reward(model: TextToImageGenerator) -> None:
    selection = {"rule": "curated", "candidates": 3, "reward": "tests.rewards:redness"}

    def scorer(drawn: Samples) -> np.ndarray:
        return 50 * (drawn.values[0, ..., 0].astype(float) - drawn.values[0, ..., 1]).mean(axis=(1, 2)) / 255

    kept = draw(model, 12, [2], 1, 1.0, selection, scorer=scorer)
    plain = model.candidates(12, 3, [derive_seed(2, "sampling", 1, 0)], 1.0)
    assert kept.captions[0].tolist() == plain.captions[0].tolist()[:12]  # each sample's own prompt, whichever was kept
    rewards = scorer(plain).reshape(3, 12)
    np.testing.assert_allclose(kept.notes["candidates"][0], np.sort(rewards, axis=0).T)
    assert all(value in own for value, own in zip(kept.notes["reward"][0], kept.notes["candidates"][0], strict=True))
    assert kept.notes["reward"].mean() > rewards.mean() + rewards.std() / 2


def test_measures_of_words() -> None:
    prompts = all_prompts()[::6]
    images = real_images(prompts, np.random.default_rng(0))
    known = TextToImageSettings()
    found = measure_words(images, prompts, known, {"function": "tests.rewards:redness", "options": {}}, "cpu")
    other = measure_words(images, prompts[::-1], known, None, "cpu")
    assert found["prompt_accuracy"] > 0.9 > 0.2 > other["prompt_accuracy"]
    assert found["caption_agreement"] > 0.95 > other["caption_agreement"]
    assert found["reward"] == pytest.approx((images[..., 0].astype(float) - images[..., 1]).mean() / 255)
    assert "reward" not in other
    assert agreement(["a red two"], ["A red two"]) == 1
    assert agreement(["a a a"], ["a red two"]) == pytest.approx(1 / 3)
    assert agreement(["one"], ["two"]) == 0
    assert measure_words(images, prompts, TextToImageSettings(captioner=None, evaluator=None), None, "cpu") == {}


def done(tasks: Any, given: dict[str, Files]) -> dict[str, Files]:
    """The results of tasks and all that they depend on."""
    results = dict(given)
    for task in in_order(tasks):
        if task.key not in results:
            inputs = [results[each.key] for each in task.inputs]
            results[task.key] = perform(task.kind, task.parameters, inputs, "cpu")
    return results


def test_features_may_be_cached_where_it_draws(settings: TextToImageSettings) -> None:
    """Of every step they change no bit; of every third little. The stock forward is there again afterwards."""
    drawn = {}
    for cache in (None, (1, 1), (3, 0)):
        how = settings.model_copy(update={"sampling_steps": (7, *cache) if cache else 7})
        generator = TextToImageGenerator(how, {"a red one": 0.5, "a blue two": 0.5})
        drawn[cache] = generator.draw(["a red one", "a blue two"] * 3, 0, 2.0).astype(float)
        assert "forward" not in vars(generator.family.network)
    np.testing.assert_array_equal(drawn[1, 1], drawn[None])
    apart = np.abs(drawn[3, 0] - drawn[None]).mean()
    assert 0 < apart < np.abs(drawn[None] - drawn[None][::-1]).mean() / 2


def test_an_arm_passes_its_words_on(settings: TextToImageSettings, tmp_path: Path) -> None:
    """What the second generation reads is what the first one's images were captioned with, refitted captioner and
    all; and measures say what the loop is led by."""
    real = load_real_data(DataSettings(source="captioned_digits", limit=60))
    pool, reference = np.arange(30), np.arange(30, 60)
    source = image_source(real.sha256, 30, 30, 10)
    arm = ArmSettings(  # type: ignore[call-arg]
        family="text_to_image",
        rule="curated",
        candidates=2,
        reward="tests.rewards:redness",
        n_ini=12,
        n_real=4,
        n_synthetic=8,
        text_to_image=settings,
        captions={"share": 0.5, "refitted": 2},
    )
    assert arm.rewarded is not None
    words = {
        "captions": arm.captions.model_dump(),
        "reward": {"function": arm.reward, "options": {}},
        "read": {"path": "a"},
    }
    first, second = chain("arm", arm, [0], 2, source, words)
    files = {source.data.key: real_data_files(real, pool, reference)}
    results = done([second.fit, first.measure], files)
    drawn = read_samples(results[first.drawn[0].task.key])
    read = json.loads(results[second.fit.key]["config.json"])["captions"]
    own = json.loads(results[second.fit.key]["training_set.json"])
    fresh = real.captions[np.array(own[0]["ids"])].tolist()
    assert set(read) == {*fresh, *drawn.captions[0].tolist()}
    rows = unpacked(results[first.drawn[0].task.key], rows_of)
    assert set(rows["caption"]) == set(drawn.captions[0].tolist())
    assert len(rows["candidates"][0]) == 2
    assert [*map(len, (rows["prompt"], rows["seen"], rows["reward"]))] == [8, 8, 8]
    assert all(rows["caption"][row] in (rows["prompt"][row], rows["seen"][row]) for row in range(8))
    metrics = json.loads(results[first.measure.key]["metrics.json"])["metrics"]
    assert {"fid", "class_entropy", "caption_agreement", "reward"} <= metrics.keys()
    assert "prompt_accuracy" not in metrics  # no evaluator is named
    refitted = [task for task in in_order([second.fit]) if task.kind == "captioner"]
    assert len(refitted) == 1
    other = chain("arm", arm, [0], 2, source, words | {"read": {"path": "b"}})
    assert next(other).fit.key != first.fit.key  # another model lies at the same place


def rows_of(directory: Path) -> Any:
    from datasets import Dataset

    return Dataset.load_from_disk(directory).with_format("python")[:]


def test_real_images_bring_their_captions(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    rows = {"image": list(images), "words": [f"image {number % 7}" for number in range(30)]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "words": Value("string")})).save_to_disk(
        tmp_path / "own"
    )
    known = DataSettings(source=str(tmp_path / "own"), caption_column="words")
    real = load_real_data(known)
    assert real.captions.tolist() == rows["words"]
    assert "7 captions, such as 'image 0'" in real.describe()[0]
    assert real.sha256 != load_real_data(known.model_copy(update={"caption_column": None})).sha256
    half = load_real_data(known.model_copy(update={"limit": 10}))
    for image, caption in zip(half.images, half.captions, strict=True):
        (number,) = np.flatnonzero((images == image).all(axis=(1, 2, 3)))
        assert caption == rows["words"][number]
    with np.load(io.BytesIO(real_data_files(real, np.arange(20), np.arange(20, 30))["real.npz"])) as held:
        assert held["pool_captions"].tolist() == rows["words"][:20]
    with pytest.raises(ValueError, match="caption_column: choose one of image, words, not text"):
        load_real_data(known.model_copy(update={"caption_column": "text"}))


TEXT = ["family=text_to_image", "data.source=captioned_digits", "data.reference=30", "n_ini=40", "generations=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=digits"], "learns from captions, and the images have none: name data.caption_column"),
        (["text_to_image.path=models/digits/captioner"], "model_index.json"),
        (["text_to_image.evaluator=models/digits/captoiner"], "text_to_image.evaluator: there is no directory"),
        (["text_to_image.lora_rank=4"], "set from_scratch=false"),
        (
            ["text_to_image.sampling_steps=[20,2,9]"],
            "text_to_image.sampling_steps: branch 9 of cached features",
        ),
        (["text_to_image.caption_dropout=0", "sampling_bias=0.5"], "needs text_to_image.caption_dropout above 0"),
        (["captions.share=0.5", "text_to_image.captioner=null"], "need text_to_image.captioner, whose words"),
        (["rule=curated", "n_real=0", "n_synthetic=9", "reward={strict: {ignord: a}}"], "ignored"),
        (["rule=curated", "n_real=0", "n_synthetic=9", "reward={strict: {}, no_writing: {}}"], "reward names one"),
        (["captions.refitted=5"], "trains a captioner whose words nobody reads"),
        (["refinement=aligned", "text_to_image.captioner=null"], "reads captions: name a captioner"),
        (["refinement=aligned", "aligned.reward=tests.rewards:nothing_there"], "nothing_there"),
        (["rule=curated", "n_real=0", "n_synthetic=9", "reward=sentence_cosin"], "did you mean sentence_cosine?"),
        (["rule=curated", "n_real=0", "n_synthetic=9", "reward=tests.rewards:not_a_number"], "not_a_number"),
        (["refinement=neon", "text_to_image.lora_rank=2", "text_to_image.from_scratch=false"], "LoRA's factors"),
        (["family=diffusion", "captions.share=0.5"], "captions: family diffusion learns from none"),
    ],
)
def test_impossible_loops_of_words_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight_mad(load_config(MadConfig, None, [*TEXT, *overrides]))


def test_a_loop_of_words_can_be_planned() -> None:
    more = ["rule=curated", "n_real=0", "n_synthetic=9", "reward=strict", "captions.share=0.9"]
    experiment = preflight_mad(load_config(MadConfig, None, [*TEXT, *more]))
    assert experiment.words["curated"]["reward"] == {"function": "strict", "options": {}}
    assert set(experiment.words["curated"]["read"]) == {"path", "captioner", "evaluator"}
    assert all(len(digest) == 64 for digest in experiment.words["curated"]["read"].values())
    assert set(experiment.read) == {f"text_to_image.{name}" for name in ("path", "captioner", "evaluator")}
    assert preflight_mad(load_config(MadConfig, None, ["n_ini=20"])).words == {}
