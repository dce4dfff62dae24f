"""Images of one's own prompts: a file for each, whatever the prompt, and an error where there is no image."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from orchestration.experiments.ddpo.generate import generate, image_name
from orchestration.runs.config import ConfigError
from policies.rl.health import DegenerateBatch
from tests.models import PROMPTS, build_tiny_pipeline

TEXT = st.text(st.characters(codec="utf-8"), max_size=80)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT, st.integers(0, 2**63 - 1))
def test_names_are_of_one_prompt_alone(one: str, other: str, seed: int) -> None:
    names = image_name(one, seed), image_name(other, seed)
    assert (names[0].casefold() == names[1].casefold()) == (one == other)
    for name in names:
        assert len(name.encode()) <= 255
        assert Path(name).name == name
        assert not name.startswith(("-", "."))


def test_names_that_people_know_stay() -> None:
    assert image_name("a red seven", 3) == "a-red-seven-3.png"
    long = "a very long prompt about one and the same thing in the same words"
    alike = ["a cat", "A cat", "a-cat", "a  cat", "a/cat", "a cat 3", "", " ", "..", "猫" * 90]
    alike += [f"{long} 1", f"{long} 2"]
    assert len({image_name(prompt, seed).casefold() for prompt in alike for seed in (0, 30)}) == 2 * len(alike)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**40])
def test_a_seed_out_of_range_is_refused_before_anything_is_loaded(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--seed .* is out of range"):
        generate(tmp_path / "nowhere", ["a cat"], [seed], tmp_path)


def test_every_prompt_and_seed_has_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_tiny_pipeline(tmp_path / "model")
    prompts = ["", PROMPTS[0], f"{PROMPTS[0]} on a white background", PROMPTS[0]]
    capsys.readouterr()  # of the libraries, while they built it
    written = generate(model, prompts, [1, 1, 1, 1], tmp_path / "images")
    assert len(written) == 4
    assert set(written) == set((tmp_path / "images").iterdir())
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [line for line in warnings if line.startswith("warning: ")]
    assert f"'{PROMPTS[0]} on a white background': 'background' is left out" in warnings[0]
    with pytest.raises(ConfigError, match="cannot be written"):
        generate(model, prompts[:1], [1], model / "model_index.json")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(weights)
    save_file({**held, "conv_in.bias": held["conv_in.bias"] * np.float32("nan")}, weights)
    with pytest.raises(DegenerateBatch, match="is NaN or infinite after 1 of 10 denoising steps"):
        generate(model, prompts[:1], [2], tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 3
