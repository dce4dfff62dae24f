"""The recipe of the default models, in a few steps: it builds every part, resumes, and repeats itself."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from orchestration.cluster.building import build_together
from pipelines import default_models as recipe
from pipelines.data.digits import all_prompts
from pipelines.default_models import models, pretrain
from pipelines.default_models.batches import DigitBatches
from pipelines.measures.places import columns, coverage, squares
from pipelines.storage.locations import CHECKOUT
from tests.processes import start


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    make_hasty(monkeypatch)


def make_hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of everything, and few images."""
    for name in ("models", "attention"):
        hows = copy.deepcopy(recipe.configuration(name)["training"])
        for how in hows.values():
            how["batch_size"] = 4
            for part in ("descent", "supervised", "loosening"):
                how.setdefault(part, {})["steps"] = 2
        for part in ("supervised", "loosening"):
            hows["pipeline"][part]["every"] = 1
        monkeypatch.setitem(recipe.configuration(name), "training", hows)
    monkeypatch.setattr(models, "asked", lambda images: all_prompts()[:2] * images)
    images, captions = models.test_set()
    monkeypatch.setattr(models, "test_set", lambda: (images[:8], captions[:8]))


def weights(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): b"".join(
            tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items())
        )
        for path in directory.rglob("*.safetensors")
    }


def test_a_place_that_cannot_be_made_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"/proc/models cannot be made .* name another directory"):
        pretrain.pretrain(Path("/proc/models"))


@pytest.mark.usefixtures("_hasty")
def test_pretrain_builds_resumes_and_repeats_itself(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.pretrain(first, seed=3, progress=lambda line: None)
    assert {path.name for path in first.iterdir()} == {
        "pipeline",
        "captioner",
        "evaluator",
        "measurements.json",
        "README.md",
    }

    texts = [path.read_text() for path in first.rglob("*") if path.suffix in {".json", ".md"}]
    assert not any(str(tmp_path) in text for text in texts)

    def fail_at_the_pipeline(line: str) -> None:
        if line.startswith("diffusion"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(second, seed=3, progress=fail_at_the_pipeline)
    assert not (second / "pipeline").exists()
    lines: list[str] = []
    pretrain.pretrain(second, seed=3, progress=lines.append)
    assert lines[:3] == ["evaluator: already there", "captioner: already there", "autoencoder: already there"]
    assert len(weights(first)) == 5
    assert weights(second) == weights(first)

    with pytest.raises(ValueError, match="begun with seed 3, not 4"):
        pretrain.pretrain(first, seed=4)


@pytest.mark.usefixtures("_hasty")
def test_the_second_recipe_builds_a_pipeline_of_two_canvases(tmp_path: Path) -> None:
    pretrain.pretrain(tmp_path / "built", progress=lambda line: None, recipe="digits-attention")
    assert {path.name for path in (tmp_path / "built").iterdir()} == {"pipeline", "measurements.json", "README.md"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "built/pipeline")
    assert models.draw_images(pipeline, ["a red seven"], 0, 1.0).shape == (1, 16, 16, 3)
    assert models.draw_images(pipeline, ["a red seven"], 0, 1.0, width=32).shape == (1, 16, 32, 3)
    measured = json.loads((tmp_path / "built/measurements.json").read_text())["pipeline"]
    assert {*measured["chosen"]} == {f"{size}_guidance_{scale}" for size in ("square", "wide") for scale in (1, 2)}
    with pytest.raises(ValueError, match="holds digits-attention, not digits: name another directory"):
        pretrain.pretrain(tmp_path / "built")
    with pytest.raises(ValueError, match="there is no recipe 'letters': choose digits or digits-attention"):
        pretrain.pretrain(tmp_path / "letters", recipe="letters")
    assert not (tmp_path / "letters").exists()


def test_a_wider_canvas_has_whole_digits_anywhere_and_the_square_is_as_it_was() -> None:
    batches, random = DigitBatches("test"), torch.Generator()
    wide, slots = batches.draw(200, random.manual_seed(1), width=32)
    square, same = batches.draw(200, random.manual_seed(1))
    assert torch.equal(slots, same)
    assert wide.shape == (200, 3, 16, 32)
    pixels = ((wide + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    centres = columns(pixels)
    assert centres.min() < 10
    assert centres.max() > 22
    assert abs(np.mean(centres) - 16) < 1
    # What stands in the square is as much ink as is drawn without moving it.
    found, whole = (coverage(each).sum(axis=(1, 2)) for each in (squares(pixels, centres), pixels))
    assert np.allclose(found, whole, rtol=0.02)
    drawn = coverage(((square + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()).sum(axis=(1, 2))
    assert np.median(np.abs(found / drawn - 1)) < 0.1


def test_places_are_those_of_the_ink() -> None:
    images = np.full((3, 16, 32, 3), 120, np.uint8)
    images[0, 4:12, 20:24] = images[1, 2:3, 0:2] = (225, 30, 35)
    assert columns(images).tolist() == [22, 1, 16]  # the last one has no ink
    assert coverage(images)[0].sum() == 32
    assert squares(images, columns(images))[:, 5, :, 0].argmax(axis=1).tolist() == [6, 0, 0]


def test_several_workers_build_what_is_not_there(tmp_path: Path) -> None:
    """A part was lost; of the rest everything is kept. (That shared trainings give the same numbers: test_group.)"""
    models = CHECKOUT / "models/digits"
    record = json.loads((models / "measurements.json").read_text())
    kept = ("captioner", "pipeline", "evaluator", "measurements.json")
    for name in kept:
        place = shutil.copytree if (models / name).is_dir() else shutil.copy2
        place(models / name, tmp_path / name)
    (tmp_path / "README.md").write_text("old")
    command = ["pretrain", f"--output={tmp_path}", f"--seed={record['seed']}", "--train-workers=2"]
    log = tmp_path.with_suffix(".log")
    assert start(command, log).wait(timeout=200) == 0, log.read_text()
    said = log.read_text()
    assert all(f"{name}: built" in said for name in ("evaluator", "captioner", "autoencoder", "pipeline"))
    assert (tmp_path / "README.md").read_text() == (models / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "README.md"}


def test_more_workers_than_processors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--train-workers is 9999, there are"):
        build_together(tmp_path, 0, 9999)
