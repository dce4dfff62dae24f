"""A study: can videos be edited by one who has seen no edited video?

Factorised diffusion distillation (2403.09334) on the pipeline whose attention sees 64 places. One teacher edits frames:
a ControlNet that reads the caption of what a digit is to be, in another ink, and sees the one that is. The other draws
videos of moving digits. A student of both edits videos in a few calls. Controls: ``per_frame``, the edit teacher frame
by frame; ``unaligned``, both adapters on one network, untrained together; ``no_sds`` and ``no_critics``, half of what
teaches the student; ``static``, an edited first frame that stays, whose frames do not differ at all. The judge, an
evaluator, takes no part; what is edited are digits of the test split.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.digits import DIGITS
from pipelines.settings import FittingSettings
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.factorised import AligningSettings

ALIGNED = ("student", "no_sds", "no_critics")


class EditVideos(Study):
    """Trains two teachers and their student, and judges what becomes of videos."""

    study: str = "edit_videos"
    name: str = "edit_videos"
    arms: tuple[str, ...] = (*ALIGNED, "unaligned", "per_frame", "static")
    taught: int = Field(
        0, ge=0, description="seed of the teachers and of what they draw, who are the same for all seeds"
    )
    path: str = Field("models/digits-attention/pipeline", description="a Stable Diffusion that draws on 16 × 32 pixels")
    frames: int = Field(6, ge=2, le=64, description="of a video")
    fastest: float = Field(2.0, gt=0, le=8, description="pixels that a digit moves from frame to frame, at most")
    pairs: int = Field(4000, ge=2, description="frames in one ink and the same in another, for the edit teacher")
    editing: FittingSettings = Field(
        FittingSettings(steps=400, batch_size=32, learning_rate=1e-3), description="of the edit teacher's ControlNet"
    )
    videos: int = Field(2000, ge=2, description="unedited, for the video teacher; as many others are the student's")
    heads: int = Field(2, ge=1, description="of its attention along time; divides the channels of every level")
    middle: bool = Field(True, description="whether it has motion modules in the middle block, too")
    filming: FittingSettings = Field(
        FittingSettings(steps=500, batch_size=6, learning_rate=3e-3),
        description="of the video teacher's motion modules",
    )
    teacher_steps: int = Field(10, ge=1, le=1000, description="DDIM steps of the teachers, and of both, unaligned")
    guidance_scale: float = Field(2.0, ge=1, description="of the video teacher's videos that a critic takes for real")
    real: int = Field(32, ge=2, description="frames, and videos, that the teachers draw for the critics")
    aligning: AligningSettings = AligningSettings()
    drawn: int = Field(40, ge=2, description="videos that are edited to be judged")
    evaluator: str = Field("models/digits/evaluator", description="the judge")
    edited: float = Field(0.85, gt=0, lt=1, description="claimed: so many frames show the digit in the ink asked for")
    steady: float = Field(0.6, gt=0, lt=1, description="claimed: at most this share of the flicker of frames alone")
    moving: float = Field(0.9, gt=0, lt=1, description="claimed: of the input's path so much is travelled")
    near: float = Field(1.0, gt=0, description="claimed: pixels from where the input's digit is, on average, at most")

    def preflight(self) -> None:
        """The pipeline and the judge are what they are taken for, and critics are asked if nothing else teaches."""
        check_pipeline(self.path, "StableDiffusionPipeline")
        check_model(self.evaluator, "config.json", "evaluator")
        network = read_json(Path(resolve_model(self.path)) / "unet" / "config.json")
        if wrong := [each for each in network["block_out_channels"] if each % self.heads]:
            raise ValueError(f"heads: {self.heads} do not divide the {wrong[0]} channels of a level")
        classes = read_json(Path(resolve_model(self.evaluator)) / "config.json").get("classes") or {}
        if classes.get("digit") != list(DIGITS):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator of digits")
        if self.aligning.critic_from * self.aligning.steps > self.aligning.steps - 1:
            raise ValueError("aligning.critic_from: no step is left with critics; the arm no_critics does without them")
        if not self.aligning.sds_weight:
            raise ValueError("aligning.sds_weight: 0 leaves no score distillation; the arm no_sds does without it")

    def reads(self) -> Mapping[str, str]:
        """The pipeline and the judge."""
        return {"path": self.path, "evaluator": self.evaluator}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """Teachers, which all arms share, what they draw, students, and an arm's edits."""
        from pipelines.studies.edit_videos import align, draw_teachers, judge, learn_edits, learn_videos

        common = {"read": self._digests, "path": portable(self.path), "fastest": self.fastest, "seed": self.taught}

        def some(*names: str) -> dict[str, Any]:
            return common | self.model_dump(mode="json", include={"frames", *names})

        fitting = {name: getattr(self, name).model_dump() for name in ("editing", "filming")}
        frame = common | {"pairs": self.pairs, "fitting": fitting["editing"]}
        edits = task(learn_edits, frame, label="edit teacher")
        filmed = some("videos", "heads", "middle") | {"fitting": fitting["filming"]}
        videos = task(learn_videos, filmed, label="video teacher")
        parts = [edits] if arm in ("per_frame", "static") else [edits, videos]
        if arm in ALIGNED:
            drawn = some("real", "teacher_steps", "guidance_scale")
            real = task(draw_teachers, drawn, edits, videos, label="what teachers draw", kept=False)
            changes = {"no_sds": {"sds_weight": 0.0, "critic_from": 0.0}, "no_critics": {"critic_from": 1.0}}
            how = self.aligning.model_copy(update=changes.get(arm, {})).model_dump()
            student = some("videos") | {"seed": seed, "aligning": how}
            parts = [task(align, student, edits, videos, real, label=f"{arm}, seed {seed}")]
        judged = some("drawn", "teacher_steps") | {"seed": seed, "arm": arm, "calls": self.aligning.calls}
        judged |= {"evaluator": portable(self.evaluator)}
        made = task(judge, judged, *parts, label=f"{arm}, seed {seed}, judged")
        return [edits, videos, *parts, made] if arm == "student" else [made]

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in sorted(self.reads().values())}

    def claims(self) -> Iterator[Claim]:
        """Frames are edited and steady, and the digit moves as it did; each control shows what does it."""
        sentence = "frames show the digit in the ink that was asked for"
        yield Claim(sentence, "edit", "student", "at least", self.edited, scale="share")
        sentence = "flicker is at most so much of that of frames edited one by one"
        yield Claim(sentence, "flicker", "student", "at most", self.steady, "per_frame", "ratio")
        yield Claim("the digit moves as far as it did", "motion", "student", "at least", self.moving)
        yield Claim("the digit is where it was", "position", "student", "at most", self.near)
        sentence = "control: frames edited one by one in as few calls flicker more"
        yield Claim(sentence, "few/flicker", "per_frame", "at least", 1.1, "student", "ratio")
        sentence = "control: both adapters without alignment, in as few calls, flicker more"
        yield Claim(sentence, "few/flicker", "unaligned", "at least", 1.1, "student", "ratio")
        sentence = "control: without score distillation fewer frames are edited"
        yield Claim(sentence, "edit", "no_sds", "at most", -0.05, "student", "difference")
        sentence = "control: a still changes less from frame to frame"
        yield Claim(sentence, "change", "static", "at most", 0.0, "student", "difference")
        yield Claim("control: a still does not move", "motion", "static", "at most", 0.1)
        sentence = "asked: are frames less like the edited input without critics?"
        yield Claim(sentence, "error", "no_critics", "at least", 0.0, "student", "difference")
