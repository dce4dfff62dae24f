"""A study: is one image of a digit moved as it is told, and does it stay that digit, in that ink and that hand?

MagicAnimate (2311.16498) on the pipeline whose attention sees 64 places: an appearance encoder shows the reference, a
pose ControlNet the place, motion modules look along time, and overlapping windows make videos longer than they saw.
The text is empty and a pose is a square: what is drawn can be known from the reference alone. Controls: ``per_frame``,
no motion modules; ``unreferenced``, no reference; ``apart``, windows without overlap; ``shuffled``, motion modules that
learnt from frames of different videos. The judge, an evaluator, takes no part; references are digits of the test split.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.digits import DIGITS
from pipelines.settings import FittingSettings, MotionSettings
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim


class Animate(Study):
    """Trains encoder and ControlNet on frames, then motion modules on videos, and judges what they animate."""

    study: str = "animate"
    name: str = "animate"
    arms: tuple[str, ...] = ("animate", "per_frame", "unreferenced", "apart", "shuffled")
    path: str = Field("models/digits-attention/pipeline", description="a Stable Diffusion of digits on 16 × 32 pixels")
    evaluator: str = Field("models/digits/evaluator", description="the judge")
    videos: int = Field(2000, ge=2, description="of moving digits, to learn from")
    frozen: bool = Field(False, description="in training on frames the denoiser stays as it is, as in the paper")
    appearance: FittingSettings = Field(
        FittingSettings(steps=700, batch_size=16, learning_rate=1.5e-3),
        description="of encoder, ControlNet and denoiser, on frames",
    )
    modules: MotionSettings = MotionSettings(middle=True)
    motion: FittingSettings = Field(
        FittingSettings(steps=300, learning_rate=3e-3, earliest=99),
        description="of motion modules, on windows of frames",
    )
    length: int = Field(6, ge=2, le=64, description="frames of a window, of what is learnt from and of what is drawn")
    overlap: int = Field(3, ge=0, description="frames that a window has in common with the next")
    drawn: int = Field(12, ge=2, description="videos that are judged, of a reference each")
    frames: int = Field(12, ge=2, description="of each of them")
    fastest: float = Field(0.6, gt=0, le=8, description="pixels that a digit moves from frame to frame, at most")
    steps: int = Field(10, ge=1, le=1000, description="DDIM steps")
    guidance_scale: float = Field(2.0, ge=1, description="away from what is drawn without the reference; 1: none")
    identity: float = Field(0.9, gt=0, lt=1, description="claimed: so many frames show the reference's digit and ink")
    near: float = Field(1.5, gt=0, description="claimed: pixels from the commanded place, on average, at most")
    steady: float = Field(0.5, gt=0, lt=1, description="claimed: at most this share of the flicker of frames alone")
    hand: float = Field(
        0.75, gt=0, lt=1, description="asked: nearer to the reference than so many of its digit's others"
    )

    def preflight(self) -> None:
        """The pipeline is one, its canvas is the videos', and windows meet."""
        from policies.animate import windows

        check_pipeline(self.path, "StableDiffusionPipeline")
        check_model(self.evaluator, "config.json", "evaluator")
        network = read_json(Path(resolve_model(self.path)) / "unet" / "config.json")
        if wrong := [each for each in network["block_out_channels"] if each % self.modules.heads]:
            raise ValueError(f"modules.heads: {self.modules.heads} do not divide the {wrong[0]} channels of a level")
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes") or {}
        if classes.get("digit") != list(DIGITS):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator of digits")
        if self.length > self.modules.longest:
            raise ValueError(f"length: motion modules see at most modules.longest={self.modules.longest} frames")
        for overlap in (self.overlap, 0):
            windows(self.frames, self.length, overlap)

    def reads(self) -> Mapping[str, str]:
        """The pipeline and the judge."""
        return {"path": self.path, "evaluator": self.evaluator}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """Encoder and ControlNet, which all arms share; motion modules, which all but two do; an arm's videos."""
        from pipelines.studies.animate import animate, learn_appearance, learn_order

        common = {"seed": seed, "read": self._digests, "path": portable(self.path)}
        data = common | self.model_dump(mode="json", include={"videos", "length", "fastest"})
        looks = task(
            learn_appearance,
            data | {"fitting": self.appearance.model_dump(), "frozen": self.frozen},
            label=f"encoder, seed {seed}",
        )
        modules = {"modules": self.modules.model_dump(), "fitting": self.motion.model_dump()}
        shuffled = arm == "shuffled"
        named = "motion of shuffled frames" if shuffled else "motion"
        moves = task(learn_order, data | modules | {"shuffled": shuffled}, looks, label=f"{named}, seed {seed}")
        how = self.model_dump(mode="json", include={"length", "drawn", "frames", "fastest", "steps", "guidance_scale"})
        how |= common | {"evaluator": portable(self.evaluator), "referenced": arm != "unreferenced"}
        how |= {"overlap": 0 if arm == "apart" else self.overlap}
        parts = [looks] if arm == "per_frame" else [looks, moves]
        made = task(animate, how, *parts, label=f"{arm}, seed {seed}")
        return [*parts, made] if arm == "animate" else [made]

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in sorted(self.reads().values())}

    def claims(self) -> Iterator[Claim]:
        """The digit stays, goes where it is told, and does not flicker; each control shows what does it."""
        sentence = "digit and ink are the reference's, at the commanded place"
        yield Claim(sentence, "identity", "animate", "at least", self.identity, scale="share")
        yield Claim("the digit is where it was told to be", "position", "animate", "at most", self.near)
        sentence = "flicker is at most so much of that of frames drawn by themselves"
        yield Claim(sentence, "flicker", "animate", "at most", self.steady, "per_frame", "ratio")
        sentence = "asked: is the hand the reference's, more than that of others of its digit?"
        yield Claim(sentence, "handwriting", "animate", "at least", self.hand, scale="share")
        sentence = "control: without a reference it is another digit or ink"
        yield Claim(sentence, "identity", "unreferenced", "at most", -0.5, "animate", "difference")
        sentence = "control: without a reference the hand is no more like it than others'"
        yield Claim(sentence, "handwriting", "unreferenced", "at most", -0.1, "animate", "difference")
        sentence = "control: motion modules that learnt from frames of different videos leave more flicker"
        yield Claim(sentence, "flicker", "shuffled", "at least", 1.2, "animate", "ratio")
        sentence = "control: where windows without overlap meet there is more flicker"
        yield Claim(sentence, "seams", "apart", "at least", 1.2, "animate", "ratio")
