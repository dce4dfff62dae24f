"""A new run that begins where another one stood: its commit, its past, and settings that may differ from there on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestration.config import ConfigError, DdpoConfig, override, validate
from orchestration.preflight import preflight
from orchestration.run import new_directory, new_manifest, read_manifest
from orchestration.seal import check_seal
from pipelines.atomic import as_lines, read_lines, write_durably, write_json
from pipelines.checkpoint import CheckpointStore


def fork(source: Path, overrides: Sequence[str], step: int | None = None, trusted: bool = False) -> Path:
    """Make a run from the commit of ``source`` after ``step`` steps, by default the newest. Returns its directory.

    Raises ConfigError if ``source`` is no DDPO run, has no such commit, is given settings it cannot go on with, or is a
    stranger's that names code and is not ``trusted``.
    """
    manifest, store = read_manifest(source), CheckpointStore(source / "checkpoints")
    if manifest["loop"] != "ddpo":
        raise ConfigError(
            f"{source} is a {manifest['loop']} run: only DDPO runs are forked; MAD's go on with more arms"
        )
    check_seal(source, manifest, trusted)
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        raise ConfigError(f"{source} has no commit {'' if step is None else f'of step {step} '}(there are: {steps})")
    step = steps[-1] if step is None else step
    content = json.loads(json.dumps(manifest["config"])) | {"output_dir": None}
    for each in overrides:
        override(content, each)
    config = validate(DdpoConfig, content)
    if config.model.model_dump(mode="json") != manifest["config"]["model"]:
        raise ConfigError("a fork goes on with the weights of its source: model.* cannot be changed")
    if config.training.steps <= step:
        raise ConfigError(f"training.steps is {config.training.steps}, but the commit stands after {step} already")
    preflight(config)

    directory = new_directory(config, f"-seed{config.seed}")
    begun = new_manifest("ddpo", config)
    begun |= {"total_steps": config.training.steps, "committed_step": step, "resolved": manifest["resolved"]}
    begun |= {"forked_from": {"run": str(source.resolve()), "step": step}, "status": "KILLED"}
    (directory / "evaluations").mkdir()
    for path in (source / "evaluations").glob("step-*"):
        if int(path.stem.removeprefix("step-")) <= step:
            shutil.copy2(path, directory / "evaluations")
    past = [line for line in read_lines(source / "metrics.jsonl") if line["step"] <= step]
    write_durably(directory / "metrics.jsonl", as_lines(past))
    CheckpointStore(directory / "checkpoints").adopt(store.path(step))
    write_json(directory / "manifest.json", begun)
    return directory
