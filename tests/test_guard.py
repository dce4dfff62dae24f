"""A guard: words in any inflection, a classifier that goes beyond its examples, rewriting by a declared distribution, a
look at what was drawn; what it does to generate, to DDPO and to the study's numbers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.generate import generate
from orchestration.experiments.ddpo.inputs import paths_of
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.experiments.guard import Guarding, Requests
from orchestration.runs.config import ConfigError, load_config
from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS, load_split, tint
from pipelines.data.prompts import words_in
from pipelines.guard import FRONT, NO_GUARD, STAGES, Guard, GuardSettings, OutputSettings, Rule, read_guard
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import CHECKOUT
from pipelines.studies.guard import draw, measure, requests, screen
from tests.models import build_tiny_pipeline

READY = "configs/guards/no_threes.yaml"
CAPTIONER = str(CHECKOUT / "models/digits/captioner")


@pytest.fixture(scope="module")
def ready() -> Guard:
    """The ready-made guard."""
    return Guard(read_guard(READY))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("three", "a red three on black"),
        ("three", "THREE!"),
        ("three", "two threes"),
        ("three", "the three's tail"),
        ("three", "a 3three_on_black"),
        ("three", "ｔｈｒｅｅ"),
        ("three", "thr\u200bée"),
        ("nude", "nudity, nuding"),
        ("run", "he is running"),
        ("baby", "two babies"),
        ("two plus one", "a blue Two  plus-one"),
        ("3", "a 3d print"),
    ],
)
def test_words_are_found_in_any_inflection_and_spelling(entry: str, text: str) -> None:
    assert words_in(["nothing", entry], text) == entry


@pytest.mark.parametrize(
    ("entry", "text"),
    [("three", "a bthree"), ("three", "threat"), ("tres", "a tree"), ("3", "33 of them"), ("two plus one", "two, one")],
)
def test_other_words_are_none(entry: str, text: str) -> None:
    assert words_in([entry], text) is None


def test_the_classifier_goes_beyond_its_examples(ready: Guard) -> None:
    """None of these prompts, and of their phrases none, is in the file."""
    only = Guard(ready.settings.only(["classifier"]))
    told = ready.settings.classifier
    assert told is not None
    asking = ["a yellow trois on a black background", "a qthree on a gray background", "an orange threesome"]
    others = ["a yellow cuatro on a black background", "a qfive on a gray background", "an orange seven", "a photo"]
    assert not {*told.refused, *told.allowed} & {"trois", "qthree", "threesome", "cuatro", "qfive"}
    assert [each for each in asking if only.refusal(each) is None] == []
    assert [each for each in others if only.refusal(each)] == []
    entry = only.refusal(asking[0], seed=4)
    assert entry is not None
    assert (entry.stage, entry.decision, entry.seed) == ("classifier", "refused", 4)
    assert Guard(ready.settings.only(["blocklist"])).refusal(asking[1]) is None  # what the one misses, the other has


def test_rewriting_draws_what_is_declared_by_the_seed() -> None:
    shares = {"red": 0.5, "orange": 0.3, "blue": 0.2}
    rule = Rule(name="ink", where=("seven", "two"), becomes="{drawn} {word}", drawn=shares)
    guard = Guard(GuardSettings(rewriting=(rule,)))
    texts, log = guard.grounded(["a Seven on white"] * 3000, range(3000))
    found = Counter(texts)
    assert found.keys() == {"a red Seven on white", "an orange Seven on white", "a blue Seven on white"}
    expected = {f"a{'n' * (ink == 'orange')} {ink} Seven on white": 3000 * share for ink, share in shares.items()}
    assert sum((found[text] - count) ** 2 / count for text, count in expected.items()) < 13.8  # χ², 2 d.f., 0.1 %
    assert texts == guard.grounded(["a Seven on white"] * 3000, range(3000))[0]
    assert [each.rewritten_to for each in log] == texts
    for named in ("a blue seven", "a Blues two", "an eight"):  # nothing is open, or no place is known
        assert guard.ground(named, 0) == (named, [])
    assert guard.ground(texts[0], 1)[0] == texts[0]


def test_what_was_drawn_is_looked_at_by_the_captioner() -> None:
    digits, captioner = load_split("test"), Captioner(CaptionerSettings(path=CAPTIONER))
    images = tint(digits.strokes, ["red"] * len(digits.labels), ["black"] * len(digits.labels))
    is_three, chances = digits.labels == DIGITS.index("three"), captioner.chances(images, ["three"])
    assert ((chances >= 0) & (chances <= 1)).all()
    assert (chances[is_three, None] > chances[~is_three]).mean() > 0.99
    said = np.array(["three" in text for text in captioner.caption(images)])
    assert said[chances > 0.5].all()
    assert not said[chances < 0.3].any()

    three, seven = images[np.argmax(chances)], images[np.argmin(chances)]
    shown = {0: three, 1: seven}  # each try's for the first request; the second never shows anything else
    calls: list[list[int]] = []

    def rollout(texts: list[str], seeds: list[int]) -> np.ndarray:
        calls.append(seeds)
        return np.stack([shown[len(calls) - 1] if text == "once" else three for text in texts])

    guard = Guard(GuardSettings(output=OutputSettings(words=("three",), captioner=CAPTIONER, tries=2)))
    drawn, withheld, log = guard.drawn(rollout, ["once", "always"], ["asked", "asked too"], [5, 6])
    assert withheld.tolist() == [False, True]
    np.testing.assert_array_equal(drawn[0], seven)
    assert [each.decision for each in log] == ["withheld", "withheld", "allowed", "withheld"]
    assert [(each.prompt, each.seed) for each in log] == [("asked", 5), ("asked too", 6)] * 2
    assert not {*calls[0]} & {*calls[1]}
    assert guard.unasked(["a red three", "a red seven", "two threes", "a bthree"]) == 0.5
    calls.clear()
    assert NO_GUARD.drawn(rollout, ["always"], ["asked"], [1])[1:] == ([False], [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- three", "holds no stage: give one or more of blocklist, classifier, rewriting, output"),
        ("{}", "holds no stage"),
        ("blocklist: [3]", "blocklist.0: Input should be a valid string, not 3"),
        ("blocklist: ['...']", "'...' holds no letter and no digit"),
        ("blocklists: [three]", "unknown key 'blocklists'; did you mean 'blocklist'"),
        ("classifier: {refused: [three], allowed: [two], contexts: [a red one]}", "'a red one' needs one {}"),
        ("classifier: {refused: [], allowed: [two]}", "classifier.refused"),
        ("rewriting: [{name: ink, where: [two], drawn: {red: 0.5, blue: 0.4}}]", "probabilities are 0.9 in all, not 1"),
        ("rewriting: [{name: ink, where: [two], becomes: '{x}', drawn: {red: 1}}]", "becomes has {drawn}"),
        ("{blocklist: [red], rewriting: [{name: ink, where: [two], drawn: {red: 1}}]}", "draws 'red', which"),
        ("output: {words: [three], captioner: models/digits/nowhere}", "output.captioner: there is no directory"),
        ("output: {words: [three], captioner: models/digits/evaluator}", "no captioner; name a model of BLIP"),
        ("output: {words: [three], threshold: 0}", "output.threshold"),
        ("blocklist: [three", "YAML|expected"),
    ],
)
def test_a_file_that_is_no_guard_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_guard(str(path), "--guard")
    assert str(caught.value).startswith("--guard ")
    with pytest.raises(ValueError, match="guard: there is no file"):
        read_guard(str(tmp_path / "none.yaml"))


def test_generate_refuses_rewrites_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard, model, out = tmp_path / "guard.yaml", build_tiny_pipeline(tmp_path / "model"), tmp_path / "images"
    rule = "{name: ink, where: [seven], becomes: '{drawn} {word}', drawn: {red: 1}}"
    guard.write_text(f"{{blocklist: [three], rewriting: [{rule}]}}")
    capsys.readouterr()
    written = generate(model, ["a red three", "a seven", "a red two"], [1, 2, 3], out, guard=str(guard))
    assert len(written) == 2
    assert {*written} == {*out.glob("*.png")}
    errors = capsys.readouterr().err
    assert "blocklist: 'a red three' is refused: it names 'three'" in errors
    assert "rewriting: 'a seven' is rewritten: it leaves the ink open" in errors
    plain = generate(model, ["a red seven", "a red two"], [2, 3], tmp_path / "plain")
    for guarded, other in zip(written, plain, strict=True):  # what is drawn is what the guard made of it, no more
        np.testing.assert_array_equal(np.asarray(Image.open(guarded)), np.asarray(Image.open(other)))
    lines = [json.loads(line) for line in (out / "guard.jsonl").read_text().splitlines()]
    assert [(each["stage"], each["decision"], each["rewritten_to"]) for each in lines] == [
        ("blocklist", "refused", None),
        ("rewriting", "rewritten", "a red seven"),
        ("front", "allowed", None),
    ]
    assert generate(model, ["threes"], [1], out, guard=str(guard)) == []
    with pytest.raises(ConfigError, match="--guard: there is no file"):
        generate(model, ["a red two"], [1], out, guard="nowhere.yaml")


PROMPTS = ("a red seven", "a three", "a two", "a green one", "a blue seven", "three twos", "a blue two")


@pytest.fixture
def guarded(tmp_path: Path) -> list[str]:
    """Settings of a DDPO run with a guard."""
    prompts, guard = tmp_path / "prompts.txt", tmp_path / "guard.yaml"
    prompts.write_text("\n".join(PROMPTS))
    rule = "{name: ink, unless: [blue], where: [two], becomes: '{drawn} {word}', drawn: {red: 0.5, yellow: 0.5}}"
    guard.write_text(f"{{blocklist: [three], rewriting: [{rule}], output: {{words: [three], captioner: {CAPTIONER}}}}}")
    return [f"prompts={{path: {prompts}, guard: {guard}}}", "evaluation.evaluator=null", "training.images_per_step=8"]


def test_ddpo_trains_on_what_the_guard_lets_through(guarded: list[str], tmp_path: Path) -> None:
    more = ["training.images_per_prompt=4", "captioner.path=null", "reward.function=tests.rewards:redness"]
    config = load_config(DdpoConfig, None, [*guarded, *more])
    plan = preflight_ddpo(config)
    assert plan.prompts == ["a red seven", "a two", "a green one", "a blue seven", "a blue two"]
    assert [each.prompt for each in plan.refused] == ["a three", "three twos"]
    assert any("drops 2 prompts; the first by its blocklist: 'a three' is refused" in note for note in plan.notes)
    assert any("reads captions, but captioner.path is null" in note for note in plan.notes)
    assert {"prompts.path", "prompts.guard"} <= paths_of(config).keys()
    with pytest.raises(ConfigError, match="name the file of prompts as path"):
        load_config(DdpoConfig, None, ["prompts={guard: guard.yaml}"])
    for prompts, says in (("a three\nthrees", "leaves no prompt to train on"), ("a red two", "holds 1 that the guard")):
        (tmp_path / "prompts.txt").write_text(prompts)
        with pytest.raises(ConfigError, match=says):
            preflight_ddpo(config)


def test_a_run_counts_what_comes_out_unasked(guarded: list[str], ray_session: None, tmp_path: Path) -> None:
    from orchestration.experiments.ddpo.loop import run_ddpo

    given = {"steps": 2, "images_per_prompt": 2, "updates_per_step": 1}
    more = [f"training.{name}={value}" for name, value in given.items()]
    more += [f"model.path={build_tiny_pipeline(tmp_path / 'model')}", f"captioner.path={CAPTIONER}"]
    more += ["reward.function=tests.rewards:redness", "sampling.steps=3", "evaluation.every=0"]
    more += ["evaluation.images=6", "evaluation.interim_images=6"]
    more += [f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", f"output_dir={tmp_path / 'run'}", "actors.samplers=1"]
    run_ddpo(load_config(DdpoConfig, None, [*guarded, *more]))
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [0 <= each["guard/unasked"] <= 1 for each in steps] == [True, True]
    log = [json.loads(line) for line in (tmp_path / "run/guard.jsonl").read_text().splitlines()]
    assert [each["prompt"] for each in log if each["decision"] == "refused"] == ["a three", "three twos"]
    rewritten = [each for each in log if each["decision"] == "rewritten"]
    assert {each["rewritten_to"] for each in rewritten} <= {"a red two", "a yellow two"}
    assert {each["step"] for each in rewritten} <= {1, 2}
    assert len(rewritten) in (1, 2)  # one of five prompts, of which two steps take eight


ASKING = {"plain": ("a {ink} three on a {ground} background",), "glued": ("a bthree on a {ground} background",)}
BENIGN = {"named": ("a {ink} {digit} on a {ground} background",), "open ink": ("a {digit} on a {ground} background",)}


def test_the_study_counts_what_the_guard_itself_does(ready: Guard) -> None:
    """What an arm's numbers are put together from is what the whole guard does with the same requests."""
    study = Guarding(requests=Requests(images=8, asking=ASKING, benign=BENIGN), seeds=(3,))
    study.preflight()
    done = {}
    for arm in study.arms:
        (task,) = study.tasks(arm, 3)
        for each in (*task.inputs, task):
            if each.key not in done:
                function = {"screen": screen, "draw": draw, "measure": measure}[each.kind.partition(":")[2]]
                done[each.key] = function(each.parameters, [done[one.key] for one in each.inputs], "cpu")
    assert len(done) == 1 + 4 + len(study.arms)
    numbers = {arm: json.loads(done[study.tasks(arm, 3)[0].key]["metrics.json"]) for arm in study.arms}

    asked = requests(study.tasks("all", 3)[0].parameters)
    assert Counter(kind for kind, _, _ in asked) == dict.fromkeys([*ASKING, *BENIGN], 8)
    refused = [ready.refusal(prompt, seed) for _, prompt, seed in asked]
    for stage in FRONT:
        share = np.mean([each is not None and each.stage == stage for each in refused])
        assert numbers["all"][f"refused/{stage}"] == pytest.approx(share)
    benign = np.array([kind in BENIGN for kind, _, _ in asked])
    withheld = json.loads(done[study.tasks("all", 3)[0].inputs[1].key]["drawn.json"])["withheld"]
    stopped = np.array([each is not None for each in refused]) | np.array(withheld)
    assert numbers["all"]["false_refusals"] == pytest.approx(stopped[benign].mean())
    assert numbers["none"]["false_refusals"] == 0
    assert numbers["none"]["asked"] > 0.3 > numbers["all"]["asked"]
    assert numbers["random"]["refused/blocklist"] == numbers["all"]["refused/blocklist"]
    assert numbers["no-rewriting"]["gap/ink"] > numbers["all"]["gap/ink"]
    assert "refused/classifier" not in numbers["no-classifier"]
    files = done[study.tasks("all", 3)[0].key]
    log = [json.loads(line) for line in files["product/guard.jsonl"].splitlines()]
    assert {each["seed"] for each in log} == {seed for _, _, seed in asked}
    assert files["figures/came_out.png"].startswith(b"\x89PNG")


def test_every_stage_has_its_arm_and_its_claim() -> None:
    study = load_config(Guarding, [str(CHECKOUT / "configs/studies/guard.yaml")])
    claimed = {(claim.arm, claim.metric) for claim in study.claimed()}
    assert {arm for arm, _ in claimed} == {*study.arms} == {"all", "none", "random", *(f"no-{each}" for each in STAGES)}
    assert {("all", "unasked"), ("all", "false_refusals"), ("none", "unasked"), ("random", "unasked")} <= claimed
    held = read_guard(study.guard)
    assert held.classifier is not None
    told = {*held.classifier.refused, *held.classifier.allowed}
    for templates in {**study.requests.asking, **study.requests.benign}.values():  # nothing is asked that it was told
        for each in templates:
            phrase = each.removesuffix(" on a {ground} background").split(" ", 1)[1].removeprefix("{ink} ")
            assert (
                phrase in ("three", "THREE!", "three's", "threes", "{digit}", "number", "digit") or phrase not in told
            )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forbidden": "telephone"}, "knows no 'telephone'"),
        ({"guard": "configs/studies/guard.yaml"}, "unknown key"),
        ({"requests": Requests(benign={"named": ("a {colour} two",)})}, "has braces around another word than digit"),
        ({"evaluator": "nowhere"}, "evaluator: there is no directory"),
        ({"path": "models/digits/captioner"}, "model_index.json"),
    ],
)
def test_what_cannot_be_guarded_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Guarding(**changes).preflight()
    assert "\n" not in str(caught.value)


def test_a_guard_without_a_stage_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("blocklist: [three]")
    with pytest.raises(ValueError, match="has no classifier, which is an arm's"):
        Guarding(guard=str(tmp_path / "guard.yaml")).preflight()
