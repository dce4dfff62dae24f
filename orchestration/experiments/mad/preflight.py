"""Everything that can be wrong with a MAD experiment, found before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.mad.config import GENERATOR_KEYS, ArmSettings, MadConfig
from orchestration.experiments.task_run import check_same, task_resources
from orchestration.runs.config import about, validate
from orchestration.runs.run import TEMPLATES
from pipelines.data.real_data import DataSettings, RealData, load_real_data, split_reference
from pipelines.mad.captions import CaptionsSettings
from pipelines.mad.graph import CLASSIFIER, SELF_SUPERVISED, TRAINED, RealSource, image_source
from pipelines.pages import fill
from pipelines.rewards import RewardError
from pipelines.settings import RewardSettings
from pipelines.storage.atomic import Files, content_digest
from pipelines.storage.locations import check_model, fingerprint
from pipelines.storage.tasks import Task
from policies.common.user_code import calling, noted
from policies.loops.training_sets import Manifest, training_sets

_UNIVERSE_NUMBERS = 2**22  # of float64, in the training sets of one task: 32 MB
_MOST_NUMBERS = 2**28  # in one training set: 2 GB
_MOST_UNIVERSES = 1000
_LEAST_REFERENCE, _MOST_REFERENCE = 20, 20_000  # precision and recall look at 5 neighbours, and at every pair


@dataclass(frozen=True)
class Experiment:
    """An experiment that can be run: real data, training sets, and how the work is cut."""

    sources: dict[str, RealSource]  # by arm
    manifests: dict[str, list[Manifest]]  # by arm
    blocks: dict[str, list[tuple[int, ...]]]  # by arm: the seeds of one task
    floors: dict[str, Task]  # by family: what the metrics say of real samples
    images: RealSource | None  # real images, if an arm is trained on such
    real_files: dict[str, Files]  # by key, of the tasks that nobody does: the real images, and a model given
    found: list[str]  # what real images were found, in words
    words: dict[str, dict[str, Any]]  # by arm, of those that learn from captions: what their tasks are given
    read: dict[str, str]  # models that tasks read, by the setting that names them
    gpus: int
    resources: dict[str, Any]  # of one task, and the longest wait


def preflight_mad(config: MadConfig, machine: Machine | None = None) -> Experiment:
    """Check ``config`` against the real data and a machine, by default the one it would run on. Raises ConfigError."""
    arms = config.resolved_arms
    with about(), calling(sorted({name for arm in arms.values() for name in arm.foreign})):
        config.check_arms()
        for name, arm in arms.items():
            with config.about_arm(name):
                arm.generator.check(arm.generator_settings, arm.loop)
                if arm.refined:
                    arm.refined.check(arm.generator, arm.generator_settings, arm.loop)
                if arm.loop.needs_truth and not arm.generator.closed_form:
                    raise ValueError(
                        f"rule {arm.rule} draws from the truth, which family {arm.family} has only data of"
                    )
        check_same("mad", config, lambda held: _differing(config, validate(MadConfig, held)))
        reference = config.data.reference
        compared = not all(arm.generator.many_universes for arm in arms.values())
        if compared and not _LEAST_REFERENCE <= reference <= _MOST_REFERENCE:
            raise ValueError(
                f"data.reference is {reference}: metrics need {_LEAST_REFERENCE} real samples or more, and compare "
                f"each pair, of {_MOST_REFERENCE} samples at most"
            )
        trained = [arm for arm in arms.values() if not arm.generator.closed_form]
        real = load_real_data(config.data) if trained else None
        if real and real.labels is not None and not real.labels.any():
            real = replace(real, labels=None)  # of one class there is nothing to tell
        images, files, found = _image_source(config.data, real, trained) if real else (None, {}, [])
        points = RealSource(reference)
        sources = {name: images if images and arm in trained else points for name, arm in arms.items()}
        read: dict[str, str] = {}
        words = {}
        for name, arm in arms.items():
            with config.about_arm(name):
                if found_words := _words_of(arm, read):
                    words[name] = found_words
        manifests = {}
        for name, arm in arms.items():
            with config.about_arm(name):
                manifests[name] = training_sets(arm.loop, config.generations, sources[name].pool)
                if not (arm.generator.captioned and arm.loop.worded_reward()):
                    arm.loop.check_family(arm.family, sources[name].classified > 0)
                _check_sizes(arm, manifests[name], real.images[0].size if real else 1)
                _check_reward(arm, real if arm in trained else None)
        divisible = any(arm.generator.shares_training for arm in trained)
        gpus, resources = task_resources(config.workers, machine, bool(trained), divisible)
    blocks = {name: seed_blocks(config.seed_list, arm, manifests[name]) for name, arm in arms.items()}
    floors = {arm.family: task for name, arm in arms.items() if (task := _floor(arm, sources[name]))}
    return Experiment(sources, manifests, blocks, floors, images, files, found, words, read, gpus, resources)


def describe_mad(config: MadConfig, experiment: Experiment) -> str:
    """What a dry run prints: who is trained on what, and how much work that is."""
    return fill(TEMPLATES / "mad_plan.txt", config=config, experiment=experiment, contents=contents)


def contents(manifest: Manifest) -> str:
    """A training set in words."""
    by_source: Counter[str] = Counter()
    for part in manifest.parts:
        by_source[part.role if part.generation == 0 else f"of G{part.generation}"] += part.size
    drawn = f"{manifest.subsample} drawn from " if manifest.subsample else ""
    return drawn + " + ".join(f"{count} {source}" for source, count in by_source.items())


def seed_blocks(seeds: list[int], arm: ArmSettings, manifests: list[Manifest]) -> list[tuple[int, ...]]:
    """Seeds that one task does together. It depends on the settings alone, so that a rerun finds its tasks again."""
    size = 1
    if arm.generator.many_universes:
        numbers = max(arm.generator.numbers(arm.generator_settings, manifest.size) for manifest in manifests)
        size = max(1, min(_MOST_UNIVERSES, _UNIVERSE_NUMBERS // numbers))
    return [tuple(seeds[start : start + size]) for start in range(0, len(seeds), size)]


def _check_sizes(arm: ArmSettings, manifests: list[Manifest], image: int) -> None:
    """A training set needs memory, and what its generator asks for."""
    for manifest in manifests:
        number, size = manifest.generation, manifest.size
        if (held := arm.generator.numbers(arm.generator_settings, size, image)) > _MOST_NUMBERS:
            raise ValueError(f"generation {number} has {size} samples, {held:.1e} numbers: {_MOST_NUMBERS:.1e} at most")
    arm.generator.check_sets(arm.generator_settings, arm.loop, manifests)


def _words_of(arm: ArmSettings, read: dict[str, str], known: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """What the tasks of an arm that learns from captions are given beside their generator; None: it does not. The
    models that they read are put into ``read`` by the setting that names them; ``known`` are their contents by place,
    of a run that was begun. Raises ValueError if one of them is not there."""
    captions, settings, reward = arm.captions, arm.generator_settings, arm.rewarded
    if not arm.generator.captioned:
        if captions != CaptionsSettings():
            raise ValueError(f"captions: family {arm.family} learns from none; text_to_image and gigagan do")
        return None
    if (captions.share or captions.refitted) and settings.captioner is None:
        raise ValueError(
            f"captions.share and captions.refitted need {arm.family}.captioner, whose words they are about"
        )
    if captions.refitted and not captions.share:
        raise ValueError("captions.refitted trains a captioner whose words nobody reads: set captions.share above 0")
    paths = {name: getattr(settings, name) for name in ("path", "captioner", "evaluator") if getattr(settings, name)}
    for name, function in (reward.functions if reward else {}).items():
        paths |= {f"reward.{name}.{option}": path for option, path in function.model_paths.items()}
    _check_words(arm.family, reward, paths)
    digests = {name: fingerprint(path)["sha256"] for name, path in paths.items()}
    read |= {f"{arm.family}.{name}": path for name, path in paths.items()}
    rewarded = reward.model_dump(mode="json", include={"function", "options"}) if reward else None
    return {"captions": captions.model_dump(), "reward": rewarded, "read": digests}


def _check_words(family: str, reward: RewardSettings | None, paths: Mapping[str, str]) -> None:
    """The models are there, and a reward can be called on two images."""
    for name, path in paths.items():
        if name in ("captioner", "evaluator"):
            check_model(path, "config.json", f"{family}.{name}")
    if reward is None:
        return
    if reward.needs_captions and not paths.get("captioner"):
        raise ValueError(f"reward {reward.title} reads captions: name {family}.captioner")
    images, words = np.zeros((2, 16, 16, 3), np.uint8), ["one image", "another"]
    for name, function in reward.functions.items():
        function.check_call(name)
        function.try_out(name, images, words, words if paths.get("captioner") else None)


def _check_reward(arm: ArmSettings, real: RealData | None) -> None:
    """One's own functions have to answer for two real samples."""
    if not arm.loop.functions or (arm.generator.captioned and arm.loop.worded_reward()):
        return
    if real is None:
        values, labels = arm.generator.truth(arm.generator_settings, [0], 0, 2).values[0], None
    else:
        values, labels = real.images[:2], real.labels
        labels = labels[:2] if arm.generator.conditional and labels is not None else None
    try:
        arm.loop.probe(values, labels)
    except RewardError as error:
        raise noted(ValueError(f"of two real samples: {error}"), error) from error


def _image_source(
    data: DataSettings, real: RealData, arms: Sequence[ArmSettings]
) -> tuple[RealSource, dict[str, Files], list[str]]:
    """The images that models learn from and are measured by, their files by key, and what was found, in words."""
    from pipelines.mad.tasks import real_data_files

    height, width = real.images.shape[1:3]
    for arm in arms:
        least, multiple = arm.generator.least_side, arm.generator.side_multiple(arm.generator_settings)
        lacking = f"of {least} pixels at least" if min(height, width) < least else None
        lacking = lacking or (f"that are multiples of {multiple}" if height % multiple or width % multiple else None)
        if lacking:
            raise ValueError(f"family {arm.family} needs sides {lacking}, not {height}×{width}: set data.image_size")
    count, wanted, least = len(real.images), data.reference, _LEAST_REFERENCE
    if count <= 2 * wanted:
        how = f"give {least} to {(count - 1) // 2}" if count > 2 * least else f"{2 * least + 1} images are the least"
        raise ValueError(
            f"data.reference: {wanted} of {count} images leave {max(0, count - wanted)} to learn from, too few to "
            f"measure as many real images beside them: {how}"
        )
    classes = 0 if real.labels is None else int(real.labels.max()) + 1
    kind = data.extractor or (CLASSIFIER if classes else SELF_SUPERVISED)
    if kind == CLASSIFIER and not classes:
        raise ValueError(
            "data.extractor: a classifier needs labels of two classes or more: put the images of each into a directory "
            "of its own, name data.label_column, or set self_supervised, which needs none"
        )
    for arm in arms:
        if arm.generator.captioned and real.captions is None:
            raise ValueError(
                f"family {arm.family} learns from captions, and the images have none: name data.caption_column, or use "
                "data.source=captioned_digits"
            )
        arm.generator.check_classes(arm.generator_settings, classes)
        settled = arm.generator.settled(arm.generator_settings, classes)
        arm.generator.check(settled, arm.loop)
        if arm.loop.relabels and not (arm.generator.conditional and getattr(settled, "classes", 1)):
            raise ValueError(
                f"rule {arm.rule} gives samples labels, which family {arm.family} would not learn here: use "
                "family=diffusion, without diffusion.classes, and images with labels"
            )
    given, look = Files(), kind
    if kind not in TRAINED:
        from pipelines.measures.features import given_extractor

        look = content_digest(given := given_extractor(kind, real.images[:2]))
    pool, reference = split_reference(real, wanted)
    source = image_source(real.sha256, len(reference), len(pool), classes, look)
    held = {"data": real_data_files(real, pool, reference), "model": given}
    found = [*real.describe(), f"{len(pool):,} of them to learn from, {len(reference):,} kept apart for the metrics"]
    if kind != CLASSIFIER:
        how = "trained on the former, without labels" if kind == SELF_SUPERVISED else kind
        found.append(f"the metrics' extractor: {how}; class_entropy and label_accuracy need labels and are left out")
    return source, {task.key: held[task.kind] for task in source.stored}, found


def _floor(arm: ArmSettings, source: RealSource) -> Task | None:
    """The task that measures real samples in place of generated ones."""
    if source.tasks:
        return Task("floor", {"family": "images", "classes": source.classified}, tuple(source.tasks), "floor")
    if arm.generator.many_universes:
        return None
    parameters = {"family": arm.family, "settings": arm.family_settings(), "samples": source.samples}
    return Task("floor", parameters, (), "floor")


def _differing(config: MadConfig, held: MadConfig) -> list[str]:
    """In what ``held`` is no part of ``config``."""
    differing = [key for key in ("name", "data") if getattr(held, key) != getattr(config, key)]
    for name, arm in held.resolved_arms.items():
        now = _essence(config.resolved_arms[name]) if name in config.resolved_arms else {}
        changed = [key for key, value in _essence(arm).items() if now.get(key) != value]
        differing += [f"arms.{name}.{key}" if held.arms else key for key in changed]
    fewer = held.generations > config.generations or not set(held.seed_list) <= set(config.seed_list)
    return differing + ["fewer generations or seeds"] * fewer


def _essence(arm: ArmSettings) -> dict[str, Any]:
    """What an arm's results depend on."""
    shown = arm.model_dump(exclude=GENERATOR_KEYS)
    return shown if ":" in arm.family else shown | arm.family_settings()  # a stranger's is not imported
