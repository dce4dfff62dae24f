"""The tasks of one chain of generations: what each depends on, and so what it is called.

A task names only what its result depends on. That is why generation 1 of two arms, or any prefix on which they agree,
is one task with one key, and is done once.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.generators import GENERATORS
from pipelines.storage.tasks import Task
from policies.loops.rules import Rule
from policies.loops.training_sets import REAL, Manifest

CLASSIFIER, SELF_SUPERVISED = TRAINED = ("classifier", "self_supervised")  # extractors that are trained on the pool


@dataclass(frozen=True)
class RealSource:
    """Where real samples come from: a distribution, or images with the extractor that looks at them."""

    samples: int  # that a generation is measured with, and as many real ones
    pool: int | None = None  # real images that models may be trained on; None: a distribution, endless
    data: Task | None = None  # images, or what gives the others of them labels
    extractor: Task | None = None
    classes: int = 0  # of their labels; 0: none
    look: str = ""  # the extractor, as ``image_source`` is given it

    @property
    def tasks(self) -> list[Task]:
        """Those that real images come from and are looked at by."""
        return [task for task in (self.data, self.extractor) if task]

    @property
    def classified(self) -> int:
        """How many classes the extractor tells apart; 0: it is no classifier."""
        return self.classes if self.look == CLASSIFIER else 0

    @property
    def stored(self) -> list[Task]:
        """Those that nobody does: the real images, and the files of an extractor that is given."""
        read = self.extractor.inputs if self.extractor else ()
        return [stored for task in read for stored in (task.inputs if task.kind == "label" else (task,))]

    @property
    def labeller(self) -> dict[str, Any] | None:
        """What gives images without labels theirs: the settings of MAVEN; None: all have labels, or none has."""
        return self.data.parameters["settings"] if self.data and self.data.kind == "label" else None

    @property
    def described(self) -> dict[str, Any]:
        """Of images, what :func:`image_source` makes an equal source from."""
        about: dict[str, Any] = {"samples": self.samples, "pool": self.pool, "classes": self.classes}
        about |= {"extractor": self.look, **({"labeller": self.labeller} if self.labeller else {})}
        return about | {"sha256": self.stored[0].parameters["sha256"] if self.stored else None}


def image_source(
    sha256: str,
    samples: int,
    pool: int,
    classes: int,
    extractor: str = CLASSIFIER,
    labeller: Mapping[str, Any] | None = None,
) -> RealSource:
    """The source of images whose content is ``sha256``: ``samples`` of them are the reference, ``pool`` the rest.

    ``extractor`` is one that is trained on the pool, "classifier" or "self_supervised", or the digest of a model. With
    a ``labeller``, settings of MAVEN, it labels those of the pool that have no label before anything else is done.
    """
    data = Task("data", {"sha256": sha256, "reference": samples}, label="real data")
    if labeller:
        data = Task("label", {"settings": labeller, "seed": 0}, (data,), "labels of the images that have none")
    given = [] if extractor in TRAINED else [Task("model", {"sha256": extractor}, label="feature extractor")]
    eye = Task("extractor", {"classes": classes if extractor == CLASSIFIER else 0}, (data, *given), "extractor")
    return RealSource(samples, pool, data, eye, classes, extractor)


@dataclass(frozen=True)
class Chain:
    """Task by task, the generations of one arm in some universes (seeds)."""

    name: str
    loop: Rule
    family: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    source: RealSource
    refinement: Mapping[str, Any] | None = None  # its name and settings
    words: Mapping[str, Any] | None = None  # of a family that learns from captions, see ``Words``

    @property
    def _common(self) -> dict[str, Any]:
        return {"family": self.family, "settings": dict(self.settings), "seeds": list(self.seeds)}

    @property
    def _generator(self) -> Any:
        return GENERATORS.find(self.family)

    def fit(self, manifest: Manifest, drawn: Mapping["Batch", Task], start: Task | None, kept: bool) -> Task:
        """Train the model of a generation on its manifest, going on from ``start`` if there is one.

        Moments of many universes are large and quick to make again, so they stay on the disk only if ``kept``.
        """
        parameters, inputs = self._training_set(manifest, drawn)
        inputs += [start] if start else []
        parameters |= {"fine_tunes": start is not None, **self._read("path")}
        kept, divisible = kept or not self._generator.many_universes, self._generator.shares_training
        return self._task("fit", manifest.generation, parameters, inputs, kept, divisible)

    def refine(self, model: Task, generation: int, kept: bool) -> Task:
        """Do to a fitted model what this arm does to it before it draws."""
        if self.refinement is None:
            return model
        about = {"generation": generation, "sampling_bias": self.loop.sampling_bias}
        parameters = {**self._common, **self.refinement, **about, **self._read("path", "captioner", "reward")}
        return self._task("refine", generation, parameters, [model], kept or not self._generator.many_universes)

    def captioner(self, manifest: Manifest, drawn: Mapping["Batch", Task], before: Task | None) -> Task | None:
        """Train the captioner on, with what a generation is fed; None: it stays as it is."""
        if not self.words or not self.words["captions"]["refitted"]:
            return None
        parameters, inputs = self._training_set(manifest, drawn)
        parameters |= {"updates": self.words["captions"]["refitted"], "trained": before is not None}
        parameters |= self._read("captioner")
        return self._task("captioner", manifest.generation, parameters, [*inputs, *([before] if before else [])])

    def sample(self, model: Task, generation: int, start: int, stop: int, captioner: Task | None = None) -> "Drawn":
        """Draw a batch that later generations are trained on; closed forms draw it wherever they need it."""
        if self._generator.closed_form:
            return Drawn(model, start, stop)
        selection = self.loop.selection()
        judges = self.source.tasks[1:] if self.source.classified and selection else []
        judges = [*judges, *([self.source.data] if self.source.data and selection and "real" in selection else [])]
        parameters = {"selection": selection, "role": "training", "start": start, "count": stop - start}
        if self.words and (captions := self.words["captions"])["share"]:
            judges = [*judges, *([captioner] if captioner else [])]
            parameters |= {"captions": {"share": captions["share"], "refitted": captioner is not None}}
            parameters |= self._read("captioner")
        if self.words and selection:
            parameters |= self._read("captioner", "reward")
        return Drawn(self._draw(model, generation, parameters, judges), start, stop)

    def evaluation(self, model: Task, generation: int) -> Task | None:
        """Draw what a generation is measured by, from the same latent seeds each time. Closed forms need none."""
        if self._generator.closed_form:
            return None
        return self._draw(model, generation, {"role": "evaluation", "count": self.source.samples}, [])

    def measure(self, model: Task, evaluation: Task | None, manifest: Manifest, drawn: Mapping["Batch", Task]) -> Task:
        """Measure a generation: its moments, or its samples beside the reference and its training set."""
        if evaluation is None:
            parameters: dict[str, Any] = {"samples": self.source.samples, "sampling_bias": self.loop.sampling_bias}
            return self._task("measure", manifest.generation, self._common | parameters, [model])
        parameters, training = self._training_set(manifest, drawn)
        inputs = [evaluation, *self.source.tasks, *training]
        parameters |= {"classes": self.source.classified, **self._read("captioner", "evaluator", "reward")}
        if self.words and self.words["reward"]:
            parameters |= {"reward": self.words["reward"]}
        return self._task("measure", manifest.generation, parameters, inputs)

    def _read(self, *kinds: str) -> dict[str, Any]:
        """Of a family of captions, what its task reads beside its inputs: contents by name."""
        known = self.words["read"] if self.words else {}
        found = {name: sha256 for name, sha256 in known.items() if name.split(".")[0] in kinds}
        return {"read": found} if found else {}

    def _training_set(self, manifest: Manifest, drawn: Mapping["Batch", Task]) -> tuple[dict[str, Any], list[Task]]:
        """Parameters and inputs from which a manifest's samples can be read or drawn."""
        parameters: dict[str, Any] = {**self._common, "manifest": manifest.as_json()}
        inputs: dict[str, Task] = {}  # by key
        read: list[Task | None] = []  # for each part: what it is read or drawn from; None: a distribution
        for part in manifest.parts:
            read.append(self.source.data if part.generation == REAL else drawn[part.generation, part.start])
            if part.generation != REAL and self._generator.closed_form:
                parameters |= {"sampling_bias": self.loop.sampling_bias, "selection": self.loop.selection()}
            inputs |= {task.key: task for task in read[-1:] if task}
        numbers = {key: number for number, key in enumerate(inputs)}
        return parameters | {"sources": [task and numbers[task.key] for task in read]}, [*inputs.values()]

    def _draw(self, model: Task, generation: int, parameters: dict[str, Any], inputs: Sequence[Task]) -> Task:
        about = {"generation": generation, "checkpoint": model.key, "sampling_bias": self.loop.sampling_bias}
        return self._task("sample", generation, self._common | about | parameters, [model, *inputs])

    def _task(
        self,
        kind: str,
        generation: int,
        parameters: Mapping[str, Any],
        inputs: Sequence[Task],
        kept: bool = True,
        divisible: bool = False,
    ) -> Task:
        seeds = "–".join(map(str, dict.fromkeys((self.seeds[0], self.seeds[-1]))))
        label = f"{self.name}, seed {seeds}, generation {generation}: {kind}"
        return Task(kind, parameters, tuple(inputs), label, kept, divisible)


Batch = tuple[int, int]  # a generation, and the number of the first sample


@dataclass(frozen=True)
class Drawn:
    """Samples ``start`` to ``stop`` of a generation: a stored set, or the model that draws them wherever needed."""

    task: Task
    start: int
    stop: int


@dataclass(frozen=True)
class Generation:
    """One generation of one arm in some universes: its training set, its tasks, and what it drew for others."""

    arm: str
    seeds: tuple[int, ...]
    number: int
    manifest: Manifest
    fit: Task
    model: Task  # what draws: the fit, or what it was refined to
    drawn: tuple[Drawn, ...]  # for later generations
    evaluation: Task | None
    measure: Task


def batches(manifests: Iterable[Manifest]) -> dict[int, dict[int, int]]:
    """What each generation has to draw for later ones: where each batch begins, and where it ends."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for manifest in manifests:
        for part in manifest.parts:
            if part.generation != REAL:
                found[part.generation][part.start] = part.stop
    return found
