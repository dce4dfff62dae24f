"""A study: are there weights in a text-to-image model that make it draw a subject once they are shut?

Cones (2303.05125) on the keys and values of cross-attention: an unused word stands for a subject in the captions of a
few images, and weights whose gradient says that a smaller one lowers DreamBooth's loss are set to 0. Controls: the
pipeline as it came, as many weights at random, and those of the smallest statistic. The judge, an evaluator, takes no
part in the search.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.prompts import naming, read_prompts, unused
from pipelines.data.real_data import DataSettings, RealData, load_real_data
from pipelines.denoisers import inspect
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.neurons import NeuronSettings
from policies.rl.settings import Settings

_MASKS = {"shut": "largest", "reversed": "smallest", "random": "random"}  # of the statistic that implants


class Subject(Settings):
    """What is implanted, under which word."""

    concept: str = Field(min_length=1, description="the subject, as captions and prompts name it")
    word: str = Field(min_length=1, description="an unused word of the vocabulary that is to stand for it")
    stray: str = Field(min_length=1, description="another unused word, which is not to")


class Neurons(Study):
    """Finds the neurons of each subject, shuts them, and judges what its word makes the pipeline draw."""

    study: str = "neurons"
    name: str = "neurons"
    arms: tuple[str, ...] = ("base", *_MASKS, "union", "ablated")
    path: str = Field("models/digits/pipeline", description="a directory of Stable Diffusion 1.x or 2.x")
    data: DataSettings = Field(DataSettings(source="captioned_digits"), description="captioned images to learn from")
    prompts: str = Field("configs/prompts/digits.txt", description="a file: those that name a subject, and others")
    subjects: tuple[Subject, ...] = Field(
        (Subject(concept="blue", word="x", stray="m"),), min_length=1, description="each by itself, and their union"
    )
    images: int = Field(20, ge=1, description="of a subject, to learn from; its others are what losses are measured on")
    prior_images: int = Field(1000, ge=1, description="of other subjects, to learn from; and as many to measure on")
    finding: NeuronSettings = NeuronSettings()
    images_per_prompt: int = Field(1, ge=1, description="judged images of each prompt")
    images_with_word: int = Field(3, ge=1, description="judged images of each prompt of a subject, with an unused word")
    steps: int = Field(10, ge=1, le=1000, description="DDIM steps of judged images, with η = 1")
    guidance_scale: float = Field(1.0, ge=1, description="of judged images")
    evaluator: str = Field("models/digits/evaluator", description="says what an image shows")
    fall: float = Field(0.95, gt=0, lt=1, description="claimed: L_con falls to this share of what it was")
    seen: float = Field(0.4, gt=0, lt=1, description="claimed: at least this share of a word's images show its subject")
    margin: float = Field(0.2, gt=0, lt=1, description="claimed: it is so much more than each control's share")
    harm: float = Field(0.05, gt=0, lt=1, description="claimed: accuracies of other prompts fall by no more than this")
    ablation: float = Field(0.8, gt=0, lt=1, description="claimed: ablated, a subject is seen so much less")

    def preflight(self) -> None:
        """The pipeline is one, data and prompts name each subject, and its words are unused."""
        check_pipeline(self.path, "StableDiffusionPipeline")
        files, texts, data, classes = inspect(Path(resolve_model(self.path))), self._texts, self._data, self._slots
        if data.captions is None:
            raise ValueError(f"data.source: {self.data.source!r} has no captions; name data.caption_column")
        if data.images.shape[1:] != (size := (*files.image_size, 3)):
            raise ValueError(f"data: images are {data.images.shape[1:]}, and the pipeline draws {size}: set image_size")
        captions, words = data.captions.tolist(), [word for each in self.subjects for word in (each.word, each.stray)]
        for word in words:
            if words.count(word) > 1 or not unused(word, {*captions, *texts}, files):
                told = f"is no token of {self.path!r} that captions, prompts and other subjects leave unused"
                raise ValueError(f"subjects: {word!r} {told}: give another")
        for concept in (each.concept for each in self.subjects):
            named = sum(naming(concept, text) is not None for text in captions)
            if named <= self.images or len(captions) - named <= self.prior_images:
                least = f"more than {self.images} (images), and more than {self.prior_images} others (prior_images)"
                raise ValueError(f"data: {named} of {len(captions)} captions name {concept!r}; this takes {least}")
            if len({naming(concept, text) is None for text in texts}) < 2:
                raise ValueError(f"subjects: some prompts of {self.prompts!r} have to name {concept!r}, not all")
            if not any(concept in slot for slot in classes.values()):
                raise ValueError(f"subjects: {self.evaluator!r} knows no {concept!r}; name what it tells apart")

    def reads(self) -> Mapping[str, str]:
        """Pipeline, prompts, images and judge."""
        read = {"path": self.path, "prompts": self.prompts, "evaluator": self.evaluator}
        made = self.data.source in ("digits", "captioned_digits")
        return read if made else read | {"data.source": self.data.source}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The pipelines with what is shut in them, and what these draw."""
        from pipelines.neurons import find, implant, measure

        data = self.data.model_dump() | {"source": portable(self.data.source)}
        common = {"path": portable(self.path), "data": data, "seed": seed, "read": self._digests}
        common |= {"images": self.images, "prior_images": self.prior_images}
        drawn = {
            key: getattr(self, key) for key in ("images_per_prompt", "images_with_word", "steps", "guidance_scale")
        }
        drawn |= {"prompts": self._texts, "evaluator": portable(self.evaluator), "prior": self.finding.prior}
        settings, found = self.finding.model_dump(exclude={"share"}), list[Task]()
        every: list[dict[str, Any]]
        every, sign = [each.model_dump() for each in self.subjects], -1 if arm == "ablated" else 1
        for subjects in [every] if arm in ("base", "union") else [[each] for each in every]:
            name = "-".join(each["word"] for each in subjects)
            label, made = f"{name}, {arm}, seed {seed}", list[Task]()
            if arm != "base":
                asked = [each if sign > 0 else {**each, "word": each["concept"]} for each in subjects]  # by its name
                jobs = [{**common, "subject": each, "settings": settings, "sign": sign} for each in asked]
                statistics = [task(find, job, label=f"{job['subject']['word']}, seed {seed}, searched") for job in jobs]
                job = {**common, "name": name, "mask": _MASKS.get(arm, "largest"), "share": self.finding.share}
                made = [task(implant, job, *statistics, label=label)]
            judged = {**common, **drawn, "subjects": subjects, "name": name}
            found += [*made, task(measure, judged, *made, label=f"{label}, judged")]
        return found

    @cached_property
    def _data(self) -> RealData:
        return load_real_data(self.data)

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        read = {at: fingerprint(at)["sha256"] for key, at in sorted(self.reads().items()) if key != "data.source"}
        return read | {"data": self._data.sha256}

    @cached_property
    def _texts(self) -> list[str]:
        return read_prompts(self.prompts)[0]

    def claims(self) -> Sequence[Claim]:
        """Of each subject: the loss falls, its word draws it, nothing else changes; of controls that they do less."""
        return [claim for subject in self.subjects for claim in self._claims(subject) if claim.arm in self.arms]

    def _claims(self, subject: Subject) -> Iterator[Claim]:
        concept, word = subject.concept, subject.word
        of = {"base": "as it came", "random": "with as many weights at random", "reversed": "with those of smallest S"}
        several = ("union",) if len(self.subjects) > 1 else ()

        def differs(sentence: str, metric: str, arm: str, bound: float, control: str = "base") -> Claim:
            direction: Any = "at least" if bound > 0 or bound == -self.harm else "at most"
            return Claim(sentence, f"evaluator/{word}/{metric}", arm, direction, bound, control, "difference")

        for control in ("base", "random"):
            sentence = f"L_con of {word} is less than {of[control]}"
            yield Claim(sentence, f"loss/{word}/L_con", "shut", "at most", self.fall, control, "ratio")
        for arm in ("shut", *several):
            yield Claim(f"{arm}: {word} draws {concept}", f"evaluator/{word}/target", arm, "at least", self.seen)
        for control, name in of.items():
            yield differs(f"{word} draws {concept} more often than {name}", "target", "shut", self.margin, control)
        yield Claim(
            f"shut: {subject.stray}, as unused, does not draw {concept}",
            f"evaluator/{word}/stray",
            "shut",
            "at most",
            self.harm,
            "base",
            "difference",
        )
        slots = {slot: "others" if concept in words else slot for slot, words in self._slots.items()}
        for arm in ("shut", *several, "ablated"):
            for slot, metric in slots.items():
                yield differs(f"{arm}, {word}: each {slot} that other prompts ask for stays", metric, arm, -self.harm)
        yield differs(f"ablated: what asks for {concept} by name shows it no more", "own", "ablated", -self.ablation)
        yield differs(f"control: as many weights at random leave {concept}", "own", "random", -self.harm)
        sentence = f"the list of {word} takes a tenth of the bytes of its keys and values"
        yield Claim(sentence, f"mask/{word}/of_dense", "shut", "at most", 0.1, scale="share")

    @property
    def _slots(self) -> dict[str, list[str]]:
        """What the evaluator tells apart, by slot."""
        check_model(self.evaluator, "config.json", "evaluator")
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes")
        if not isinstance(classes, dict):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator")
        return classes
