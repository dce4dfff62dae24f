"""The MAD loop: mix → fit → sample → measure → commit (Alemohammad et al., 2307.01850).

A generation's training set is a pure function of the settings, so every chain is known before anything is trained: a
graph of tasks, each named by the hash of what it depends on. Ray runs what is not stored yet, arms and seeds beside
each other, the measuring of one generation beside the training of the next. The same command again goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.experiments.mad.config import ArmSettings, MadConfig
from orchestration.experiments.mad.preflight import Experiment, preflight_mad
from orchestration.experiments.mad.report import report
from orchestration.experiments.mad.run import MadRun
from pipelines.mad.graph import Batch, Chain, Generation, RealSource, batches
from pipelines.mad.tasks import perform
from pipelines.storage.tasks import Task
from policies.loops.training_sets import training_sets


def run_mad(config: MadConfig, trusted: bool = False, changes: bool = False, figures: bool = True) -> Path:
    """Run a MAD experiment, or go on with it. Returns the path of summary.json. Raises ConfigError before it starts,
    also if another began it and it is not ``trusted``, or it would read other things and no ``changes`` are accepted.
    ``figures``: whether to draw any.
    """
    experiment = preflight_mad(config)
    generations = unroll(config, experiment)
    wanted = [task for each in generations for task in (each.model, each.evaluation, each.measure) if task]
    with MadRun(config, experiment, generations, trusted, changes) as run:
        run.perform(perform, [*experiment.floors.values(), *wanted], experiment.gpus, experiment.resources)
        return report(run, figures)


def unroll(config: MadConfig, experiment: Experiment) -> list[Generation]:
    """Every chain of the experiment, generation by generation, so that arms and seeds advance together."""
    chains = [
        chain(name, arm, seeds, config.generations, experiment.sources[name], experiment.words.get(name))
        for name, arm in config.resolved_arms.items()
        for seeds in experiment.blocks[name]
    ]
    return [generation for together in zip(*chains, strict=True) for generation in together]


def chain(
    name: str,
    arm: ArmSettings,
    seeds: Sequence[int],
    generations: int,
    source: RealSource,
    words: Mapping[str, Any] | None = None,
) -> Iterator[Generation]:
    """The generations of one arm, each trained on what the data rule takes of real data and of earlier generations."""
    common = name, arm.loop, arm.family, arm.family_settings(source.classes), seeds, source
    tasks = Chain(*common, arm.refinement_content, words)
    manifests = training_sets(arm.loop, generations, source.pool)
    read = batches(manifests)
    drawn: dict[Batch, Task] = {}
    model = captioner = None
    goes_on = arm.loop.fine_tunes or arm.generator.goes_on(arm.generator_settings)
    for manifest in manifests:
        number = manifest.generation
        last = number == generations
        fit = tasks.fit(manifest, drawn, start=model if goes_on else None, kept=last)
        model = tasks.refine(fit, number, kept=last)
        captioner = tasks.captioner(manifest, drawn, captioner)
        evaluation = tasks.evaluation(model, number)
        measure = tasks.measure(model, evaluation, manifest, drawn)
        new = tuple(tasks.sample(model, number, *ends, captioner) for ends in read[number].items())
        drawn |= {(number, batch.start): batch.task for batch in new}
        yield Generation(name, tuple(seeds), number, manifest, fit, model, new, evaluation, measure)
