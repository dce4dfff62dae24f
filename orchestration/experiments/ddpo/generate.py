"""Images from a finished run, a checkpoint, or any diffusers directory."""

import math
import os
import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.cluster.forks import ACTORS
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import ConfigError, about
from orchestration.runs.inputs import changed_inputs, fingerprints
from orchestration.runs.manifest import ids
from orchestration.runs.run import going_on
from pipelines.data.prompts import unseen_words
from pipelines.guard import NO_GUARD, Guard, read_guard, write_log
from pipelines.settings import ModelSettings
from pipelines.storage.checkpoint import CheckpointStore
from pipelines.videos import gif
from policies.rl.settings import SamplingSettings

_TOGETHER = 2**15  # numbers of latents that are drawn at once: many small images, or two of Stable Diffusion's


def generate(
    source: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    trusted: bool = False,
    guard: str | None = None,
) -> list[Path]:
    """Draw one image for each (prompt, seed) and write them as PNG files, or videos as GIF, into ``output``.

    ``source``: a run (its final pipeline or, if unfinished, its last commit), a commit below ``RUN/checkpoints``, or a
    diffusers directory. Settings are the run's own, so a seed of the run gives the image the run showed. Raises
    ConfigError if it is another person's run and not ``trusted``. A ``guard``, a YAML file, may refuse prompts, rewrite
    them, and withhold images, which are then not there: what it did is in ``output/guard.jsonl``.
    """
    os.environ.update(ACTORS | os.environ)  # before torch is imported
    from PIL import Image

    names = {each: image_name(*each) for each in zip(prompts, seeds, strict=True)}
    with about():
        watch = Guard(read_guard(guard, "--guard")) if guard else NO_GUARD
        front = {each: watch.front(*each) for each in names}
        asked = {each: text for each, (text, _) in front.items() if text is not None}
        policy = _open(source, trusted)
        if (frames := policy.family.files.frames) > 1:
            names = {each: str(Path(name).with_suffix(".gif")) for each, name in names.items()}
            if watch.settings.output:
                raise ValueError("--guard: its output stage looks at images, and this model draws videos: leave it out")
        for line in unseen_words(list(dict.fromkeys(asked.values())), policy.family.files):
            print(f"warning: {line}", file=sys.stderr)
    log, written = [entry for _, entries in front.values() for entry in entries], set()
    try:
        output.mkdir(parents=True, exist_ok=True)
        size, left = max(1, _TOGETHER // math.prod(policy.family.latent_shape)), iter(asked)
        while drawn := list(islice(left, size)):
            texts, own = zip(*drawn, strict=True)
            images, withheld, tries = watch.drawn(
                lambda *what: policy.rollout(*what)[0], [asked[each] for each in drawn], texts, own
            )
            log += tries
            for number in np.flatnonzero(~withheld):
                path = output / names[drawn[number]]
                if frames > 1:
                    path.write_bytes(gif(images[number : number + 1], frames))
                else:
                    Image.fromarray(images[number]).save(path)
                written.add(drawn[number])
        write_log(output / "guard.jsonl", log if guard else ())
        for line in dict.fromkeys(entry.line for entry in log if entry.decision != "allowed"):
            print(line, file=sys.stderr)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from error
    return [output / names[each] for each in zip(prompts, seeds, strict=True) if each in written]


def image_name(prompt: str, seed: int) -> str:
    """The name of an image's file: never that of another prompt's, also where capitals count for nothing. Raises
    ConfigError."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is out of range: seeds are 0 to 2**63 - 1")
    try:
        whole = sha256(prompt.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt {prompt!r} is no text: its letters are not UTF-8") from error
    words = "".join(c if c.isalnum() else "-" for c in prompt).encode()[:60].decode(errors="ignore").strip("-")
    plain = re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", prompt) and len(prompt) == len(words)
    return f"{words}-{seed}.png" if plain else f"{words}_{whole}-{seed}.png"


def _open(source: Path, trusted: bool) -> Any:
    """A DiffusionPolicy with the weights of ``source`` and its sampling settings."""
    from pipelines.rl.policy import DiffusionPolicy

    if (source / "model_index.json").is_file():
        return DiffusionPolicy(ModelSettings(path=str(source)), SamplingSettings())
    step = int(source.name.removeprefix("step-")) if re.fullmatch(r"step-[0-9]{1,9}", source.name) else None
    run = source.parent.parent if step is not None else source
    if not (run / "manifest.json").is_file():
        raise ConfigError(f"{source} is neither a run, a checkpoint of a run, nor a diffusers directory")
    with going_on(run, DdpoConfig, trusted) as (manifest, config):
        directory, held = Path(str(config.output_dir)), manifest.get("inputs", {})
        if step is None and (directory / "pipeline" / "model_index.json").is_file():
            pipeline = config.model.model_copy(update={"path": str(directory / "pipeline")})
            return DiffusionPolicy(pipeline, config.sampling)
        now = fingerprints({"model.path": config.model.path}, held)
        if changed := changed_inputs(held, now).get("model.path"):
            raise ConfigError(f"{run} has no pipeline yet, and what it trains is not as it was: model.path: {changed}")
        from pipelines.rl.learning import DiffusionLearner, LearnerState

        store = CheckpointStore(directory / "checkpoints", owners=ids(manifest))
        if step not in (None, *store.steps()) or not store.steps():
            raise ConfigError(f"{source} holds no commit to draw with; there are: {store.steps()}")
        commit = store.load(step)
        learner = DiffusionLearner(config.model, config.sampling, config.training, seed=0)
        learner.restore(LearnerState(commit.tensors, commit.state["weights_version"]))
        policy = DiffusionPolicy(config.model, config.sampling)
        policy.load(learner.weights("averaged"))
        return policy
