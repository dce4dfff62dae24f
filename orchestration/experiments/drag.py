"""A study: do points of an image go where they are dragged, and does what the image shows stay what it was?

DragGAN (2305.10973) on a GAN of posed digits that the study trains. Whether a point has arrived is measured on pixels,
by the tip of the ink, not by the features that were dragged. Controls: ``untracked``, a point is believed to be where
it was at first; ``unmasked``, nothing is held; ``walk``, as far in w in a random direction; ``still``, no drag. The
judge, an evaluator, takes no part. Then drags are used: of real digits drawn again, how far until captioner and
evaluator see different digits?
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from orchestration.experiments.study.config import Study
from pipelines.data.digits import DIGITS
from pipelines.data.poses import PosingSettings
from pipelines.generators import GENERATORS
from pipelines.generators.adversarial import Adversarial
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.drag import DragSettings
from policies.rl.settings import explain


class Drag(Study):
    """Trains a GAN, drags what it draws, and judges where that went."""

    study: str = "drag"
    name: str = "drag"
    arms: tuple[str, ...] = ("dragged", "unmasked", "untracked", "walk", "still")
    family: str = Field("gigagan", description="the GAN: a family of 'ouroboros config mad' that draws from styles")
    settings: dict[str, Any] = Field({}, description="of the family, in place of its defaults")
    posing: PosingSettings = PosingSettings()
    bias: float = Field(0.5, gt=0, le=1, description="truncation of the images that are dragged")
    drags: int = Field(60, ge=2, description="images that are dragged, and as many real ones")
    lengths: tuple[float, float] = Field((2.0, 3.0), description="pixels by which a point is dragged, from and to")
    spread: float = Field(1.0, gt=0, description="pixels around a landmark that its ink may spread over, to be a tip")
    near: float = Field(1.5, gt=0, description="a landmark so many pixels from its target is there")
    pixels: tuple[int, ...] = Field((1, 2, 4), min_length=1, description="by which real ones are dragged, rising")
    dragging: DragSettings = DragSettings()
    evaluator: str = Field("models/digits/evaluator", description="the judge")
    captioner: str = Field("models/digits/captioner", description="whose digit is compared with the judge's")
    reached: float = Field(0.85, gt=0, lt=1, description="claimed: so many landmarks are there")
    kept: float = Field(0.9, gt=0, lt=1, description="claimed: so many show the digit that they showed")
    changed: float = Field(0.05, gt=0, lt=1, description="claimed: mean change of pixels that are held, at most")

    def preflight(self) -> None:
        """The family can be dragged, and there are judges of digits."""
        kind = GENERATORS.find(self.family)
        if not issubclass(kind, Adversarial):
            raise ValueError(f"family: {self.family!r} has no styles to drag by; gan and gigagan have")
        try:
            kind.schema(**self.settings)
        except ValidationError as error:
            raise ValueError(f"settings: {explain(kind.schema, error)}") from error
        self.posing.check("posing")
        if list(self.pixels) != sorted(set(self.pixels)) or self.pixels[0] < 1:
            raise ValueError(f"pixels: give numbers from 1 on, each larger than the last, not {list(self.pixels)}")
        for key, path in self.reads().items():
            check_model(path, "config.json", key)
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes") or {}
        if classes.get("digit") != list(DIGITS):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator of digits")

    def reads(self) -> Mapping[str, str]:
        """The judges."""
        return {"evaluator": self.evaluator, "captioner": self.captioner}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The generator, which all arms share, and an arm's drags."""
        from pipelines.studies.drag import learn, measure

        common = {"family": self.family, "posing": self.posing.model_dump(), "seed": seed}
        made = task(learn, common | {"settings": self.settings}, label=f"generator, seed {seed}")
        named = ("bias", "drags", "lengths", "spread", "near", "pixels", "dragging")
        asked = common | self.model_dump(mode="json", include={*named}) | {"read": self._digests}
        asked |= {key: portable(at) for key, at in self.reads().items()}

        def drags(of: str, *inputs: Task) -> Task:
            return task(measure, asked | {"arm": of}, made, *inputs, label=f"{of}, seed {seed}")

        found = drags(arm, drags("dragged")) if arm == "walk" else drags(arm)
        return [made, found] if arm == "dragged" else [found]

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in sorted(self.reads().values())}

    def claims(self) -> Iterator[Claim]:
        """Points arrive and digits stay, and not by chance; and a question."""
        far, near = self.pixels[-1], f"{self.near:g} pixels"
        yield Claim(
            f"a landmark is within {near} of its target", "reach", "dragged", "at least", self.reached, scale="share"
        )
        yield Claim("the judge sees the digit that it saw", "kept", "dragged", "at least", self.kept, scale="share")
        yield Claim(
            "pixels that are held change by little", "changed", "dragged", "at most", self.changed, scale="share"
        )
        for arm, how in (("untracked", "without tracking"), ("walk", "a random way"), ("still", "without a drag")):
            sentence = f"control: {how} fewer landmarks arrive"
            yield Claim(sentence, "reach", arm, "at most", -0.1, "dragged", "difference")
        yield Claim("control: a random way keeps fewer digits", "kept", "walk", "at most", 0.0, "dragged", "difference")
        sentence = "control: without a mask the other half changes more"
        yield Claim(sentence, "changed", "unmasked", "at least", 0.01, "dragged", "difference")
        sentence = f"do captioner and judge disagree more often about a real digit dragged by {far} pixels?"
        yield Claim(sentence, f"disagree/at_{far}", "dragged", "at least", 0.1, "still", "difference")
