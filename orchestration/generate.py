"""Images from a finished run, a checkpoint, or any diffusers directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError, DdpoConfig, validate
from orchestration.run import read_manifest
from pipelines.checkpoint import CheckpointStore
from pipelines.settings import ModelSettings
from policies.settings import SamplingSettings


def generate(
    source: Path, prompts: Sequence[str], seeds: Sequence[int], output: Path, sampling: SamplingSettings | None = None
) -> list[Path]:
    """Draw one image for each (prompt, seed) and write them as PNG files into ``output``.

    ``source``: a run (its final pipeline or, if unfinished, its last commit), a commit below ``RUN/checkpoints``, or a
    diffusers directory. ``sampling`` defaults to the run's own, so a seed of the run gives the image the run showed.
    """
    from PIL import Image

    policy = _open(source, sampling)
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        images, _ = policy.rollout([prompt], [seed])
        words = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
        paths.append(output / f"{words}-{seed}.png")
        Image.fromarray(images[0]).save(paths[-1])
    return paths


def _open(source: Path, sampling: SamplingSettings | None) -> Any:
    """A DiffusionPolicy with the weights of ``source`` and, unless told otherwise, its sampling settings."""
    from pipelines.diffusion import DiffusionPolicy

    if (source / "model_index.json").is_file():
        return DiffusionPolicy(ModelSettings(path=str(source)), sampling or SamplingSettings())
    step = int(source.name.removeprefix("step-")) if source.name.startswith("step-") else None
    run = source.parent.parent if step is not None else source
    if not (run / "manifest.json").is_file():
        raise ConfigError(f"{source} is neither a run, a checkpoint of a run, nor a diffusers directory")
    config = validate(DdpoConfig, read_manifest(run)["config"])
    sampling = sampling or config.sampling
    if step is None and (run / "pipeline" / "model_index.json").is_file():
        return DiffusionPolicy(config.model.model_copy(update={"path": str(run / "pipeline")}), sampling)
    from pipelines.learning import DiffusionLearner, LearnerState
    from pipelines.trainable import load_weights

    commit = CheckpointStore(run / "checkpoints").load(step)
    learner = DiffusionLearner(config.model, sampling, config.training, seed=0)
    learner.restore(LearnerState(commit.tensors, commit.state["weights_version"]))
    policy = DiffusionPolicy(config.model, sampling)
    load_weights(policy.network, learner.weights("averaged"))
    return policy
