"""Ready-made prompts and configurations, how files are put together, and the plan of memory that a dry run prints."""

import re
from itertools import product
from pathlib import Path

import pytest

from orchestration.cluster.ray_cluster import imagine_machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.runs.config import ConfigError, load_config
from pipelines.data.prompts import read_prompts
from pipelines.storage.locations import CHECKOUT
from tests.test_config import command

CONFIGS = CHECKOUT / "configs"
TASKS, SCALES, RECIPES = (
    {path.stem: path for path in sorted((CONFIGS / kind).glob("*.yaml"))} for kind in ("ddpo", "scale", "recipes")
)


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("simple_animals", 45, ["cat", "kangaroo"]),
        ("animal_activities", 45 * 3, ["an ant washing the dishes"]),
        ("imagenet_animals", 398, ["tench", "puffer", "three-toed sloth"]),  # classes 0, 397 and one between them
        ("counting", 45 * 8, ["two mice", "nine butterflies", "six sheep"]),
        ("digits", 10 * 6 * 3, ["an orange two on a gray background"]),
    ],
)
def test_prompt_sets_are_whole(name: str, count: int, some: list[str]) -> None:
    prompts, _ = read_prompts(f"configs/prompts/{name}.txt")  # refuses duplicates
    assert len(prompts) == count
    assert set(some) <= set(prompts)


def test_sets_of_one_paper_have_the_same_animals() -> None:
    animals, activities, numbers = (
        read_prompts(f"configs/prompts/{name}.txt")[0] for name in ("simple_animals", "animal_activities", "counting")
    )
    riding = [text.split(" ", 1)[1].removesuffix(" riding a bike") for text in activities if "riding" in text]
    assert riding == animals
    assert len({text.split(" ", 1)[1] for text in numbers}) == len(animals)


@pytest.mark.parametrize(
    ("task", "scale", "recipe"),
    [  # a recipe brings a model that is not for digits
        each for each in product(TASKS, SCALES, [None, *RECIPES]) if not (each[0].startswith("digits") and each[2])
    ],
)
def test_every_combination_can_be_planned(
    task: str, scale: str, recipe: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # as where it will run
    files = [TASKS[task], SCALES[scale], *([RECIPES[recipe]] if recipe else [])]
    config = load_config(DdpoConfig, files)
    gpus = int(scale.split("-")[0])
    text = describe_ddpo(config, preflight_ddpo(config, imagine_machine(gpus)))
    assert not re.search(r"(sampler|learner|captioner) on \w+: 0 GB", text)  # every model is known
    cards = {words: int(n) for n, words in re.findall(r"(\d+) × GPU with (.*):", text)}
    assert sum(cards.values()) == gpus
    placed = sum(n * sum(map(int, re.findall(r"\d+", words))) for words, n in cards.items())
    actors = config.actors
    assert placed == actors.samplers + actors.learners + actors.replicas.get("captioner", 1) * (
        config.captioner.path is not None
    )
    assert not any(re.search(r"([2-9]|\d\d) learner", words) for words in cards)  # NCCL wants a card for each


def test_of_several_files_the_later_wins_key_by_key(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 3\nmodel: &same {lora_rank: 4, dtype: bfloat16}\ncaptioner: {path: null}\n")
    second.write_text("model: {lora_rank: 8}\ncaptioner: null\n")
    merged = load_config(DdpoConfig, [first, TASKS["digits"]], ["seed=5"])
    assert (merged.seed, merged.model.lora_rank, merged.model.dtype) == (5, 4, "bfloat16")
    assert merged.model.path == "models/digits/pipeline"
    assert merged.captioner.path == "models/digits/captioner"
    with pytest.raises(ConfigError, match="captioner"):
        load_config(DdpoConfig, [first, second])
    with pytest.raises(ConfigError, match=r"third\.yaml cannot be read"):
        load_config(DdpoConfig, [first, tmp_path / "third.yaml"])


def test_files_are_given_one_after_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--config", str(TASKS["digits"]), "--config", str(SCALES["1-gpu"])]
    assert command(["ddpo", *files, "--dry-run", "--gpus", "2", "actors.replicas.captioner=3"], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "samplers: 1\n" in printed
    assert "3 × captioner" in printed
    assert "GPU with" in printed
    assert command(["ddpo", *files, "--gpus", "2"], monkeypatch) == 0  # no run takes GPUs that are not there
    assert "GPU with" in capsys.readouterr().out
