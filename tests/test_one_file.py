"""A data rule, a generator and a reward of one's own are a file each, outside of the tree, named by import path."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.lineage import render_lineage
from orchestration.experiments.mad.loop import chain, unroll
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.inputs import code_of
from orchestration.runs.manifest import new_manifest, write_manifest
from pipelines.mad.graph import RealSource, image_source
from pipelines.mad.tasks import perform
from pipelines.rewards import REWARDS, load_reward, score
from pipelines.settings import RewardSettings
from pipelines.storage.locations import CHECKOUT
from pipelines.storage.tasks import in_order
from policies.common.user_code import Registry
from policies.loops.rules import Rule

MARK = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
FAILS = "class Fails(EveryOther):\n    def sizes(self, generation, generations):\n        return 1 / 0\n"
REWARD = '''
import numpy as np
from pydantic import Field

from pipelines.rewards import Reward


class Brightness(Reward):
    """How bright an image is, less than a threshold counting nothing."""

    above: float = Field(0.0, ge=0, lt=1)

    def check(self, prompts):
        if "dark" in prompts:
            raise ValueError("nothing dark is bright")

    def load(self, name, device):
        return lambda images, prompts, captions: np.maximum(images.mean(axis=(1, 2, 3)) / 255 - self.above, 0)
'''
OWN = ["rule=my_rule:EveryOther", "family=my_generator:Uniform", "n_ini=20", "seeds=[3, 4]", "generations=3"]
OF_RULE = "my_rule:EveryOther"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the import path with the three files."""
    monkeypatch.syspath_prepend(tmp_path)
    page = (CHECKOUT / "docs" / "mad.md").read_text()
    texts = dict(re.findall(r"^```python (\w+)\.py\n(.*?)^```", page, re.M | re.S))
    texts |= {"my_rule": MARK + texts["my_rule"] + FAILS, "my_typed_reward": REWARD}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in texts:
        sys.modules.pop(name, None)


def read(*overrides: str) -> MadConfig:
    return load_config(MadConfig, None, [*OWN, *overrides])


def planned(config: MadConfig) -> list[Any]:
    return unroll(config, preflight_mad(config, Machine(cpus=2, gpus=0)))


def test_a_rule_and_a_generator_run(place: Path) -> None:
    config = read("my_generator:Uniform.top=3.0")
    assert not (place / "imported").exists()  # a configuration alone imports nothing
    generations = planned(config)
    roles = [[(part.role, part.generation, part.size) for part in each.manifest.parts] for each in generations]
    assert roles == [[("real-fixed", 0, 20)], [("real-fixed", 0, 20)], [("synthetic", 2, 20)]]
    files: dict[str, Any] = {}
    for task in in_order([each.measure for each in generations]):
        files[task.key] = perform(task.kind, task.parameters, [files[each.key] for each in task.inputs], "cpu")
    width = [json.loads(files[each.measure.key]["metrics.json"])["metrics"]["width"] for each in generations]
    largest = [3 * np.random.default_rng([seed, 0]).random(20).max() for seed in (3, 4)]
    assert width[0] == width[1] == largest
    assert all(0.6 * real < synthetic < real for synthetic, real in zip(width[2], largest, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{OF_RULE}.evry=3"], "my_rule:EveryOther: unknown key 'evry'; did you mean 'every'?"),
        ([f"{OF_RULE}.every=0"], "my_rule:EveryOther: every: Input should be greater than or equal to 1"),
        ([f"{OF_RULE}.n_ini=3"], "my_rule:EveryOther: give n_ini as a key of its own"),
        (["options.my_rule:EveryOther.every=3"], "options: what it held stands under its own name now, as in my_rule"),
        (["my_rule:Another={}"], "'my_rule:Another' is neither the rule nor the family of an arm"),
        (["another={}"], "unknown key 'another'"),
        ([f"{OF_RULE}=3"], "my_rule:EveryOther: Input should be a valid dictionary"),
        (["arms.a={'my_rule:EveryOther': {evry: 3}}"], "arms.a: my_rule:EveryOther: unknown key 'evry'"),
        (["n_ini=null"], "rule my_rule:EveryOther needs n_ini"),
        (["rule=my_rule:Nothing"], "rule 'my_rule:Nothing': module 'my_rule' has no 'Nothing'"),
        (["rule=my_typed_reward:Brightness"], "is not a class derived from policies.loops.rules.Rule"),
        (["rule=my_rule:Fails"], "my_rule:Fails failed: ZeroDivisionError: division by zero (at"),
        (["family=my_rule:EveryOther"], "is not a class derived from pipelines.generators.Generator"),
        (["rule=my_rule"], "rule: Input should be 'accumulate'"),
    ],
)
def test_what_is_wrong_with_them_is_one_line(place: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(read(*overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_their_code_is_among_a_runs_inputs_and_a_strangers_is_not_imported(place: Path) -> None:
    config = read(f"output_dir={place / 'run'}")
    manifest = new_manifest("mad", config)
    (place / "run").mkdir()
    write_manifest(place / "run", manifest)
    held = json.loads((place / "run" / "manifest.json").read_text())
    (place / "run" / "manifest.json").write_text(json.dumps(held | {"seal": None}))
    name = f"{config.rule}/3/2"
    with pytest.raises(ConfigError, match=r"names code to import .*my_rule:EveryOther.*--trust"):
        render_lineage(place / "run", name)
    with pytest.raises(ConfigError, match="holds another experiment"):
        planned(load_config(MadConfig, None, ["n_ini=30", f"output_dir={place / 'run'}"]))
    assert not (place / "imported").exists()
    render_lineage(place / "run", name, trusted=True)
    assert (place / "imported").exists()
    found = code_of(config.resolved_arms[config.rule].code)
    assert set(found) == {"code of my_rule", "code of my_generator"}
    (place / "my_rule.py").write_text(MARK)
    assert code_of(["my_rule:EveryOther"])["code of my_rule"]["sha256"] != found["code of my_rule"]["sha256"]


def test_an_installed_package_offers_them_by_name(place: Path) -> None:
    about = place / "plugins-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ouroboros.rules]\nevery_other = my_rule:EveryOther\n")
    rules = Registry(Rule, "policies.loops.rules", "ouroboros.rules", "rule")
    assert rules.check("every_other") == "every_other"
    assert rules.path("every_other") == "my_rule:EveryOther"
    assert not (place / "imported").exists()
    assert rules.find("every_other").name() == "my_rule:EveryOther"


def test_a_reward_with_typed_options_is_checked_and_called(place: Path) -> None:
    name = "my_typed_reward:Brightness"
    settings = RewardSettings(function=name, options={name: {"above": 0.25}})
    given = settings.functions[name]
    reward = given.resolved(name)
    reward.check_call(name)
    with pytest.raises(ValueError, match="nothing dark"):
        reward.check(["dark"])
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 255)])
    np.testing.assert_allclose(score(load_reward(name, given), images, ["a", "b"], None), [0, 0.75])
    wrong = RewardSettings(function=name, options={name: {"abov": 0.25}}).functions[name]
    with pytest.raises(
        ValueError, match="options of my_typed_reward:Brightness: unknown key 'abov'; did you mean 'above'"
    ):
        wrong.resolved(name)


def test_every_module_of_a_kind_is_found() -> None:
    """Nothing has to be entered into a list: a file is enough."""
    held = {path.stem for path in (CHECKOUT / "pipelines" / "rewards").glob("[!_]*.py")} - {"server"}
    assert {kind.__module__.rpartition(".")[2] for kind in REWARDS.built_in.values()} == held


KEYS = {  # of the last measure of each arm's three generations
    "categorical": "471f77",
    "mixture": "eafdf3",
    "gaussian_loops": "1fdb84 2c288e 8de0bf 6f9829 a4d94e e41985 172119 dd5741",
    "memory": "2976b3 728e3d 728e3d 728e3d",
    "gan": "f2778f d4666c",
    "digits": "bcc87a 42657d 252ba5 048181 4b6f3e d74096",
}


@pytest.mark.parametrize("name", KEYS)
def test_tasks_keep_their_names(name: str) -> None:
    """So that runs which earlier versions began go on: a key hashes all that its task depends on."""
    config = load_config(MadConfig, CHECKOUT / f"configs/mad/{name}.yaml")
    images = name in ("gan", "digits")
    source = image_source("0" * 64, 397, 1400, 10) if images else RealSource(100)
    last = [[*chain("", arm, (0,), 3, source)][-1] for arm in config.resolved_arms.values()]
    assert " ".join(each.measure.key[:6] for each in last) == KEYS[name]
