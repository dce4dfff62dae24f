"""Whatever a configuration says, it is a run that can be planned or one line that says why not: never a traceback.

Hypothesis writes 300 of them, or EXAMPLES (of the environment) times as many: real keys with values of all kinds,
damaged keys, damaged YAML, bytes.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.experiments.mad.config import MadConfig
from orchestration.runs.config import ConfigError, load_config
from orchestration.tracking.tracker import flatten

WHOLE: dict[Any, dict[str, Any]] = {
    DdpoConfig: DdpoConfig().model_dump(mode="json"),
    MadConfig: MadConfig(n_ini=100).model_dump(mode="json"),
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(allow_nan=True),
    st.text(max_size=12),
    st.sampled_from(
        ["1e-4", "auto", "cuda", "../..", "/dev/null", "tests.rewards:redness", "os:system", "!!python/none"]
    ),
    st.lists(st.integers(-1, 50), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
MANY = 100 * int(os.environ.get("EXAMPLES", "1"))
FUZZ = settings(max_examples=MANY, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))


def check(schema: Any, path: Path | None, overrides: list[str]) -> None:
    """A configuration, or a ConfigError of one line."""
    message = None
    try:
        config = load_config(schema, path, overrides)
        if schema is DdpoConfig:
            preflight_ddpo(config.model_copy(update={"output_dir": None}), Machine(2, 0))
    except ConfigError as error:
        message = str(error)
    assert message is None or (len(message) > 10 and "\n" not in message)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("schema", [DdpoConfig, MadConfig])
def test_any_values_of_real_keys(schema: Any, data: st.DataObject) -> None:
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(flatten(WHOLE[schema]))), VALUES, min_size=1, max_size=4))
    check(schema, None, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])


@FUZZ
@given(data=st.data())
def test_any_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    schema = data.draw(st.sampled_from([DdpoConfig, MadConfig]))
    whole = yaml.safe_dump(WHOLE[schema])
    kind = data.draw(st.sampled_from(["bytes", "text", "cut", "replaced", "JSON"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=200))
    elif kind == "text":
        content = data.draw(st.text(max_size=200)).encode()
    elif kind == "JSON":
        nested = st.recursive(
            VALUES, lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
        )
        content = json.dumps(data.draw(nested)).encode()
    else:
        place = data.draw(st.integers(0, len(whole)))
        put = "" if kind == "cut" else data.draw(st.text(min_size=1, max_size=8))
        content = (whole[:place] + (put + whole[place + len(put) :] if kind == "replaced" else "")).encode()
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_bytes(content)
    check(schema, path, [])
