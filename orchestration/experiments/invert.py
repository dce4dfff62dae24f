"""A study: what are rewards pleased with? Images that gradients find from noise, beside real ones and a judge.

Inversion (2403.02580) of two rewards: ``captioner``, the sentence cosine of prompt and caption, by way of the
captioner's log-probability of the prompt, and ``clip``, the cosine of a CLIPModel's embeddings. Arms: ``plain``;
``views``, the mean over random views; ``latents``, through the decoder of a pipeline. Controls: ``smooth``, what is
done in ``views`` but for the views; ``others``, ``plain`` of which every image is asked about as if it had been found
for another prompt. The judge, an evaluator, takes no part in the search.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.random import default_rng
from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.digits import SLOTS, parse
from pipelines.data.prompts import read_prompts
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings


class Invert(Study):
    """Inverts rewards, and judges what was found."""

    study: str = "invert"
    name: str = "invert"
    arms: tuple[str, ...] = ("plain", "views", "latents", "smooth", "others")
    prompts: str = Field("configs/prompts/digits.txt", description="a file: what is asked for")
    images: int = Field(60, ge=4, description="images, each of another prompt, drawn from the file at each seed")
    captioner: str | None = Field("models/digits/captioner", description="a BLIP; null: it is not inverted")
    clip: str | None = Field(
        "trained", description="a CLIPModel: directory or hub name; trained: a small one, on the digits; null: none"
    )
    clip_steps: int = Field(2500, ge=1, description="steps of the small one's training")
    path: str = Field("models/digits/pipeline", description="the pipeline whose latents are searched in an arm")
    evaluator: str = Field("models/digits/evaluator", description="the judge")
    inverting: InvertingSettings = Field(InvertingSettings(views=8), description="views: of the arm that has any")
    smooth: dict[str, float] = Field(
        {"captioner": 0.1, "clip": 0.01}, description="inverting.variation of each reward in the arms views and smooth"
    )
    blind: float = Field(0.2, gt=0, lt=1, description="claimed: without views the judge sees at most this share")
    seen: float = Field(0.8, gt=0, lt=1, description="claimed: with views it sees at least this share")

    def preflight(self) -> None:
        """There is a reward to invert, and a judge that knows what is asked for."""
        if not self._rewards():
            raise ValueError("captioner and clip are null: name one at least to invert")
        if "views" in self.arms and not self.inverting.views:
            raise ValueError("inverting.views is 0, and the arm views has some: give a number, or leave it out of arms")
        check_pipeline(self.path, "StableDiffusionPipeline")
        check_model(self.evaluator, "config.json", "evaluator")
        if "classes" not in read_json(Path(resolve_model(self.evaluator)) / "config.json"):
            raise ValueError(f"evaluator: {self.evaluator!r} is no directory of an evaluator")
        for key in self.reads().keys() & {"captioner", "clip"}:
            check_model(self.reads()[key], "config.json", key)
        texts = read_prompts(self.prompts)[0]
        if len(texts) < self.images:
            raise ValueError(f"images: {self.prompts!r} holds {len(texts)} prompts, fewer than {self.images}")
        if wrong := [text for text in texts if not all(parse(text)[slot] for slot in SLOTS)]:
            raise ValueError(f"prompts: {wrong[0]!r} names no {' or no '.join(SLOTS)}, which the evaluator judges by")

    def reads(self) -> Mapping[str, str]:
        """Models and prompts."""
        read = {key: getattr(self, key) for key in ("prompts", "captioner", "clip", "path", "evaluator")}
        return {key: at for key, at in read.items() if at not in (None, "trained")}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """A search of each reward."""
        from pipelines.default_models.clip import learn_clip
        from pipelines.studies.invert import audit_reward

        texts, order = read_prompts(self.prompts)[0], default_rng(derive_seed(seed, "asked"))
        common = {
            "seed": seed,
            "prompts": [texts[number] for number in order.permutation(len(texts))[: self.images]],
            "evaluator": portable(self.evaluator),
            "path": portable(self.path) if arm == "latents" else None,
            "asked_as": "others" if arm == "others" else "own",
            "read": self._digests,
        }
        found = []
        for key, reward in self._rewards().items():
            label, made = f"{key}, {arm}, seed {seed}", list[Task]()
            if key == "clip" and self.clip == "trained":  # one for each seed: what is found is not one network's quirk
                made = [task(learn_clip, {"seed": seed, "steps": self.clip_steps}, label=f"CLIP, seed {seed}")]
            settings = self.inverting.model_dump() | ({} if arm == "views" else {"views": 0})
            settings |= {"variation": self.smooth.get(key, 0.0)} if arm in ("views", "smooth") else {}
            job = {**common, "key": key, **reward, "settings": settings}
            found += [*made, task(audit_reward, job, *made, label=label)]
        return found

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for key, at in sorted(self.reads().items()) if key != "prompts"}

    def _rewards(self) -> dict[str, dict[str, Any]]:
        """By key: function, options and captioner."""
        captioner, clip = (at and portable(at) for at in (self.captioner, self.clip))
        options = {"model": clip} if clip != "trained" else {}
        found = {"captioner": {"reward": "sentence_cosine", "options": {}, "captioner": captioner}} if captioner else {}
        return found | ({"clip": {"reward": "clip_score", "options": options, "captioner": None}} if clip else {})

    def claims(self) -> Iterator[Claim]:
        """Of each reward and arm."""
        for key in self._rewards():
            yield from self._claims(key)
        if self.clip == "trained":
            sentence = "the small CLIP finds the caption of a digit that is new to it among all captions"
            yield Claim(sentence, "zero_shot/full", self.arms[0], "at least", 0.9, scale="share")

    def _claims(self, key: str) -> Iterator[Claim]:
        sees, over = f"evaluator/{key}/full", f"{key}/over"
        for arm, how in (("plain", "without views"), ("latents", "through the decoder")):
            yield Claim(
                f"{key}, {how}: what was found scores above real images of the prompt", over, arm, "at least", 0
            )
            yield Claim(f"{key}, {how}: the judge does not see what was asked for", sees, arm, "at most", self.blind)
        yield Claim(f"{key}, with views: the judge sees what was asked for", sees, "views", "at least", self.seen)
        sentence = f"control: {key}, as smooth without views: the judge sees it less often"
        yield Claim(sentence, sees, "smooth", "at most", -0.3, "views", "difference")
        sentence = f"control: {key}, asked about another prompt, scores below real images of that"
        yield Claim(sentence, over, "others", "at most", 0)
