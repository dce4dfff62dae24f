"""Images from a finished run, a checkpoint, or any diffusers directory, drawn by a stock pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError, DdpoConfig, validate
from orchestration.run import read_manifest
from pipelines.checkpoint import CheckpointStore
from policies.settings import SamplingSettings


def generate(
    source: Path, prompts: Sequence[str], seeds: Sequence[int], output: Path, sampling: SamplingSettings | None = None
) -> list[Path]:
    """Draw one image for each (prompt, seed) and write them as PNG files into ``output``.

    ``source``: a run (its final pipeline or, if unfinished, its last commit), a commit below ``RUN/checkpoints``, or a
    diffusers directory. ``sampling`` defaults to the run's own, so a seed of the run gives the image the run showed.
    """
    import torch

    pipeline, own = _open(source)
    sampling = sampling or own
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        image = pipeline(
            prompt,
            num_inference_steps=sampling.steps,
            eta=sampling.eta,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed)],
        ).images[0]
        words = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
        paths.append(output / f"{words}-{seed}.png")
        image.save(paths[-1])
    return paths


def _open(source: Path) -> tuple[Any, SamplingSettings]:
    """A stock pipeline and the sampling settings that go with it."""
    from pipelines.diffusion import load_pipeline

    if (source / "model_index.json").is_file():
        return load_pipeline(str(source)), SamplingSettings()
    step = int(source.name.removeprefix("step-")) if source.name.startswith("step-") else None
    run = source.parent.parent if step is not None else source
    if not (run / "manifest.json").is_file():
        raise ConfigError(f"{source} is neither a run, a checkpoint of a run, nor a diffusers directory")
    config = validate(DdpoConfig, read_manifest(run)["config"])
    if step is None and (run / "pipeline" / "model_index.json").is_file():
        return load_pipeline(str(run / "pipeline")), config.sampling
    return _from_commit(run, config, step), config.sampling


def _from_commit(run: Path, config: DdpoConfig, step: int | None) -> Any:
    from pipelines.learning import DiffusionLearner, LearnerState

    commit = CheckpointStore(run / "checkpoints").load(step)
    learner = DiffusionLearner(config.model, config.sampling, config.training, seed=0)
    learner.restore(LearnerState(commit.tensors, commit.state["weights_version"]))
    return learner.merged_pipeline()
