"""Which files a DDPO run reads: prompts, models, captioner, evaluator, options and code of rewards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.inputs import Inputs, code_of, fingerprints
from pipelines.rewards import REWARDS
from pipelines.storage.locations import find


def paths_of(config: DdpoConfig) -> dict[str, str]:
    """Every path, or hub name, that a DDPO run reads, by its dotted key."""
    single = isinstance(config.prompts, str)
    found: dict[str, str | None] = {
        "prompts" if single else f"prompts.{name}": path for name, path in config.prompt_files.items()
    }
    found |= {"model.path": config.model.path, "captioner.path": config.captioner.path}
    found["evaluation.evaluator"] = config.evaluation.evaluator

    def note(key: str, value: Any) -> None:
        if isinstance(value, str) and _is_data(value):
            found[key] = value

    for name, options in config.reward.functions.items():
        key = f"reward.options.{name}"
        found |= {f"{key}.{option}": path for option, path in options.model_paths.items()}
        if name not in REWARDS.built_in:
            _mapped(options.model_dump(), note, key)
    return {key: path for key, path in found.items() if path}


def ddpo_inputs(config: DdpoConfig, held: Inputs | None = None) -> Inputs:
    """What a DDPO run reads. Content whose stamp is that of ``held`` is not read again."""
    code = [path for name in config.reward.functions if (path := REWARDS.path(name))]
    return fingerprints(paths_of(config), held) | code_of(code)


def _is_data(value: str) -> bool:
    """Whether an option names something to read: "/" and "." hold all there is here, and are words."""
    found = find(value)
    return found is not None and not Path.cwd().is_relative_to(found)


def placed(content: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Plain ``content`` of a DDPO run, with its paths as they are known from any working directory."""
    return _mapped(content, lambda key, value: inputs[key]["path"] if key in inputs else value)


def _mapped(content: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """A copy of plain ``content`` with each value changed, by its dotted key: of lists, with its number."""
    below = f"{key}." if key else ""
    if isinstance(content, Mapping):
        return {name: _mapped(value, change, f"{below}{name}") for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_mapped(value, change, f"{below}{number}") for number, value in enumerate(content)]
    return change(key, content)
