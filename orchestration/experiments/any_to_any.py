"""A study: can images and tones be drawn for each other, and together, by models that are not trained again?

CoDi (2305.11846) on digits: a tone's pitch is the digit, its timbre the ink. Conditions are aligned through text alone;
joint attention lets an image and a tone that are drawn at once agree. Arms: ``paired``, which learned it from images
and tones of one caption; ``unpaired``, the paper's strong claim, from pairs with texts alone. Controls: ``own``, each
attends to its own environment, as in the authors' release; ``shuffled``, as ``paired``, but each attends to what is
drawn in another pair, and encoders learned from captions of others; ``independent``, no joint attention. An evaluator
judges images, arithmetic tones; neither takes part.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.digits import CHOICES
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.any_to_any import TrainingSettings
from policies.common.claims import Claim
from policies.common.intervals import Scale


class AnyToAny(Study):
    """Trains a tone model, encoders and joint attention, and judges what is drawn by them."""

    study: str = "any_to_any"
    name: str = "any_to_any"
    scale: ClassVar[Scale | None] = "share"
    arms: tuple[str, ...] = ("paired", "unpaired", "own", "shuffled", "independent")
    path: str = Field("models/digits-attention/pipeline", description="the image model, a Stable Diffusion pipeline")
    evaluator: str = Field("models/digits/evaluator", description="the judge of images")
    captioner: str = Field("models/digits/captioner", description="whose words for an image are held against a tone")
    tones: TrainingSettings = Field(TrainingSettings(steps=900), description="of the tone model")
    encoders: TrainingSettings = Field(TrainingSettings(steps=350), description="of each encoder")
    meeting: TrainingSettings = Field(TrainingSettings(steps=600), description="of environments, at first")
    joint: TrainingSettings = Field(TrainingSettings(steps=250, batch=32, rate=3e-3), description="of joint attention")
    guidance_scale: float = Field(3.0, ge=0, description="by which what joint attention changes is multiplied")
    temperature: float = Field(0.1, gt=0, description="of the contrast between what is shown and its caption")
    steps: int = Field(16, ge=1, description="DDIM's, with which all is drawn")
    images: int = Field(2048, ge=64, description="digits that are learned from, in tints of chance")
    each: int = Field(50, ge=1, description="tones of each kind that are learned from")
    shown: int = Field(1, ge=1, description="digits of each caption that are shown to encoders, and as many tones")
    count: int = Field(200, ge=8, description="pairs that are drawn together")
    reached: float = Field(0.6, gt=0, lt=1, description="claimed: agreement of digits, and accuracy without words")

    def preflight(self) -> None:
        """The models are there, and of the digits."""
        for key, marker in (("path", "model_index.json"), ("evaluator", "config.json"), ("captioner", "config.json")):
            check_model(getattr(self, key), marker, key)
        kind = read_json(Path(resolve_model(self.path)) / "model_index.json").get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"path: {self.path!r} is a {kind}; joint attention is for a StableDiffusionPipeline")
        if wrong := [name for name in ("meeting", "joint") if getattr(self, name).batch % 16]:
            raise ValueError(
                f"{wrong[0]}.batch: {getattr(self, wrong[0]).batch} is no multiple of 16, the pairs of a time"
            )
        unet = read_json(Path(resolve_model(self.path)) / "unet" / "config.json")
        if unet.get("sample_size") != 8:
            raise ValueError(f"path: {self.path!r} does not draw 8 × 8 latents of digits, as digits-attention does")
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes") or {}
        if any(classes.get(slot) != [*CHOICES[slot]] for slot in ("digit", "ink")):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator of digits and inks")

    def reads(self) -> Mapping[str, str]:
        """The frozen models."""
        return {"path": self.path, "evaluator": self.evaluator, "captioner": self.captioner}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The tone model, which all arms share; what joins it with the image model; what they draw. Encoders are
        measured in arm ``unpaired``, as no pair made them, and in ``shuffled``."""
        from pipelines.studies.any_to_any import align, convert, draw_together, join, learn_tones

        common = {"path": portable(self.path), "read": self._digests, "seed": seed}
        judged = common | {"evaluator": portable(self.evaluator), "steps": self.steps}
        learned = common | {"images": self.images, "each": self.each}

        def settings(block: TrainingSettings) -> dict[str, object]:
            return learned | {"settings": block.model_dump()}

        # One for all seeds, as the image model is.
        heard = task(learn_tones, settings(self.tones) | {"seed": 0}, label="tone model")
        inputs = [heard]
        if arm != "independent":
            learned_by = "paired" if arm == "shuffled" else arm
            how = settings(self.joint) | {"meeting": self.meeting.model_dump(), "arm": learned_by}
            inputs.append(task(join, how, heard, label=f"joint, {learned_by}, seed {seed}"))
        to = {"to": {"own": "own", "shuffled": "strange"}.get(arm, "other"), "count": self.count}
        to |= {"captioner": portable(self.captioner), "scale": self.guidance_scale}
        found = [task(draw_together, judged | to, *inputs, label=f"together, {arm}, seed {seed}")]
        if arm == "paired":
            found.append(heard)
        if arm in ("unpaired", "shuffled"):
            told = {"temperature": self.temperature, "shuffled": arm == "shuffled"}
            aligned = task(align, settings(self.encoders) | told, label=f"encoders, {arm}, seed {seed}")
            found.append(task(convert, judged | {"shown": self.shown}, heard, aligned, label=f"convert, {arm}, {seed}"))
        return found

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in sorted(self.reads().values())}

    def claims(self) -> Iterator[Claim]:
        """What agrees, and what does not by itself; what encoders tell; questions."""
        bound, digits = self.reached, "the digit is the same in an image and a tone that are drawn together"
        yield Claim(f"{digits}, pairs in training", "agreement", "paired", "at least", bound)
        yield Claim(f"asked: {digits}, no such pair in training", "agreement", "unpaired", "at least", bound)
        for arm, control, how in (
            ("independent", "paired", "without joint attention"),
            ("own", "paired", "where each attends to itself"),
            ("shuffled", "paired", "where each attends to another pair"),
            ("independent", "unpaired", "without joint attention, of no pair in training"),
        ):
            sentence = f"control: they agree less {how}"
            yield Claim(sentence, "agreement", arm, "at most", -0.2, control, "difference")
        for arm in ("own", "shuffled", "independent"):
            yield Claim(f"control: {arm} agree as by chance", "agreement", arm, "at most", 0.2)
        yield Claim("asked: the ink is the same, too, pairs in training", "agreement_ink", "paired", "at least", bound)
        for name, what in (("image", "images show a digit"), ("tone", "tones sound like one")):
            sentence = f"{what} as often as without joint attention"
            yield Claim(sentence, f"valid/{name}", "paired", "at least", -0.05, "independent", "difference")
        for name, what in (
            ("tone_to_image", "an image shows the digit of a tone"),
            ("image_to_tone", "a tone is of an image's digit"),
            ("image_and_text_to_tone", "a tone is of the digit of an image and a text"),
        ):
            yield Claim(f"{what}, though no pair was seen", name, "unpaired", "at least", bound)
            sentence = f"control: {what} by encoders of shuffled captions"
            if name != "image_and_text_to_tone":
                yield Claim(sentence, name, "shuffled", "at most", -0.2, "unpaired", "difference")
        sentence = "control: with a text of another digit it is the image's less often"
        yield Claim(sentence, "other_text_to_tone", "unpaired", "at most", 0.6)
