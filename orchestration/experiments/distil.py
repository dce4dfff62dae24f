"""A study: can a text-to-image model be distilled into one that draws in one or two calls, and what does that cost?

Latent consistency distillation (2310.04378), guidance folded in, beside what it has to beat at equal calls: the network
as it came under DDIM and under ``LCMScheduler``, and consistency training (2310.14189), the same loss without a
teacher. The judges, an evaluator and a network of features, take no part in the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from orchestration.experiments.study.images import ImageStudy
from pipelines.data.real_data import DataSettings, split_reference
from pipelines.denoisers import inspect
from pipelines.storage.locations import check_model, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.consistency import ORIGIN_STEPS, ConsistencySettings

LEARNED = ("distilled", "trained")


class Distil(ImageStudy):
    """Distils a pipeline, and judges what it draws in few calls."""

    study: str = "distil"
    name: str = "distil"
    arms: tuple[str, ...] = (*LEARNED, "undistilled", "ddim", "teacher")
    path: str = Field("models/digits/pipeline", description="a directory of Stable Diffusion 1.x or 2.x")
    data: DataSettings = Field(
        DataSettings(source="captioned_digits", reference=900), description="captions to draw for, and real images"
    )
    guidance_scale: float = Field(2.0, ge=1, description="of the teacher, folded into the student; and of DDIM")
    teacher_steps: int = Field(20, ge=1, le=1000, description="DDIM steps of the teacher's images")
    latents: int = Field(1800, ge=1, description="x_0 to learn from, drawn by the teacher")
    distilling: ConsistencySettings = ConsistencySettings()
    calls: tuple[int, ...] = Field((1, 2, 4), min_length=1, description="numbers of calls that are judged")
    evaluator: str | None = Field("models/digits/evaluator", description="says what an image shows; null: none")
    accuracy: float = Field(0.03, gt=0, lt=1, description="claimed: accuracy falls by no more than this")
    distance: float = Field(1.15, gt=1, description="claimed: FID is at most so many times the teacher's")
    margin: float = Field(
        1.15, gt=1, description="claimed: FID of DDIM and of the undistilled is at least so many times its own"
    )

    def preflight(self) -> None:
        """The pipeline is one that can be distilled, the data have captions, and the evaluator is one."""
        check_pipeline(self.path, "StableDiffusionPipeline")
        files = inspect(Path(resolve_model(self.path)))
        if files.scheduler.num_train_timesteps < ORIGIN_STEPS:
            raise ValueError(f"path: the scheduler of {self.path!r} has fewer than {ORIGIN_STEPS} timesteps")
        if wrong := [each for each in self.calls if not 1 <= each <= ORIGIN_STEPS or self.calls.count(each) > 1]:
            raise ValueError(f"calls: give each number once, from 1 to {ORIGIN_STEPS}, not {wrong[0]}")
        found, size = self._data, files.image_size
        if found.captions is None:
            raise ValueError(f"data.source: {self.data.source!r} has no captions to draw for; name data.caption_column")
        if found.images.shape[1:] != (*size, 3):
            given = "×".join(map(str, found.images.shape[1:]))
            raise ValueError(f"data: images are {given}, and the pipeline draws {size[0]}×{size[1]}×3: set image_size")
        split_reference(found, self.data.reference)
        if self.data.extractor == "classifier" and found.labels is None:
            raise ValueError("data.extractor: a classifier needs labels; name data.label_column, or self_supervised")
        if "data.extractor" in self.reads():
            from pipelines.measures.features import given_extractor

            given_extractor(self.reads()["data.extractor"], found.images[:1])
        if self.evaluator:
            check_model(self.evaluator, "config.json", "evaluator")
            if "classes" not in read_json(Path(resolve_model(self.evaluator)) / "config.json"):
                raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator")

    def reads(self) -> Mapping[str, str]:
        """Pipeline, images and judge."""
        made = ("digits", "captioned_digits", "classifier", "self_supervised", None)
        read = {"path": self.path, "evaluator": self.evaluator}
        read |= {f"data.{name}": getattr(self.data, name) for name in ("source", "extractor")}
        return {key: at for key, at in read.items() if at not in made}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The distilled pipeline, if the arm has one, and what is drawn in few calls."""
        from pipelines.studies.distil import distil, draw_latents, learn_features, measure

        named = {name: getattr(self.data, name) for name in ("source", "extractor")}
        data = self.data.model_dump() | {name: at and portable(at) for name, at in named.items()}
        common = {"data": data, "path": portable(self.path), "read": self._digests, "seed": seed}
        guided = {**common, "guidance_scale": self.guidance_scale}
        eye = task(learn_features, {**common, "seed": 0, "path": None}, label="features")
        made = []
        if arm in LEARNED:
            drawn = {**guided, "latents": self.latents, "steps": self.teacher_steps}
            latents = task(draw_latents, drawn, label=f"latents, seed {seed}")
            job = guided if arm == "distilled" else {**guided, "guidance_scale": None}
            job = {**job, "settings": self.distilling.model_dump()}
            made = [task(distil, job, latents, label=f"{arm}, seed {seed}", divisible=True)]
        judged = guided if arm in ("ddim", "teacher") else {**guided, "guidance_scale": 1.0}
        judged |= {"sampler": "ddim" if arm in ("ddim", "teacher") else "lcm", "calls": list(self.calls)}
        judged |= {"steps": self.teacher_steps if arm == "teacher" else None}
        judged |= {"evaluator": portable(self.evaluator) if self.evaluator else None}
        return [*made, task(measure, judged, eye, *made, label=f"{arm}, seed {seed}, judged")]

    def claims(self) -> Iterator[Claim]:
        """It reaches the teacher in one or two calls; each control falls short of it; two calls are better than one."""
        for calls in (each for each in self.calls if each <= 2):
            many = "one call" if calls == 1 else f"{calls} calls"
            right, fid = f"evaluator/full/of_{calls}", f"fid/of_{calls}"
            if self.evaluator:
                sentence = f"{many} of the distilled show what they are asked to as often as the teacher"
                yield Claim(sentence, right, "distilled", "at least", -self.accuracy, "teacher", "difference")
            sentence = f"{many} of the distilled are as near to real images as the teacher"
            yield Claim(sentence, fid, "distilled", "at most", self.distance, "teacher", "ratio")
            for arm, name in (("ddim", "DDIM"), ("undistilled", "the network as it came under LCMScheduler")):
                sentence = f"control: {many} of {name} are farther from real images than of the distilled"
                yield Claim(sentence, fid, arm, "at least", self.margin, "distilled", "ratio")
                if self.evaluator:
                    sentence = f"control: {many} of {name} show what they are asked to less often than of the distilled"
                    yield Claim(sentence, right, arm, "at most", -self.accuracy, "distilled", "difference")
            sentence = f"control: {many} of consistency training are farther from real images than of the distilled"
            yield Claim(sentence, fid, "trained", "at least", 1.0, "distilled", "ratio")
            if self.evaluator:
                sentence = f"control: {many} of consistency training show what they are asked to less often"
                yield Claim(sentence, right, "trained", "at most", 0.0, "distilled", "difference")
        if {1, 2} <= set(self.calls):
            sentence = "two calls of the distilled are nearer to real images than one"
            yield Claim(sentence, "second_call/fid", "distilled", "at most", 1.0, scale="logarithm")
