"""Bad input to a MAD experiment is one clear line before anything is trained; ready-made experiments are valid."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from orchestration.cli import main as cli
from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.mad.analysis import effective_samples, laws
from orchestration.experiments.mad.config import BLOCKS, REFINING, MadConfig
from orchestration.experiments.mad.preflight import contents, describe_mad, preflight_mad
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.runs.config import ConfigError, load_config
from pipelines.generators import GENERATORS
from pipelines.storage.locations import CHECKOUT
from policies.loops.rules import RULES, Rule
from policies.loops.training_sets import LedgerExhausted, training_sets
from policies.rl.settings import known_keys
from tests.test_mad_laws import measured

MACHINE = Machine(cpus=2, gpus=0)
RELABELLED = ["rule=relabelled", "n_ini=50", "n_real=0", "n_synthetic=50"]
DIFFUSION = ["family=diffusion", "rule=fully_synthetic", "n_ini=50"]
SMALL_BIAS = ["n_ini=20", "n_synthetic=20", "memory=2", "sampling_bias=1e-12"]
LARGEST = ["derive=[largest_admissible]"]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        preflight_mad(load_config(MadConfig, None, overrides), MACHINE)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rule=fuly_synthetic", "n_ini=50"],
            "rule: Input should be 'accumulate', 'accumulate_subsample'",
        ),
        (["family=gausian", "n_ini=50"], "'text_to_image' or an import path 'module:Name'"),
        (["n_ini=50", "sampling_bias=1.5"], "sampling_bias: Input should be less than or equal to 1"),
        (["n_ini=50", "sampling_bias=0"], "sampling_bias: Input should be greater than 0"),
        (["n_ini=50", "fresh_fractoin=0.1"], "unknown key 'fresh_fractoin'; did you mean 'fresh_fraction'?"),
        (["n_ini=50", "generations=0"], "generations"),
        (["n_ini=50", "seeds=0"], "a number of seeds from 1 on"),
        (["n_ini=50", "seeds=[1, 1]"], "a list of different ones"),
        (["n_ini=1"], "n_ini: Input should be greater than or equal to 2"),
        ([], "rule fully_synthetic needs n_synthetic or n_ini"),
        (["rule=fresh", "n_ini=50", "fresh_fraction=0.1", "n_synthetic=40"], "both ways"),
        (["n_ini=50", "arms.a={rule: fresh}"], "arms.a: rule fresh needs n_real and n_synthetic"),
        (
            ["n_ini=50", "arms.a={sampling_bais: 0.5}"],
            "arms.a: unknown key 'sampling_bais'; did you mean 'sampling_bias'?",
        ),
        (["n_ini=50", "arms.a={seeds: 3}"], "arms.a: unknown key 'seeds'"),
        (["n_ini=50", "arms.a={gan: null}"], "arms.a: gan: a block of keys, such as gan.width"),
        (["n_ini=50", "arms.a={gan: 3}"], "arms.a: gan: a block of keys, such as gan.width"),
        (["n_ini=50", f"seeds=[{10**40}]"], "a whole number has 64 bits at most"),
        (["n_ini=50", f"seeds=[{2**63}]"], "a whole number has 64 bits at most"),
        (["n_ini=50", "seeds=[-1]"], "different ones from 0 on"),
        (["n_ini=50", f"seeds={10**12}"], "a million at most"),
        (["n_ini=50", f"generations={10**12}"], "generations: Input should be less than or equal to 100000"),
        (["n_ini=50", "rule=accumulate", "generations=3000"], "with rule accumulate that is 9000000 batches"),
        ([f"n_ini={10**12}"], "1.0e+12 numbers: 2.7e+08 at most"),
        (["n_ini=50", "dimension=100000"], "1.0e+10 numbers: 2.7e+08 at most"),
        (["n_ini=50", "sampling_bias=1e-06", "generations=60"], "generation 5"),
        (["n_ini=2", "generations=1000"], "is too small for a number to hold"),
        (["rule=memory", "n_real=0", *SMALL_BIAS, "generations=60"], "generation 48: its variance"),
        (["rule=curated", "reward=first_coordinate", "n_real=0", *SMALL_BIAS], "is too small for a number to hold"),
        ([*DIFFUSION, "sampling_bias=0.5", "diffusion.label_dropout=0.0"], "needs diffusion.label_dropout above 0"),
        ([*DIFFUSION, "sampling_bias=1e-40"], "guidance of scale 1e+40: at most 1000"),
        ([*DIFFUSION, "diffusion.classes=9"], "diffusion.classes is 9, the images have 10"),
        (["rule=accumulate_subsample", "n_ini=20", "n_total=41"], "41 samples cannot be drawn from a pool of 40"),
        (["rule=fresh", "n_ini=120", "fresh_fraction=0.001"], "rounds to none of them real"),
        (["family=mixture", "n_ini=50", "data.reference=4"], "data.reference is 4: metrics need 20"),
        (["family=mixture", "n_ini=50", "data.reference=1000000"], "of 20000 samples at most"),
        (
            ["n_ini=50", "derive.effective_samples=true"],
            "derive.effective_samples needs family=gaussian with rule=fresh",
        ),
        (["rule=fresh", "n_ini=9", "fresh_fraction=0.0", "derive.effective_samples=true"], "1 or more) at every"),
        (
            ["rule=memory", "n_real=5", "n_synthetic=9", "derive.largest_admissible=true"],
            "derive.largest_admissible needs family=gaussian with rule=fresh, or with rule=memory and real_supply",
        ),
        (
            ["rule=fresh", "n_real=5", "n_synthetic=9", "covariance=mle", "derive.largest_admissible=true"],
            "derive.largest_admissible needs rule=fresh, covariance=unbiased",
        ),
        (
            ["rule=fresh", "n_real=5", "n_synthetic=9", "sampling_bias=0.9", *LARGEST, "dimension=51"],
            "a dimension of 50 and a sampling_bias of 0.99 at most",
        ),
        (["n_ini=50", "arms.a={gan: {stepz: 3}}", "family=gan"], "arms.a: unknown key 'gan.stepz'"),
        (["family=mixture", "n_ini=50", "modes=24"], "a square grid"),
        (["family=mixture", "n_ini=20"], "generation 1 has 20 samples for 25 modes"),
        (["rule=verified", "n_ini=50", "n_real=0", "n_synthetic=50"], "rule verified needs images"),
        (["rule=relabelled", "n_ini=50", "n_real=0", "n_synthetic=50"], "rule relabelled needs images"),
        ([*RELABELLED, "family=gan"], "rule relabelled gives samples labels, which family gan would not learn here"),
        ([*RELABELLED, "family=diffusion", "diffusion.classes=0"], "which family diffusion would not learn here"),
        ([*RELABELLED, "family=text_to_image", "data.source=captioned_digits"], "family text_to_image would not learn"),
        (["rule=curated", "n_ini=50", "n_real=0", "n_synthetic=50"], "reward confidence needs images"),
        (
            ["rule=curated", "n_ini=50", "n_real=0", "n_synthetic=50", "reward=nowhere:f"],
            "reward 'nowhere:f': module 'nowhere' cannot be imported",
        ),
        (
            ["rule=curated", "n_ini=50", "n_real=0", "n_synthetic=50", "reward=tests.rewards:one_number"],
            "reward tests.rewards:one_number must return one finite number a sample, (2,)",
        ),
        (
            ["rule=curated", "n_ini=50", "n_real=0", "n_synthetic=50", "reward=operator:add"],
            "of two real samples: reward operator:add failed: TypeError",
        ),
        ([*DIFFUSION, "data.source=/nowhere/at/all"], "/nowhere/at/all"),
        ([*DIFFUSION, "data.reference=1797"], "1797 of 1797 images leave 0 to learn from, too few to measure as many"),
        ([*DIFFUSION, "data.reference=899"], "leave 898 to learn from, too few to measure as many real images beside"),
        ([*DIFFUSION, "data.reference=899"], "beside them: give 20 to 898"),
        ([*DIFFUSION, "data.background=blueish"], "data.background: unknown color specifier: 'blueish'"),
        ([*DIFFUSION, "data.reference=5"], "data.reference is 5: metrics need 20 real samples or more"),
        (["family=diffusion", "n_ini=1401"], "1401 more real samples are needed, but 1400 of 1400 are left unseen"),
        (
            ["family=diffusion", "rule=fresh", "n_ini=700", "fresh_fraction=0.5", "generations=5"],
            "generation 4: 350 more real samples are needed, but 0 of 1400 are left unseen",
        ),
        ([*DIFFUSION, "data.image_size=9"], "family diffusion needs sides that are multiples of"),
        (["family=gan", *DIFFUSION[1:], "data.image_size=4"], "family gan needs sides of 8 pixels at least"),
        ([*DIFFUSION, "workers.cpus_per_task=64"], "workers.cpus_per_task is 64, there are 2 CPUs"),
        ([*DIFFUSION, "workers.device=cuda"], "no GPU was found"),
    ],
)
def test_impossible_experiments_are_refused(overrides: list[str], expected: str) -> None:
    assert expected in refused(*overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty grey images without labels."""
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / f"{index:02}.png")
    return tmp_path


UNLABELLED = "the metrics' extractor: trained on the former, without labels; class_entropy and label_accuracy need"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sampling_bias=0.5"], "a sampling_bias below 1 is guidance, which needs labels: set it to 1, or family=gan"),
        (["diffusion.classes=3"], "diffusion.classes is 3, the images have 0: set it to null"),
        (["data.extractor=classifier"], "data.extractor: a classifier needs labels of two classes or more: put"),
        (["data.extractor=my_model"], "data.extractor: 'my_model' is not classifier, self_supervised or a directory"),
        (["rule=verified", "n_real=5", "n_synthetic=5"], "rule verified needs images with labels, and data.extractor="),
        (["rule=relabelled", "n_real=5", "n_synthetic=5"], "rule relabelled gives samples labels, which family diffu"),
        (["rule=curated", "n_real=5", "n_synthetic=5"], "reward confidence needs images with labels"),
        (["data.reference=25"], "data.reference: 25 of 40 images leave 15 to learn from, too few to measure as many"),
        (
            [],
            "20 of 40 images leave 20 to learn from, too few to measure as many real images beside them: 41 images are",
        ),
        (["data.source={empty}"], "{empty} holds no images"),
        (["data.source={sizes}"], "images differ in size (width, height): (8, 8) and (9, 6); set data.image_size"),
    ],
)
def test_what_needs_labels_or_more_images_says_so(overrides: list[str], expected: str, folder: Path) -> None:
    places = {name: folder / "more" / name for name in ("empty", "sizes")}
    if any("{" in each for each in overrides):
        places["empty"].mkdir(parents=True)
        places["sizes"].mkdir()
        Image.new("RGBA", (9, 6), (255, 0, 0, 0)).save(places["sizes"] / "1.png")
        Image.new("1", (8, 8)).save(places["sizes"] / "2.png")
    elif overrides and "reference" not in overrides[0]:
        Image.new("L", (8, 8)).save(folder / "one_more.png")
    given = [f"data.source={folder}", "data.reference=20", "family=diffusion", "n_ini=10"]
    assert expected.format(**places) in refused(*given, *(each.format(**places) for each in overrides))


def test_images_without_labels_train_unconditional_models_and_a_sweep_knows_their_metrics(folder: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 99)).save(folder / "one_more.png")
    settings = [f"data.source={folder}", "data.reference=20", "n_ini=10", "rule=fully_synthetic"]
    for family in ("diffusion", "gan"):
        config = load_config(MadConfig, None, [*settings, f"family={family}"])
        experiment = preflight_mad(config, MACHINE)
        assert experiment.found[0] == "41 images, 8×8, RGB"
        assert UNLABELLED in experiment.found[-1]
        assert experiment.images is not None
        assert (experiment.images.classes, experiment.images.look) == (0, "self_supervised")
        metrics = EXPERIMENTS["mad"].check(config, MACHINE)
        assert metrics == ["fid", "precision", "recall", "density", "coverage", "memorisation"]
    labelled = load_config(MadConfig, None, [*DIFFUSION, "data.extractor=self_supervised"])
    assert UNLABELLED in preflight_mad(labelled, MACHINE).found[-1]


def test_one_class_is_none_and_the_plan_says_what_was_found(folder: Path) -> None:
    settings = ["family=diffusion", "n_ini=10", f"data.source={folder}", "data.reference=19"]
    for name in ("train", "car"):
        (folder / name).mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "train" / path.name)
    assert "data.reference is 19: metrics need 20" in refused(*settings)
    for number in range(3):
        Image.new("L", (8, 8), number).save(folder / "train" / f"more_{number}.png")
    settings[-1] = "data.reference=20"
    assert UNLABELLED in preflight_mad(load_config(MadConfig, None, settings), MACHINE).found[-1]
    for number in range(5):
        (folder / "train" / f"0{number}.png").rename(folder / "car" / f"train_0{number}.png")
    (folder / "notes.txt").touch()
    config = load_config(MadConfig, None, settings)
    plan = describe_mad(config, preflight_mad(config, MACHINE)).splitlines()
    assert plan[:3] == [
        "43 images, 8×8, grey, 2 classes: car 5, train 38",
        "left out, as no images: notes.txt",
        "23 of them to learn from, 20 kept apart for the metrics",
    ]


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "07.png").write_bytes(b"not an image")
    message = refused(*DIFFUSION, f"data.source={folder}", "data.reference=20")
    assert "07.png" in message


def test_a_refusal_leaves_nothing_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    arguments = ["mad", "family=diffusion", "n_ini=2000", f"output_dir={directory}"]
    monkeypatch.setattr(sys, "argv", ["ouroboros", *arguments])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == cli.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not directory.exists()


def test_an_output_directory_keeps_its_experiment(tmp_path: Path) -> None:
    config = load_config(MadConfig, None, ["n_ini=50", "generations=4", "seeds=3", f"output_dir={tmp_path}"])
    manifest: dict[str, Any] = {"name": "mad", "loop": "mad", "config": config.model_dump(mode="json")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    same = ["n_ini=50", f"output_dir={tmp_path}"]
    for more in (["generations=4", "seeds=3"], ["generations=9", "seeds=5"]):
        preflight_mad(load_config(MadConfig, None, [*same, *more]), MACHINE)
    assert "holds another experiment (different: n_ini" in refused("n_ini=60", f"output_dir={tmp_path}", "seeds=3")
    assert "fewer generations or seeds" in refused(*same, "generations=3", "seeds=3")
    assert "another loop" in _with_loop(tmp_path, manifest | {"loop": "ddpo"}, same)


def _with_loop(directory: Path, manifest: dict[str, Any], overrides: list[str]) -> str:
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return refused(*overrides)


def test_a_key_of_earlier_versions_is_read_where_it_meant_nothing_else() -> None:
    assert refused("rule=augmentation", "synthetic_from=all").endswith(
        "samples of all earlier generations are rule=accumulate now"
    )
    old = MadConfig.model_validate(
        {"rule": "augmentation", "n_real": 5, "n_synthetic": 5, "synthetic_from": "previous"}
    )
    assert old.resolved_arms["augmentation"].rule == "augmentation"


EXTRA: dict[str, st.SearchStrategy[Any]] = {
    "sampling_bias": st.sampled_from([1.0, 0.5, 0.0025, 1e-6, 1e-300]),
    "correction": st.sampled_from([0.0, 0.3, 1e6]),
    "memory": st.integers(1, 5),
    "real_weight": st.sampled_from([1e-6, 3.0, 1e6]),
    "candidates": st.integers(2, 4),
    "dimension": st.sampled_from([1, 2, 40]),
    "categories": st.sampled_from([2, 9]),
    "modes": st.sampled_from([4, 9]),
    "covariance": st.sampled_from(["unbiased", "mle", "known"]),
}
SUPPLIED = {**EXTRA, "real_supply": st.sampled_from(["fixed", "fresh", "fresh_with_replacement"])}
WHAT = {
    "family": st.sampled_from(["gaussian"] * 4 + ["categorical"] * 2 + ["mixture"]),
    "reward": st.just("first_coordinate"),
}
SIZED = {"n_ini": st.sampled_from([2, 3, 7, 30]), "n_synthetic": st.sampled_from([0, 1, 7, 30])}
REAL = {**SIZED, "n_real": st.sampled_from([0, 1, 3, 30])}
FRACTIONS = st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0, {"first": 0.5, "last": 0.0}])
SHARES = st.sampled_from([{"previous": 1.0}, {"real_fixed": 0.2, "real_fresh": 0.1, "earlier": 0.7}])


def loops(rules: tuple[str, ...], needed: dict[str, Any], extra: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"rule": st.sampled_from(rules), **WHAT, **needed}, optional=extra)


LOOPS = st.one_of(
    loops(tuple(RULES.built_in), REAL, EXTRA),
    loops(("fresh", "memory", "curated"), REAL, SUPPLIED),
    loops(("fresh", "memory"), {"n_total": st.sampled_from([2, 7, 30]), "fresh_fraction": FRACTIONS}, SUPPLIED),
    loops(("real_only", "fully_synthetic", "accumulate", "accumulate_subsample"), SIZED, EXTRA),
    loops(("weighted_mixture",), {"n_total": st.sampled_from([2, 7, 30]), "shares": SHARES}, EXTRA),
)


@settings(max_examples=60, deadline=None)
@given(LOOPS, st.none() | LOOPS, st.integers(1, 5), st.sampled_from([False, False, True]))
def test_what_is_accepted_can_be_drawn_fitted_and_derived_from(
    own: dict[str, Any], arm: dict[str, Any] | None, generations: int, derive: bool
) -> None:
    """Every generation of every arm, in two universes, up to its metrics; what is refused is refused in one line."""
    arms = {} if arm is None else {"a": arm, "b": {}}
    overrides = {**own, "arms": arms, "generations": generations, "seeds": 2, "data": {"reference": 20}}
    overrides["derive"] = ["effective_samples"] * derive
    try:
        config = load_config(MadConfig, None, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        experiment = preflight_mad(config, MACHINE)
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = ["accepted"]
    assert len(lines) == 1
    if lines != ["accepted"]:
        return
    for name, arm in config.resolved_arms.items():
        for manifest in experiment.manifests[name]:
            assert sum(map(len, manifest.rows(1))) == manifest.size >= 2
        with contextlib.suppress(LedgerExhausted):
            for manifest in training_sets(arm.loop, generations, 60):  # as of images
                for part, rows in zip(manifest.parts, manifest.rows(1), strict=True):
                    assert rows.size == 0 or part.start <= rows.min() <= rows.max() < (
                        part.stop if part.generation else 60
                    )
        universes = len(experiment.blocks[name][0])
        values = measured(arm, generations, universes)
        for metric, found in values.items():
            assert found.shape == (universes, generations)
            assert np.isfinite(found).all() or metric == "log_det"
        for law in laws(arm, generations).values():
            assert law.shape == (generations,)
            assert np.isfinite(law).all()
        if config.derive and arm.underivable(generations) is None:
            assert ("n_e" in (found := effective_samples(arm, values, config))) != ("problem" in found)


def test_an_arm_differs_within_a_block_and_gives_shares_anew() -> None:
    blocks = ["gan.width=8", "gan.steps=3", "a:B.x=1", "a:B.y=2", "shares={real_fixed: 0.5, previous: 0.5}"]
    arm = "arms.a={rule: a:B, gan: {steps: 5}, 'a:B': {y: 3}, shares: {earlier: 1.0}}"
    found = load_config(MadConfig, None, ["n_ini=50", *blocks, arm]).resolved_arms["a"]
    assert (found.gan.width, found.gan.steps, found.own, found.shares) == (
        8,
        5,
        {"a:B": {"x": 1, "y": 3}},
        {"earlier": 1.0},
    )


def test_every_key_of_the_guide_can_be_overridden() -> None:
    overrides = {
        "family": "gaussian",
        "rule": "fresh",
        "n_ini": 30,
        "n_real": 10,
        "n_synthetic": 20,
        "sampling_bias": 0.9,
        "generations": 5,
        "seeds": 4,
        "output_dir": "somewhere",
        "dimension": 2,
    }
    config = load_config(
        MadConfig, CHECKOUT / "configs/mad/gaussian.yaml", [f"{key}={value}" for key, value in overrides.items()]
    )
    assert {key: getattr(config, key) for key in overrides} == overrides
    fraction = ["rule=fresh", "n_synthetic=null", "fresh_fraction=0.2"]
    assert load_config(MadConfig, CHECKOUT / "configs/mad/gaussian.yaml", fraction).loop.sizes(2, 20) == (10, 40)
    # What an arm can be told: of the generators and refinements, each a block of its own, it has one.
    plugins = [{key for key in known_keys(MadConfig) if key.startswith(f"{name}.")} for name in BLOCKS]
    undergone = [{key for key in known_keys(MadConfig) if key.startswith(f"{name}.")} for name in REFINING]
    common = set(known_keys(MadConfig)).difference(*plugins, *undergone)
    closed = {key for kind in GENERATORS.built_in.values() if kind.flat for key in kind.schema.model_fields}
    of_rules = {key for rule in RULES.built_in.values() for key in rule.model_fields} - set(Rule.model_fields)
    rules = [set(rule.model_fields) - set(Rule.model_fields) for rule in RULES.built_in.values()]
    most = len(common - closed - of_rules) + sum(max(map(len, kind)) for kind in (plugins, undergone, rules))
    assert most < 62


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs/mad").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_made_experiment_can_run(path: Path) -> None:
    config = load_config(MadConfig, path)
    experiment = preflight_mad(config, MACHINE)
    assert experiment.manifests.keys() == config.resolved_arms.keys()
    for manifests in experiment.manifests.values():
        assert len(manifests) == config.generations
        assert all(contents(manifest) for manifest in manifests)
