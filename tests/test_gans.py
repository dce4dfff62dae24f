"""Both GANs that learn from labels or captions, in every data rule that takes them: tasks done one by one."""

import json
from typing import Any

import pytest

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import unroll
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.mad.tasks import perform
from pipelines.storage.tasks import in_order
from policies.loops.rules import RULES

SIZES: dict[str, dict[str, Any]] = {
    "augmentation": {"n_real": 10, "n_synthetic": 10},
    "iterative_retraining": {"n_real": 10, "n_synthetic": 10},
    "fresh": {"n_ini": 20, "n_real": 5, "n_synthetic": 10},
    "curated": {"n_ini": 20, "n_real": 5, "n_synthetic": 10, "candidates": 2},
    "corrected": {"n_ini": 20, "n_real": 5, "n_synthetic": 10, "corrector": "classifier"},
    "verified": {"n_ini": 20, "n_real": 5, "n_synthetic": 4, "candidates": 60, "acceptance": 0.01},
    "relabelled": {"n_ini": 20, "n_real": 5, "n_synthetic": 10},
    "memory": {"n_ini": 20, "n_real": 5, "n_synthetic": 10, "memory": 2},
    "weighted_mixture": {"n_ini": 20, "n_total": 20, "shares": {"real_fixed": 0.5, "previous": 0.5}},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "maven": {"maven": {"width": 4, "steps": 2}, "data": {"source": "digits", "reference": 30, "limit": 200}},
    "gigagan": {
        "gigagan": {"width": 2, "steps": 2, "captioner": None},
        "data": {"source": "captioned_digits", "reference": 30, "limit": 200},
    },
}
REWARDS = {"maven": "confidence", "gigagan": "jpeg_compressibility"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_data_rule_can_be_followed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.measures.features.UPDATES", 5)
    arms = {rule: {"rule": rule, **SIZES.get(rule, {"n_ini": 20, "n_total": 20})} for rule in RULES.built_in}
    for rule in ("real_only", "fully_synthetic", "accumulate"):
        del arms[rule]["n_total"]
    arms["curated"]["reward"] = REWARDS[family]
    if family == "gigagan":  # it learns captions, and no labels
        del arms["relabelled"]
    common = {"family": family, "generations": 2, "seeds": 1, "sampling_bias": 0.8, **FAMILIES[family]}
    given = {**common, "arms": arms}
    config = load_config(MadConfig, None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    experiment = preflight_mad(config)
    done, generations = dict(experiment.real_files), unroll(config, experiment)
    for task in in_order([each.measure for each in generations]):
        if task.key not in done:
            done[task.key] = perform(task.kind, task.parameters, [done[one.key] for one in task.inputs], "cpu")
    for each in generations:
        found = json.loads(done[each.measure.key]["metrics.json"])["metrics"]
        assert {*found} >= {"fid", "recall", "label_accuracy" if family == "maven" else "prompt_accuracy"}
    assert {each.arm for each in generations} == {*arms}


def test_a_gan_of_captions_is_given_no_labels() -> None:
    given = ["family=gigagan", "rule=relabelled", "n_ini=20", "n_real=5", "n_synthetic=10"]
    data = ["data.source=captioned_digits", "data.reference=30", "data.limit=200"]
    with pytest.raises(ConfigError, match="gives samples labels, which family gigagan would not learn"):
        preflight_mad(load_config(MadConfig, None, [*given, *data]))
