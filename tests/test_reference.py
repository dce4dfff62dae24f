"""The reference of settings: every key of every part has a type, a default and a meaning; so has the page."""

import json
from importlib.metadata import EntryPoint

import pytest
from pydantic import Field

from orchestration.experiments import reference
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.experiments.study.config import STUDIES
from orchestration.runs.config import load_config
from pipelines.generators import GENERATORS
from pipelines.refinements import REFINEMENTS
from pipelines.rewards import REWARDS
from pipelines.storage.locations import CHECKOUT
from policies.loops.rules import RULES
from policies.rl.settings import Settings, known_keys
from tests.test_config import command

PARTS = reference.parts()


def test_every_part_is_there_under_one_name() -> None:
    everything = [
        *EXPERIMENTS,
        *STUDIES,
        *REWARDS.built_in,
        *RULES.built_in,
        *GENERATORS.built_in,
        *REFINEMENTS.built_in,
    ]
    assert [*PARTS] == everything
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", PARTS)
def test_every_setting_has_a_meaning(name: str) -> None:
    known = reference.reference(name)
    assert len(known["meaning"]) > 10
    for row in known["settings"]:
        assert row["meaning"], f"{name}: {row['key']} has no description"
        assert row["type"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_key_of_an_experiment_is_there(name: str) -> None:
    rows = {row["key"] for row in reference.reference(name)["settings"]}
    assert rows >= known_keys(EXPERIMENTS[name].schema).keys()


@pytest.mark.parametrize(("name", "given"), [("ddpo", []), ("mad", ["n_synthetic=10", "n_ini=10"]), ("study", [])])
def test_defaults_are_those_that_a_run_takes(name: str, given: list[str]) -> None:
    """Each default, written as it is shown, leaves the configuration as it was."""
    rows = reference.reference("erase" if name == "study" else name)["settings"]
    set_here = {row["key"]: reference.default_of(row) for row in rows if row["type"] != "block" and not row["required"]}
    words = [f"{key}={default}" for key, default in set_here.items() if "[]" not in key]
    schema, given = EXPERIMENTS[name].schema, [*given, *(["study=erase"] if name == "study" else [])]
    assert len(words) > 20
    assert load_config(schema, None, [*words, *given]) == load_config(schema, None, given)


def test_a_row_says_what_the_type_says() -> None:
    class Inner(Settings):
        """A block.

        More of it.
        """

        rate: float = Field(0.5, gt=0, lt=1, description="of something")

    class Outer(Settings):
        inner: Inner = Inner(rate=0.25)
        several: tuple[Inner, ...] = Field((), description="some")
        count: int | None = Field(ge=2, description="how many")

    types = Outer.model_json_schema()
    rows = {row["key"]: row for row in reference.settings_of(types, types["$defs"])}
    assert [*rows] == ["inner", "inner.rate", "several", "several[].rate", "count"]
    assert (rows["inner"]["type"], rows["inner"]["meaning"]) == ("block", "A block.")
    assert (rows["inner.rate"]["type"], rows["inner.rate"]["default"]) == ("number > 0 and < 1", 0.25)
    assert (rows["several"]["type"], rows["several[].rate"]["default"]) == ("list of block", 0.5)
    assert (rows["count"]["type"], rows["count"]["required"]) == ("whole number ≥ 2 or null", True)


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["ddpo", "training.steps"], {"training.steps"}),
        (
            ["ddpo", "sampling"],
            {"sampling", *(f"sampling.{name}" for name in ("method", "steps", "eta", "guidance_scale", "cache"))},
        ),
        (["sentence_cosine"], {f"reward.options.sentence_cosine.{key}" for key in ("model", "template")}),
        (["sentence_cosine", "model"], {"reward.options.sentence_cosine.model"}),
        (["mad", "fresh_fraction"], {f"fresh_fraction{end}" for end in ("", ".first", ".last")}),
        (["verified"], {"candidates", "acceptance"}),
        (["accumulate"], set()),
        (["gan", "width"], {"gan.width"}),
        (["mad", "gan.width"], {"gan.width"}),
        (["erase", "concepts[].word"], {"concepts[].word"}),
    ],
)
def test_the_command_prints_a_part_a_block_or_a_key(
    words: list[str], keys: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["config", *words, "--json"], monkeypatch) == 0
    assert {row["key"] for row in json.loads(capsys.readouterr().out)["settings"]} == keys
    assert command(["config", *words], monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(f"\n{key} " in text for key in keys)


def test_what_others_bring_is_shown_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, reward = "pipelines.generators.gan:GanGenerator", "pipelines.rewards.text:CosineOptions"
    monkeypatch.setitem(vars(GENERATORS), "installed", {"theirs": EntryPoint("theirs", path, GENERATORS.group)})
    assert command(["config", "--json"], monkeypatch) == 0
    assert {"name": "theirs", "kind": "installed", "meaning": path} in json.loads(capsys.readouterr().out)
    for name, key in (("theirs", "theirs.width"), (path, f"{path}.width"), (reward, f"reward.options.{reward}.model")):
        assert command(["config", name, "--json"], monkeypatch) == 0
        assert key in {row["key"] for row in json.loads(capsys.readouterr().out)["settings"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ddpo", "training.step"], "did you mean 'training.steps'"),
        (["ddpo", "learning_rat"], "did you mean 'training.learning_rate'"),
        (["ddpo", "zzz"], "see 'ouroboros config'"),
        (["dpo"], "did you mean 'ddpo'"),
        (["training.step"], "did you mean 'ddpo training.steps'"),
        (["sentence_cosin"], "did you mean 'sentence_cosine'"),
        (["tests.schemas:nothing"], "module 'tests.schemas' has no 'nothing'"),
        (["tests.rewards:redness"], "its options are what it takes by name: (images"),
    ],
)
def test_a_mistyped_name_gets_the_nearest(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["config", *words], monkeypatch) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""


def test_the_page_is_what_the_types_say() -> None:
    held = (CHECKOUT / "docs/settings.md").read_text(encoding="utf-8")
    assert held == reference.page(), "settings have changed: ouroboros config --markdown > docs/settings.md"


def test_the_overview(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["config", "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == [*PARTS]
    assert {each["kind"] for each in found} == {"experiment", "study", "reward", "rule", "generator", "refinement"}
