"""The shipped default models: they load in stock classes, read and draw digits, and stay small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pipelines.data.digits import SLOTS, all_prompts, load_split, render
from pipelines.default_models.models import draw_images
from pipelines.default_models.pretrain import model_card
from pipelines.measures.evaluator import Evaluator, load_evaluator
from pipelines.measures.places import columns, squares

MODELS = Path(__file__).parent.parent / "models" / "digits"
ATTENTION = MODELS.with_name("digits-attention")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return load_evaluator(MODELS / "evaluator")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(MODELS / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def unseen_digits() -> tuple[np.ndarray, list[str]]:
    return render(load_split("test"), np.random.default_rng(11))


def draw(pipeline: Any, prompts: list[str], seed: int) -> np.ndarray:
    result = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=1.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return np.rint(result.images * 255).astype(np.uint8)


def test_evaluator_reads_test_digits(evaluator: Evaluator, unseen_digits: tuple[np.ndarray, list[str]]) -> None:
    verdict = evaluator.judge(*unseen_digits)
    assert verdict["digit"].mean() > 0.97
    assert verdict["ink"].mean() > 0.99
    assert verdict["ground"].mean() > 0.99
    assert np.array_equal(verdict["full"], verdict["digit"] & verdict["ink"] & verdict["ground"])


def test_evaluator_rejects_a_wrong_prompt(evaluator: Evaluator, unseen_digits: tuple[np.ndarray, list[str]]) -> None:
    images, _ = unseen_digits
    assert evaluator.judge(images, ["a red seven on a black background"] * len(images))["full"].mean() < 0.05


def test_a_slot_the_prompt_leaves_open_is_met_by_any_image(evaluator: Evaluator) -> None:
    images = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    verdict = evaluator.judge(images, ["something on a black background", "something on a white background"])
    assert verdict["digit"].all()
    assert verdict["ink"].all()
    assert verdict["full"].tolist() == [True, False]


def test_evaluator_refuses_what_it_cannot_judge(evaluator: Evaluator) -> None:
    image = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"\(1, 32, 32, 3\)"):
        evaluator.slots(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        evaluator.slots(image.astype(np.float32))


def test_captioner_writes_exact_captions_of_test_digits(unseen_digits: tuple[np.ndarray, list[str]]) -> None:
    from transformers import BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    images, captions = unseen_digits
    model = BlipForConditionalGeneration.from_pretrained(MODELS / "captioner", use_safetensors=True).eval()
    processor = BlipProcessor.from_pretrained(
        MODELS / "captioner", image_processor=BlipImageProcessorPil.from_pretrained(MODELS / "captioner")
    )
    inputs = processor(images=list(images), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    written = processor.batch_decode(tokens, skip_special_tokens=True)
    assert np.mean([text == truth for text, truth in zip(written, captions, strict=True)]) > 0.93


def test_stock_pipeline_draws_the_same_image_for_the_same_seed(pipeline: Any) -> None:
    prompts = ["a red seven on a black background", "an orange two on a white background"]
    images = draw(pipeline, prompts, seed=5)
    assert images.shape == (2, 16, 16, 3)
    assert np.array_equal(images, draw(pipeline, prompts, seed=5))
    assert not np.array_equal(images, draw(pipeline, prompts, seed=6))


def test_base_gets_colours_right_and_leaves_room_for_the_digit(pipeline: Any, evaluator: Evaluator) -> None:
    prompts = all_prompts() * 2
    verdict = evaluator.judge(draw(pipeline, prompts, seed=0), prompts)
    assert verdict["ink"].mean() > 0.9
    assert verdict["ground"].mean() > 0.9
    assert 0.45 < verdict["full"].mean() < 0.67


def test_tokenizer_keeps_captions_whole(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(all_prompts()).input_ids
    assert max(map(len, tokens)) <= tokenizer.model_max_length
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == all_prompts()


def test_models_are_small_and_safe(pipeline: Any) -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert pipeline.safety_checker is None


def test_the_second_pipeline_draws_what_it_is_asked_for_on_both_canvases(evaluator: Evaluator) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(ATTENTION / "pipeline", use_safetensors=True)
    prompts = all_prompts()[::2]
    for width, least in ((16, 0.9), (32, 0.7)):
        drawn = draw_images(pipeline, prompts, seed=1, guidance_scale=1.0, width=width)
        assert drawn.shape == (len(prompts), 16, width, 3)
        places = columns(drawn)
        verdict = evaluator.judge(squares(drawn, places), prompts)
        assert verdict["full"].mean() > least
        assert np.ptp(places) > 8 or width == 16  # a digit stands anywhere
    seen = {each.shape[1] for each in _attended(pipeline)}
    assert max(seen) == 64  # places that look at the words


def _attended(pipeline: Any) -> list[torch.Tensor]:
    """What goes into each cross-attention of one call."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        for name, module in pipeline.unet.named_modules()
        if name.endswith("attn2")
    ]
    draw_images(pipeline, ["a red two on a black background"], 0, 1.0)
    for hook in hooks:
        hook.remove()
    return found


def test_both_pipelines_are_small_enough_to_ship() -> None:
    both = [path for place in (MODELS, ATTENTION) for path in place.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in both) <= 12e6
    measured = json.loads((ATTENTION / "measurements.json").read_text())
    assert (ATTENTION / "README.md").read_text() == model_card(measured)
    chosen = {name: each["full"] for name, each in measured["pipeline"]["chosen"].items()}
    assert min(chosen["square_guidance_1"], chosen["square_guidance_2"], chosen["wide_guidance_2"]) > 0.95
    assert chosen["wide_guidance_1"] > 0.8


def test_card_is_what_the_measurements_say() -> None:
    measurements = json.loads((MODELS / "measurements.json").read_text())
    assert (MODELS / "README.md").read_text() == model_card(measurements)
    chosen = measurements["pipeline"]["chosen"]["guidance_1"]
    assert 0.50 <= chosen["full"] <= 0.62
    assert all(0 <= chosen[slot] <= 1 for slot in SLOTS)
