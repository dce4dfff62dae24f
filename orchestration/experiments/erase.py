"""A study: can a concept be erased from a text-to-image model's weights, and what else goes with it?

ESD (2303.07345) in its variants beside UCE (2308.14761). Controls: the pipeline as it came (``base``); the same job for
a word that no prompt uses (``unused``); and ESD to the letter (``esd-x-paper``: the empty prompt is neutral, and no
answer to another prompt is held). The judges, an evaluator and a captioner, take no part in the training.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.prompts import naming, read_prompts, renamed
from pipelines.storage.locations import check_model, find, fingerprint, portable
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.erasing import ErasingSettings
from policies.rl.settings import Settings

ERASED = ("esd-x", "esd-x-strict", "esd-u", "uce")


class Concept(Settings):
    """What is erased, and what is claimed of it."""

    word: str = Field(min_length=1, description="the concept, as prompts name it")
    instead: tuple[str, ...] = Field((), description="words for it in neutral prompts; none: ∅, as in the papers")
    unused: str = Field("telephone", min_length=1, description="the control's word, which no prompt uses")
    guidance_scale: float = Field(1.0, ge=1, description="of the images that are judged")
    left: float = Field(0.35, gt=0, le=1, description="claimed: at most this share of the judged images still shows it")
    relative: bool = Field(False, description="the share is of those that showed it before")

    @property
    def key(self) -> str:
        """The word in names of files and metrics."""
        return re.sub(r"\W+", "-", self.word.lower()).strip("-") or "concept"


class Judging(Settings):
    """The images that are judged, so many for each prompt, and who judges them."""

    images_per_prompt: int = Field(4, ge=1, description="images of each prompt that are judged")
    steps: int = Field(10, ge=1, le=1000, description="DDIM steps, with η = 1")
    batch: int = Field(90, ge=1, description="images drawn at once")
    evaluator: str | None = Field("models/digits/evaluator", description="says what an image shows; null: none")
    captioner: str | None = Field("models/digits/captioner", description="whose captions name it or not; null: none")


class Erase(Study):
    """Erases each concept by each arm, and judges what is left of it and of everything else."""

    scale: ClassVar = "share"  # of the judged images
    study: str = "erase"
    name: str = "erase"
    arms: tuple[str, ...] = ("base", *ERASED, "esd-x-paper", "unused")
    path: str = Field("models/digits/pipeline", description="a directory of Stable Diffusion 1.x or 2.x")
    prompts: str = Field("configs/prompts/digits.txt", description="a file: those that name the concept, and others")
    concepts: tuple[Concept, ...] = Field((Concept(word="red"),), min_length=1, description="erased one at a time")
    erasing: ErasingSettings = ErasingSettings()
    learning_rates: dict[str, float] = Field({}, description="of an arm, in place of erasing.learning_rate")
    judging: Judging = Judging()
    harm: float = Field(0.05, gt=0, lt=1, description="claimed: other accuracies fall by no more than this")

    def preflight(self) -> None:
        """The pipeline is one that can be erased from, and the judges know the concepts."""
        check_pipeline(self.path, "StableDiffusionPipeline")
        texts, slots = read_prompts(self.prompts)[0], self._slots()
        if len({each.key for each in self.concepts}) < len(self.concepts):
            raise ValueError("concepts: give each once")
        for word, unused in [(concept.word, concept.unused) for concept in self.concepts]:
            if len({naming(word, text) is None for text in texts}) < 2:
                raise ValueError(f"concepts: some prompts of {self.prompts!r} have to name {word!r}, not all")
            if any(naming(unused, text) for text in texts):
                raise ValueError(f"concepts: unused {unused!r} is in {self.prompts!r}; choose another word")
            if slots and not any(word in words for words in slots.values()):
                raise ValueError(f"concepts: {self.judging.evaluator!r} knows no {word!r}; set it to null")
        if unknown := [arm for arm in self.learning_rates if arm not in type(self).model_fields["arms"].default]:
            raise ValueError(f"learning_rates: {unknown[0]!r} is no arm")
        if self.judging.captioner:
            check_model(self.judging.captioner, "config.json", "judging.captioner")
        elif not slots:
            raise ValueError("judging: name an evaluator or a captioner")

    def reads(self) -> Mapping[str, str]:
        """Pipeline, prompts and judges."""
        judges = {"judging.evaluator": self.judging.evaluator, "judging.captioner": self.judging.captioner}
        return {"path": self.path, "prompts": self.prompts} | {key: at for key, at in judges.items() if at}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """For each concept the erased pipeline, and what is left of the concept in it."""
        from pipelines.studies.erase import erase, measure

        texts, found = read_prompts(self.prompts)[0], list[Task]()
        judging = self.judging.model_dump()
        judging |= {who: portable(judging[who]) for who in ("evaluator", "captioner") if judging[who]}
        for concept in self.concepts:
            common = {"path": portable(self.path), "key": concept.key, "seed": seed, "read": self._digests}
            label = f"{concept.word}, {arm}, seed {seed}"
            job = common | self._job(arm, concept, texts)
            erased = [task(erase, job, label=label, divisible=arm != "uce")] if arm != "base" else []
            asked = {**common, **judging, "concept": concept.word, "prompts": texts}
            asked["guidance_scale"] = concept.guidance_scale
            found += [*erased, task(measure, asked, *erased, label=f"{label}, judged")]
        return found

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for key, at in sorted(self.reads().items()) if key != "prompts"}

    def _job(self, arm: str, concept: Concept, texts: list[str]) -> dict[str, Any]:
        """Which concept is erased from which prompts, and how."""
        rate = self.learning_rates.get(arm, self.erasing.learning_rate)
        settings = self.erasing.model_dump() | {"learning_rate": rate}
        word, instead = concept.word, list(concept.instead)
        if arm == "esd-x-paper":
            instead, settings["retain"] = [], 0.0
        if arm == "unused":  # the concept's own prompts are neither trained on nor held
            word, texts = concept.unused, [renamed(text, concept.word, concept.unused) for text in texts]
        variant = arm if arm in ERASED else "esd-x"
        return {"concept": word, "prompts": texts, "instead": instead, "variant": variant, "settings": settings}

    def claims(self) -> Iterator[Claim]:
        """Of each concept and arm that erases: it goes, by both judges, and the rest stays; and of the controls."""
        for concept in self.concepts:
            yield from self._claims(concept)

    def _claims(self, concept: Concept) -> Iterator[Claim]:
        word, key, slots = concept.word, concept.key, self._slots()

        def stays(sentence: str, metric: str, arm: str) -> Claim:
            return Claim(sentence, f"{key}/{metric}", arm, "at least", -self.harm, "base", "difference")

        judges = {"target": "the evaluator sees"} if slots else {}
        judges |= {"mentioned": "captions name"} if self.judging.captioner else {}
        kept = {"others" if word in words else slot: slot for slot, words in slots.items()}
        how: Any = {"scale": "share"} | ({"control": "base", "kind": "ratio"} if concept.relative else {})
        for arm in (*ERASED, "esd-x-paper"):
            for metric, says in judges.items():
                much = "less" if concept.relative else "seldom"
                sentence = f"{arm} erases {word}: where it is asked for, {says} it {much}"
                yield Claim(sentence, f"{key}/{metric}", arm, "at most", concept.left, **how)
            for metric, slot in kept.items():
                yield stays(f"{arm} of {word}: each {slot} that other prompts ask for stays", metric, arm)
        for metric in judges:
            yield stays(f"control: erasing {concept.unused!r} leaves {word} ({metric})", metric, "unused")

    def _slots(self) -> dict[str, list[str]]:
        """What the evaluator tells apart, by slot."""
        if self.judging.evaluator is None:
            return {}
        found = find(self.judging.evaluator)
        classes = read_json(found / "config.json").get("classes") if found else None
        if not isinstance(classes, dict):
            raise ValueError(f"judging.evaluator: {self.judging.evaluator!r} is no directory of an evaluator")
        return classes
