"""A study: does a GAN that reads draw what it is asked for, in one pass, and what does it owe that to?

GigaGAN (2303.05511) beside what would show its parts to be idle: the same game without pairs that do not match
(``unmatched``), or with them in the generator's loss, too (``both``), a bank in place of each kernel (``bank``), and
the diffusion model whose text encoder it reads with (``diffusion``), the yardstick of speed and variety. ``upsampled``
draws at half the size and enlarges; its control is bilinear. The judges, an evaluator and a network of features, take
no part in the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from orchestration.experiments.study.images import ImageStudy
from pipelines.data.real_data import DataSettings, split_reference
from pipelines.generators.gigagan import GigaGan, GigaGanSettings
from pipelines.storage.locations import check_model, portable
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim

_CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "unmatched": {"matching": 0.0},
    "both": {"matching": 0.3},
    "bank": {"filters": 2},
    "upsampled": {"upsample": 2},
}


class TextGan(ImageStudy):
    """Fits GigaGANs, and judges what they draw beside a diffusion model."""

    study: str = "text_gan"
    name: str = "text_gan"
    arms: tuple[str, ...] = (*_CHANGES, "diffusion")
    data: DataSettings = Field(
        DataSettings(source="captioned_digits", reference=900, image_size=16),
        description="captions to draw for, and real images; upsampled: at twice their size",
    )
    gigagan: GigaGanSettings = GigaGanSettings()
    enlarging: int = Field(400, ge=1, description="gigagan.steps of upsampled, of each of its two stages")
    steps: int = Field(20, ge=1, le=1000, description="DDIM steps of the diffusion model")
    timed: int = Field(256, ge=1, description="images that each draws in one of five rounds of a race")
    guidance_scale: float = Field(1.0, ge=1, description="of the diffusion model; 1 is fastest and the most varied")
    faster: float = Field(100.0, gt=1, description="claimed: so many times fewer CPU seconds an image than by DDIM")
    accuracy: float = Field(0.95, gt=0, lt=1, description="claimed: so many images show all that they are asked to")
    variety: float = Field(0.5, gt=0, description="claimed: recall, as a share of the diffusion model's")
    left: float = Field(0.3, gt=0, lt=1, description="claimed: what is left of accuracy without pairs, at most")
    gain: float = Field(0.03, gt=0, lt=1, description="claimed: a bank adds no more accuracy than this to one kernel")
    nearer: float = Field(0.8, gt=0, lt=1, description="claimed: nor is its FID less than so many times the kernel's")

    def preflight(self) -> None:
        """There are captions, and models of the kinds that are needed."""
        GigaGan.files(self.gigagan)
        found, multiple = self._data, GigaGan.side_multiple(self.gigagan)
        if found.captions is None:
            raise ValueError(f"data.source: {self.data.source!r} has no captions to draw for; name data.caption_column")
        if self.data.image_size is None or self.data.image_size % multiple:
            raise ValueError(f"data.image_size: give a multiple of {multiple} pixels, not {self.data.image_size}")
        if self.gigagan.upsample > 1 or not self.gigagan.matched[0]:
            raise ValueError("gigagan: what enlarges, and what has no matching, are arms of their own")
        if self.gigagan.filters > 1:
            raise ValueError("gigagan.filters: leave it at 1; the arm bank has 2")
        split_reference(found, self.data.reference)
        if self.gigagan.evaluator:
            check_model(self.gigagan.evaluator, "config.json", "gigagan.evaluator")

    def reads(self) -> Mapping[str, str]:
        """Pipeline, judge and images."""
        read = {"gigagan.path": self.gigagan.path, "gigagan.evaluator": self.gigagan.evaluator}
        source = self.data.source
        found = {key: at for key, at in read.items() if at}
        return found if source in ("digits", "captioned_digits") else found | {"data.source": source}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The generator, if the arm has one, what it draws, and what that costs."""
        from pipelines.studies.distil import learn_features
        from pipelines.studies.text_gan import judge, learn, race

        settings = GigaGan.settled(self.gigagan, 0)
        size = (self.data.image_size or 0) * (2 if arm == "upsampled" else 1)
        data = self.data.model_dump() | {"source": portable(self.data.source), "image_size": size}
        common = {"data": data, "path": settings.path, "read": self._digests, "seed": seed}
        eye = task(learn_features, {**common, "seed": 0, "path": None}, label=f"features at {size} pixels")
        how = {**common, "steps": self.steps, "guidance_scale": self.guidance_scale, "evaluator": settings.evaluator}
        made = []
        if arm in _CHANGES:
            changes = _CHANGES[arm] | ({"steps": self.enlarging} if arm == "upsampled" else {})
            content = settings.model_dump() | changes
            made = [task(learn, {**common, "settings": content}, label=f"{arm}, seed {seed}")]
        found = [*made, task(judge, how, eye, *made, label=f"{arm}, seed {seed}, judged")]
        if arm in ("full", "bank"):
            found.append(task(race, {**how, "timed": self.timed}, *made, label=f"{arm}, seed {seed}, timed"))
        return found

    def claims(self) -> Iterator[Claim]:
        """It is fast and heeds its captions; that is owed to pairs that do not match, and not to the bank."""
        times, right = f"{self.faster:g} times", "evaluator/full"
        yield Claim(f"draws {times} as fast as DDIM", "speed/ratio", "full", "at least", self.faster, scale="logarithm")
        yield Claim(f"so does a bank: {times}", "speed/ratio", "bank", "at least", self.faster, scale="logarithm")
        sentence = "is as varied as half of the diffusion model's recall" if self.variety == 0.5 else "is varied"
        yield Claim(sentence, "recall", "full", "at least", self.variety, "diffusion", "ratio")
        if self.gigagan.evaluator:
            yield Claim("shows what it is asked to", right, "full", "at least", self.accuracy)
            sentence = "control: without pairs that do not match, captions are hardly heeded"
            yield Claim(sentence, right, "unmatched", "at most", self.left, "full", "ratio")
            sentence = "no gain: a bank heeds captions no better than one kernel"
            yield Claim(sentence, right, "bank", "at most", self.gain, "full", "difference")
        sentence = "no gain: a bank draws no nearer to real images than one kernel"
        yield Claim(sentence, "fid", "bank", "at least", self.nearer, "full", "ratio")
        sentence = "pairs that do not match in the generator's loss, too, cost variety"
        yield Claim(sentence, "recall", "both", "at most", 0.0, "full", "difference")
        sentence = "what enlarges draws nearer to real images than bilinear enlargement"
        yield Claim(sentence, "enlarged/fid", "upsampled", "at most", 1.0, scale="logarithm")
