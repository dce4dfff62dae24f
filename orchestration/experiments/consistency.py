"""A study: can a diffusion model of pixels be distilled into one that draws in one or two calls? Is a teacher needed?

Consistency models (2303.01469): distilled from an EDM denoiser (2206.00364) that the study trains, and trained without
one (2310.14189). Beside them what they have to beat at equal calls: the denoiser under the consistency sampler, and
under its own ODE sampler. The judges, an evaluator and a network of features, take no part in the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from orchestration.experiments.study.images import ImageStudy
from pipelines.data.real_data import DataSettings, split_reference
from pipelines.storage.locations import check_model, portable, resolve_model
from pipelines.storage.model_files import read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.rl.settings import Settings

MADE = ("digits", "captioned_digits")  # the data whose digits the evaluator knows


class FitSettings(Settings):
    """One training."""

    learning_rate: float = Field(8e-3, gt=0, description="AdamW's at its peak, a third of the way")
    updates: int = Field(400, ge=1, description="optimiser updates")


class Consistency(ImageStudy):
    """Trains an EDM denoiser and two consistency models, and judges what they draw in few calls."""

    study: str = "consistency"
    name: str = "consistency"
    arms: tuple[str, ...] = ("distilled", "trained", "undistilled", "euler", "teacher")
    data: DataSettings = Field(DataSettings(source="digits", reference=600), description="square images, best labelled")
    channels: int = Field(16, ge=8, multiple_of=8, description="width of the UNet's finest level; doubles each level")
    levels: int = Field(2, ge=1, description="resolutions of the UNet; image sides must be multiples of 2^(levels-1)")
    batch: int = Field(64, ge=1, description="images of an update")
    teaching: FitSettings = Field(FitSettings(learning_rate=5e-3, updates=1500), description="of the denoiser")
    distilling: FitSettings = Field(FitSettings(learning_rate=3e-3, updates=400), description="from the denoiser")
    training: FitSettings = Field(FitSettings(learning_rate=4e-3, updates=900), description="without it, from scratch")
    teacher_steps: int = Field(17, ge=1, le=1000, description="Heun steps, of two calls each, of the teacher's images")
    points: int = Field(18, ge=3, le=1000, description="noise levels of the grid of the distilled")
    target_decay: float = Field(0.95, ge=0, lt=1, description="of the target's average over updates, in distillation")
    intervals: tuple[int, int] = Field((10, 40), description="of the grid of the trained, first and last; it doubles")
    calls: tuple[int, ...] = Field((1, 2), min_length=1, description="numbers of calls that are judged")
    evaluator: str | None = Field("models/digits/evaluator", description="says which digit it is; null: none")
    accuracy: float = Field(0.03, gt=0, lt=1, description="claimed: accuracy falls by no more than this")
    distance: float = Field(1.15, gt=1, description="claimed: FID is at most so many times the teacher's")
    recall: float = Field(0.05, gt=0, lt=1, description="claimed: recall falls by no more than this")
    margin: float = Field(1.15, gt=1, description="claimed: FID of the controls is at least so many times its own")

    def preflight(self) -> None:
        """The images can be drawn by such a network, and judged."""
        found = self._data
        height, width = found.images.shape[1:3]
        if height != width or height % 2 ** (self.levels - 1):
            wanted = f"squares with sides that are multiples of {2 ** (self.levels - 1)}"
            raise ValueError(f"data: images are {height}×{width}, and must be {wanted}: set data.image_size or levels")
        split_reference(found, self.data.reference)
        first, last = self.intervals
        if not 2 <= first <= last <= 10_000:
            raise ValueError(f"intervals: give two numbers from 2 to 10000, in order, not {first} and {last}")
        fewest = min(self.points, last + 1)
        if wrong := [each for each in self.calls if not 1 <= each < fewest or self.calls.count(each) > 1]:
            raise ValueError(f"calls: give each number once, from 1 to {fewest - 1}, not {wrong[0]}")
        if self.data.extractor == "classifier" and found.labels is None:
            raise ValueError("data.extractor: a classifier needs labels; name data.label_column, or self_supervised")
        if "data.extractor" in self.reads():
            from pipelines.measures.features import given_extractor

            given_extractor(self.reads()["data.extractor"], found.images[:1])
        if self.evaluator:
            if self.data.source not in MADE:
                raise ValueError(f"evaluator: it judges {' and '.join(MADE)}, not {self.data.source!r}: set it to null")
            check_model(self.evaluator, "config.json", "evaluator")
            if "classes" not in read_json(Path(resolve_model(self.evaluator)) / "config.json"):
                raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator")

    def reads(self) -> Mapping[str, str]:
        """Images and judges."""
        made = (*MADE, "classifier", "self_supervised", None)
        read = {f"data.{name}": getattr(self.data, name) for name in ("source", "extractor")}
        return {key: at for key, at in (read | {"evaluator": self.evaluator}).items() if at not in made}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The arm's network, and what it draws in few calls."""
        from pipelines.studies.consistency import distil, learn_teacher, measure, train_alone
        from pipelines.studies.distil import learn_features

        named = {name: getattr(self.data, name) for name in ("source", "extractor")}
        data = self.data.model_dump() | {name: at and portable(at) for name, at in named.items()}
        common = {"data": data, "read": self._digests, "seed": seed}
        eye = task(learn_features, {**common, "seed": 0}, label="features")
        fit = {**common, "channels": self.channels, "levels": self.levels, "batch": self.batch, "points": self.points}
        label = f"teacher, seed {seed}"
        made = task(learn_teacher, fit | self.teaching.model_dump(), label=label, divisible=True)
        if arm == "distilled":
            job = {**fit, "decay": self.target_decay} | self.distilling.model_dump()
            made = task(distil, job, made, label=f"distilled, seed {seed}")
        if arm == "trained":
            job = {**fit, "points": self.intervals[1] + 1, "intervals": list(self.intervals)}
            job |= self.training.model_dump()
            made = task(train_alone, job, label=f"trained, seed {seed}", divisible=True)
        judged = {**common, "sampler": {"euler": "euler", "teacher": "heun"}.get(arm, "consistency")}
        judged |= {"calls": list(self.calls), "steps": self.teacher_steps if arm == "teacher" else None}
        judged |= {"evaluator": portable(self.evaluator) if self.evaluator else None}
        shown = [] if arm in ("undistilled", "euler") else [made]
        return [*shown, task(measure, judged, eye, made, label=f"{arm}, seed {seed}, judged")]

    def claims(self) -> Iterator[Claim]:
        """It reaches the teacher in one or two calls; each control falls short of it; two calls are better than one."""
        for calls in (each for each in self.calls if each <= 2):
            many, fid = "one call" if calls == 1 else f"{calls} calls", f"fid/of_{calls}"
            sentence = f"{many} of the distilled are as near to real images as the teacher"
            yield Claim(sentence, fid, "distilled", "at most", self.distance, "teacher", "ratio")
            sentence = f"{many} of the distilled are as varied as the teacher"
            yield Claim(sentence, f"recall/of_{calls}", "distilled", "at least", -self.recall, "teacher", "difference")
            if self.evaluator:
                sentence = f"{many} of the distilled show what they are asked to as often as the teacher"
                right = f"evaluator/digit/of_{calls}"
                yield Claim(sentence, right, "distilled", "at least", -self.accuracy, "teacher", "difference")
            for arm, name in (
                ("euler", "Euler's method"),
                ("undistilled", "the denoiser as it came"),
            ):
                sentence = f"control: {many} of {name} are farther from real images than of the distilled"
                yield Claim(sentence, fid, arm, "at least", self.margin, "distilled", "ratio")
            sentence = f"control: {many} of training without a teacher are farther from real images"
            yield Claim(sentence, fid, "trained", "at least", 1.0, "distilled", "ratio")
        if {1, 2} <= set(self.calls):
            sentence = "two calls of the distilled are nearer to real images than one"
            yield Claim(sentence, "second_call/fid", "distilled", "at most", 1.0, scale="logarithm")
