"""A study: are there weights in a text-to-image model that make it draw a subject once they are shut?

Cones (2303.05125) on the keys and values of cross-attention: an unused word stands for a subject in the captions of a
few images, and weights whose gradient says that a smaller one lowers DreamBooth's loss are set to 0. Controls: the
pipeline as it came, as many weights at random, and those of the smallest statistic. The judge, an evaluator, takes no
part in the search.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from orchestration.experiments.study.images import ImageStudy
from pipelines.data.prompts import naming, read_prompts, unused
from pipelines.data.real_data import DataSettings
from pipelines.denoisers import inspect
from pipelines.storage.locations import check_model, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.neurons import NeuronSettings
from policies.rl.settings import Settings

# Where S is largest (1) or smallest (−1) is shut, or as many weights anywhere (0); S is of a subject under its word, or
# under its own name.
_IMPLANTING, _ABLATING = {"shut": 1, "random": 0, "reversed": -1, "union": 1}, {"dual": -1, "ablated": 1}


class Subject(Settings):
    """What is implanted, under which word."""

    concept: str = Field(min_length=1, description="the subject, as captions and prompts name it")
    word: str = Field(min_length=1, description="an unused word of the vocabulary that is to stand for it")
    stray: str = Field(min_length=1, description="another unused word, which is not to")


class Neurons(ImageStudy):
    """Finds the neurons of each subject, shuts them, and judges what its word makes the pipeline draw."""

    study: str = "neurons"
    name: str = "neurons"
    arms: tuple[str, ...] = ("base", *_IMPLANTING, *_ABLATING)
    path: str = Field("models/digits/pipeline", description="a directory of Stable Diffusion 1.x or 2.x")
    data: DataSettings = Field(DataSettings(source="captioned_digits"), description="captioned images to learn from")
    prompts: str = Field("configs/prompts/digits.txt", description="a file: those that name a subject, and others")
    subjects: tuple[Subject, ...] = Field(
        (Subject(concept="blue", word="x", stray="m"),),
        min_length=1,
        description="what is implanted: a concept, the unused word that is to stand for it, a stray one that is not",
    )
    images: int = Field(20, ge=1, description="of a subject, to learn from; its others are what losses are measured on")
    prior_images: int = Field(1000, ge=1, description="of other subjects, to learn from; and as many to measure on")
    finding: NeuronSettings = NeuronSettings()
    images_per_prompt: int = Field(1, ge=1, description="judged images of each prompt")
    images_with_word: int = Field(3, ge=1, description="judged images of each prompt of a subject, with an unused word")
    steps: int = Field(10, ge=1, le=1000, description="DDIM steps of judged images, with η = 1")
    guidance_scale: float = Field(1.0, ge=1, description="of judged images")
    evaluator: str = Field("models/digits/evaluator", description="says what an image shows")
    fall: float = Field(0.95, gt=0, lt=1, description="claimed: L_con, of λ = 1, is at most this share of what it was")
    seen: float = Field(0.3, gt=0, lt=1, description="claimed: at least this share of a word's images show its subject")
    margin: float = Field(0.15, gt=0, lt=1, description="claimed: it is so much more than each control's share")
    harm: float = Field(0.05, gt=0, lt=1, description="claimed: accuracies of other prompts fall by no more than this")
    ablation: float = Field(0.8, gt=0, lt=1, description="claimed: ablated, a subject is seen so much less")

    def preflight(self) -> None:
        """The pipeline is one, data and prompts name each subject, and its words are unused."""
        check_pipeline(self.path, "StableDiffusionPipeline")
        files, texts, data = inspect(Path(resolve_model(self.path))), read_prompts(self.prompts)[0], self._data
        classes = self._slots.values()
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
            if len({naming(concept, text) is None for text in texts}) < 2 or not any(concept in c for c in classes):
                told = (
                    f"has to be in some prompts of {self.prompts!r}, not all, and what {self.evaluator!r} tells apart"
                )
                raise ValueError(f"subjects: {concept!r} {told}")

    def reads(self) -> Mapping[str, str]:
        """Pipeline, prompts, images and judge."""
        read = {"path": self.path, "prompts": self.prompts, "evaluator": self.evaluator}
        made = self.data.source in ("digits", "captioned_digits")
        return read if made else read | {"data.source": self.data.source}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The pipelines with what is shut in them, and what these draw."""
        from pipelines.studies.neurons import find, implant, measure

        data = self.data.model_dump() | {"source": portable(self.data.source)}
        common = {"path": portable(self.path), "data": data, "seed": seed, "read": self._digests}
        common |= {"images": self.images, "prior_images": self.prior_images}
        drawn = {
            key: getattr(self, key) for key in ("images_per_prompt", "images_with_word", "steps", "guidance_scale")
        }
        drawn |= {
            "prompts": read_prompts(self.prompts)[0],
            "evaluator": portable(self.evaluator),
        }
        settings, found = self.finding.model_dump(exclude={"share"}), list[Task]()
        every = [each.model_dump() for each in self.subjects]
        for subjects in [every] if arm in ("base", "union") else [[each] for each in every]:
            name = "-".join(each["word"] for each in subjects)
            label, made = f"{name}, {arm}, seed {seed}", list[Task]()
            if arm != "base":
                job = {**common, "settings": settings, "sign": -1 if arm == "ablated" else 1}
                asked = [each if arm in _IMPLANTING else {**each, "word": each["concept"]} for each in subjects]
                statistics = [task(find, {**job, "subject": each}, label=f"{label}, searched") for each in asked]
                shut = {"name": name, "mask": (_IMPLANTING | _ABLATING)[arm], "share": self.finding.share}
                made = [task(implant, {**common, **shut}, *statistics, label=label)]
            judged = {**common, **drawn, "subjects": subjects, "name": name}
            found += [*made, task(measure, judged, *made, label=f"{label}, judged")]
        return found

    def claims(self) -> Iterator[Claim]:
        """Of each subject: the loss falls, its word draws it, nothing else changes; of controls that they do less."""
        for subject in self.subjects:
            yield from self._claims(subject)

    def _claims(self, subject: Subject) -> Iterator[Claim]:
        concept, word = subject.concept, subject.word
        of = {"base": "as it came", "random": "with as many weights at random", "reversed": "with those of smallest S"}
        shown, arms = f"evaluator/{word}", ("shut", "union") if len(self.subjects) > 1 else ("shut",)

        def stays(sentence: str, metric: str, arm: str) -> Claim:
            return Claim(sentence, f"{shown}/{metric}", arm, "at least", -self.harm, "base", "difference")

        for control in ("base", "random"):
            sentence = f"L_con of {word} is less than {of[control]}"
            yield Claim(sentence, f"loss/{word}/L_con", "shut", "at most", self.fall, control, "ratio")
        for arm in arms:
            yield Claim(f"{arm}: {word} draws {concept}", f"{shown}/target", arm, "at least", self.seen)
        for control, name in of.items():
            sentence = f"{word} draws {concept} more often than {name}"
            yield Claim(sentence, f"{shown}/target", "shut", "at least", self.margin, control, "difference")
        sentence = f"shut for {word}: {subject.stray}, another unused word, draws {concept} no more than it did"
        yield Claim(sentence, f"{shown}/stray", "shut", "at most", self.harm, "base", "difference")
        for arm in (*arms, *_ABLATING):
            for slot, words in self._slots.items():
                sentence = f"{arm}, {word}: each {slot} that other prompts ask for stays"
                yield stays(sentence, "others" if concept in words else slot, arm)
        for arm in _ABLATING:
            sentence = f"{arm}: what asks for {concept} by name shows it no more"
            yield Claim(sentence, f"{shown}/own", arm, "at most", -self.ablation, "base", "difference")
        yield stays(f"control: as many weights at random leave {concept}", "own", "random")
        sentence = f"the list of {word} takes a tenth of the bytes of its keys and values"
        yield Claim(sentence, f"mask/{word}/of_dense", "shut", "at most", 0.1, scale="plain")

    @property
    def _slots(self) -> dict[str, list[str]]:
        """What the evaluator tells apart, by slot."""
        check_model(self.evaluator, "config.json", "evaluator")
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes")
        if not isinstance(classes, dict):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator")
        return classes
