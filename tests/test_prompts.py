"""Files of prompts are read as they look in an editor, and what a model does not see of them is said."""

import shutil
from pathlib import Path

import pytest

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.runs.config import load_config
from pipelines.data.prompts import read_prompts, unseen_words
from pipelines.denoisers import inspect
from pipelines.storage.locations import CHECKOUT
from tests.models import build_tiny_pixels, build_tiny_sd3, build_tiny_xl

LONG = "a red seven on a black background on a black background on a black background on a white background"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf# a comment\nred\n", (["red"], [])),
        (b"\xef\xbb\xbf[unseen]\nred\n", None),
        (b"red\r\nblue\r\n[unseen]\r\ngreen", (["red", "blue"], ["green"])),
        (b"red\n[Unseen]\ngreen\n", (["red"], ["green"])),
        (b"red\rblue\r", (["red", "blue"], [])),
        ("ein Käfer\n日本\n👩‍🎨 at work\n".encode(), (["ein Käfer", "日本", "👩‍🎨 at work"], [])),
        (b"  # indented\n\tred \n", (["red"], [])),
    ],
)
def test_a_file_is_read_as_it_looks(
    content: bytes, expected: tuple[list[str], list[str]] | None, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    if expected is None:
        with pytest.raises(ValueError, match="holds no prompt to train on"):
            read_prompts(str(path))
    else:
        assert read_prompts(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("red\nblue".encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("red\nblue".encode("utf-32"), "is UTF-16 or UTF-32 text"),
        ("red\nblue".encode("utf-16-le"), r"line 1 of .* U\+0000"),
        ("red\nKäfer".encode("latin-1"), "line 2 of .* is not UTF-8"),
        (b"red\nblue\x00green\n", r"line 2 of .* U\+0000"),
        ("red\nblue\u2028green".encode(), r"line 2 of .* U\+2028"),
        (b"red\x0bblue", r"line 1 of .* U\+000B"),
        ("red\x85blue".encode(), r"line 1 of .* U\+0085"),
        ("red\n\ufeffblue".encode(), r"line 2 of .* U\+FEFF"),
    ],
)
def test_what_is_no_plain_text_is_refused_with_its_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read_prompts(str(path))


def test_a_plan_says_what_the_model_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{LONG}\na blue two on a white background\nA  Blue TWO on a white background\n", encoding="utf-8")
    options = [f"prompts={path}", "training.images_per_step=24", "evaluation.evaluator=null"]
    config = load_config(DdpoConfig, CHECKOUT / "configs/ddpo/digits.yaml", options)
    printed = describe_ddpo(config, preflight_ddpo(config))
    assert (
        f"warning: tokenizer reads 14 of the 19 tokens of prompt 1, '{LONG}': 'background on a white background' is"
        in printed
    )
    assert "warning: prompts 2 and 3 are one to the model, which reads the same of 'a blue two" in printed
    assert printed.count("warning") == 2


def test_several_text_encoders_are_asked(tmp_path: Path) -> None:
    """Prompts are one to the model only if they are to all of its text encoders."""
    xl, sd3 = inspect(build_tiny_xl(tmp_path / "xl")), inspect(build_tiny_sd3(tmp_path / "sd3"))
    prompts = [LONG, LONG.replace("white", "gray")]
    for files in (xl, sd3):
        cut = unseen_words(prompts, files)
        assert [line.split()[0] for line in cut] == ["tokenizer", "tokenizer", "tokenizer_2", "tokenizer_2", "prompts"]
    config = xl.directory / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace(": 12", ": 40"), encoding="utf-8")
    assert len(unseen_words(prompts, xl)) == 2
    shutil.rmtree(xl.directory / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        unseen_words(prompts, xl)
    assert unseen_words(prompts, inspect(build_tiny_pixels(tmp_path / "pixels"))) == []
