"""Where a sample comes from: back through the models and training sets of a MAD run to the real data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import chain
from orchestration.experiments.mad.preflight import contents, seed_blocks
from orchestration.runs.browse import plain_table
from orchestration.runs.config import ConfigError, validate
from orchestration.runs.manifest import check_links, read_manifest
from orchestration.runs.seal import check_seal
from pipelines.mad.graph import Generation, RealSource, image_source
from pipelines.storage.tasks import TaskStore
from policies.loops.training_sets import REAL, training_sets


@dataclass(frozen=True)
class Ancestry:
    """The real data behind a generation. ``hops`` (generations,): share of its training set that is real data seen
    through h generations (0: real itself); ``real`` the distinct real samples it descends from, by number."""

    hops: np.ndarray
    real: frozenset[int]


def ancestry(generations: list[Generation], seed: int) -> list[Ancestry]:
    """Of each generation of one chain, in one universe."""
    found: list[Ancestry] = []
    for generation in generations:
        hops, real = np.zeros(len(generations)), frozenset[int]()
        rows = generation.manifest.rows(seed)
        for part, taken in zip(generation.manifest.parts, rows, strict=True):
            share = len(taken) / generation.manifest.size
            if part.generation == REAL:
                hops[0] += share
                real |= frozenset(taken.tolist())
            else:
                earlier = found[part.generation - 1]
                hops[1:] += share * earlier.hops[:-1]
                real |= earlier.real
        found.append(Ancestry(hops, real))
    return found


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
    source = RealSource(config.data.reference)
    if not arm.generator.closed_form:
        if not manifest.get("real_images"):
            raise ConfigError(f"{directory / 'manifest.json'} does not say which real images were used")
        source = image_source(**manifest["real_images"])
    blocks = seed_blocks(config.seed_list, arm, training_sets(arm.loop, config.generations, source.pool))
    seeds = next(block for block in blocks if seed in block)
    generations = list(chain(name, arm, seeds, config.generations, source))[:number]
    store, last = TaskStore(directory / "tasks"), generations[-1]
    title = f"{name}, seed {seed}, generation {number}" + ("" if row is None else f", sample {row}")
    lines = [Text(title, style="bold")]
    if row is not None:
        if not last.drawn:
            raise ConfigError(f"{sample}: no later generation reads samples of generation {number}, so none were drawn")
        batch = next((batch for batch in last.drawn if batch.start <= row < batch.stop), None)
        if batch is None:
            raise ConfigError(f"{sample}: generation {number} drew {last.drawn[-1].stop} samples, counted from 0")
        how = f"drawn by model {last.fit.key}, sampling bias {arm.loop.sampling_bias:g}, "
        how += f"stream sampling/{number}/{batch.start}, number {row - batch.start} of it"
        again = batch.task is last.fit
        stored = "drawn again where it is read" if again else f"stored in {store.path(batch.task.key)}"
        lines.append(Text(f"{how}; {stored}"))
    headings = ("generation", "trained on", "real", "real through", "distinct real samples behind", "model")
    table = plain_table(headings)
    for generation, behind in reversed(list(zip(generations, ancestry(generations, seed), strict=True))):
        through = float(np.arange(len(behind.hops)) @ behind.hops)
        table.add_row(
            f"G{generation.number}",
            contents(generation.manifest),
            f"{behind.hops[0]:.1%}",
            f"{through:.2f} generations",
            f"{len(behind.real):,}",
            generation.fit.key[:12] + ("" if generation.fit.key in store else " (not trained yet)"),
        )
    return Group(*lines, Text(""), table)


def _parse(sample: str, config: MadConfig) -> tuple[str, int, int, int | None]:
    """(arm, seed, generation, number or None); arms may have slashes in their names."""
    for name in config.resolved_arms:
        rest = sample.removeprefix(f"{name}/").split("/")
        if sample.startswith(f"{name}/") and 2 <= len(rest) <= 3 and all(part.isdecimal() for part in rest):
            seed, number = int(rest[0]), int(rest[1])
            if seed in config.seed_list and 1 <= number <= config.generations:
                return name, seed, number, int(rest[2]) if len(rest) == 3 else None
    raise ConfigError(
        f"no sample {sample!r}: give ARM/SEED/GENERATION or ARM/SEED/GENERATION/NUMBER with an arm of "
        f"{', '.join(config.resolved_arms)}, a seed of {config.seed_list[0]} to {config.seed_list[-1]}, "
        f"a generation of 1 to {config.generations}"
    )
