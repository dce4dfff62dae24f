"""Where a sample comes from: back through the models and training sets of a MAD run to the real data."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import chain
from orchestration.experiments.mad.preflight import contents, seed_blocks
from orchestration.runs.config import ConfigError, validate
from orchestration.runs.display import plain_table
from orchestration.runs.manifest import check_links, read_manifest
from orchestration.runs.seal import check_seal
from pipelines.mad.graph import Generation, RealSource, image_source
from pipelines.mad.tasks import read_rows
from pipelines.storage.tasks import TaskStore
from policies.loops.training_sets import REAL, training_sets

Ancestry = tuple[np.ndarray, frozenset[int]]
"""The real data behind a generation: (generations,) the share of its training set that is real data seen through h
generations (0: real itself); and the distinct real samples that it descends from, by number."""


def ancestry(generations: list[Generation], seed: int) -> list[Ancestry]:
    """Of each generation of one chain, in one universe."""
    found: list[Ancestry] = []
    for generation in generations:
        hops, real = np.zeros(len(generations)), frozenset[int]()
        for part, taken in zip(generation.manifest.parts, generation.manifest.rows(seed), strict=True):
            share = len(taken) / generation.manifest.size
            if part.generation == REAL:
                hops[0] += share
                real |= frozenset(taken.tolist())
            else:
                earlier, behind = found[part.generation - 1]
                hops[1:] += share * earlier[:-1]
                real |= behind
        found.append((hops, real))
    return found


def chain_of(directory: Path, manifest: Mapping[str, Any], config: MadConfig, name: str, seed: int) -> list[Generation]:
    """Every generation of an arm and seed of the run in ``directory``. Raises ConfigError."""
    arm, source = config.resolved_arms[name], RealSource(config.data.reference)
    if not arm.generator.closed_form:
        if not manifest.get("real_images"):
            raise ConfigError(f"{directory / 'manifest.json'} does not say which real images were used")
        source = image_source(**manifest["real_images"])
    blocks = seed_blocks(config.seed_list, arm, training_sets(arm.loop, config.generations, source.pool))
    seeds = next(block for block in blocks if seed in block)
    return list(chain(name, arm, seeds, config.generations, source, manifest.get("words", {}).get(name)))


def render_lineage(directory: Path, sample: str, trusted: bool = False) -> RenderableType:
    """``sample`` is ARM/SEED/GENERATION, or ARM/SEED/GENERATION/NUMBER. Raises ConfigError if there is no such."""
    manifest = read_manifest(directory)
    if not trusted:
        check_links(directory)
    if manifest.get("loop") != "mad":
        raise ConfigError(f"{directory} is not a MAD run: it has no generations")
    config = validate(MadConfig, manifest["config"])
    name, seed, number, row = _parse(sample, config)
    arm = config.resolved_arms[name]
    if arm.foreign:  # which is imported
        check_seal(directory, manifest, trusted)
    generations = chain_of(directory, manifest, config, name, seed)[:number]
    store, last = TaskStore(directory / "tasks"), generations[-1]
    lines = [Text(f"{name}, seed {seed}, generation {number}", style="bold")]
    if row is not None:
        lines[0].append(f", sample {row}")
        if not last.drawn:
            raise ConfigError(f"{sample}: no later generation reads samples of generation {number}, so none were drawn")
        batch = next((batch for batch in last.drawn if batch.start <= row < batch.stop), None)
        if batch is None:
            raise ConfigError(f"{sample}: generation {number} drew {last.drawn[-1].stop} samples, counted from 0")
        again = "drawn again where it is read"
        stored = again if batch.task is last.model else f"stored in {store.path(batch.task.key)}"
        how = f"drawn by model {last.model.key}, sampling bias {arm.loop.sampling_bias:g}, "
        how += f"stream sampling/{number}/{batch.start}, number {row - batch.start} of it; {stored}"
        lines.append(Text(how))
        if batch.task.kind == "sample" and batch.task.key in store:
            lines += [Text(line) for line in _told_of(read_rows(store.load(batch.task.key)), row - batch.start)]
    headings = ("generation", "trained on", "real", "real through", "distinct real samples behind", "model")
    table = plain_table(headings)
    for generation, (hops, real) in reversed(list(zip(generations, ancestry(generations, seed), strict=True))):
        table.add_row(
            f"G{generation.number}",
            contents(generation.manifest),
            f"{hops[0]:.1%}",
            f"{np.arange(len(hops)) @ hops:.2f} generations",
            f"{len(real):,}",
            generation.model.key[:12] + ("" if generation.model.key in store else " (not trained yet)"),
        )
    return Group(*lines, Text(""), table)


def _told_of(rows: Mapping[str, Sequence[Any]], row: int) -> Iterator[str]:
    """What is kept of a stored sample besides its image, in words."""
    known = {name: values[row] for name, values in rows.items()}
    prompt, caption = known.get("prompt", known.get("caption")), known.get("caption")
    if caption is not None:
        yield f"asked for: {str(prompt)!r}; read by the next generation: {str(caption)!r}"
    if "seen" in known:
        yield f"the captioner saw: {str(known['seen'])!r}"
    if "reward" in known:
        rivals = list(known["candidates"])
        rivals.remove(known["reward"])
        yield f"reward {known['reward']:.4g}, kept from rivals of {', '.join(f'{each:.4g}' for each in rivals)}"


def _parse(sample: str, config: MadConfig) -> tuple[str, int, int, int | None]:
    """(arm, seed, generation, number or None); arms may have slashes in their names."""
    for name in config.resolved_arms:
        found = re.fullmatch(re.escape(name) + r"/([0-9]+)/([0-9]+)(?:/([0-9]+))?", sample)
        if found and int(found[1]) in config.seed_list and 1 <= int(found[2]) <= config.generations:
            return name, int(found[1]), int(found[2]), int(found[3]) if found[3] else None
    raise ConfigError(
        f"no sample {sample!r}: give ARM/SEED/GENERATION or ARM/SEED/GENERATION/NUMBER with an arm of "
        f"{', '.join(config.resolved_arms)}, a seed of {config.seed_list[0]} to {config.seed_list[-1]}, "
        f"a generation of 1 to {config.generations}"
    )
