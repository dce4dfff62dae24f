"""A study: can a text-to-image model find keypoints that nobody has labelled?

StableKeypoints (2312.00065): text tokens are optimised until each looks at one place of an image, which moves with it.
Controls: ``random``, tokens that are not optimised; ``random_unet``, optimised in a network of random weights;
``unspread``, without furthest-point selection; ``centre``, points that are always in the middle. The judge is geometry:
an image is turned and moved, and landmarks are where ink ends, found on pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.poses import PosingSettings
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import check_pipeline, read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.keypoints import KeypointSettings
from policies.rl.settings import Settings

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "random": {"steps": 0},
    "unspread": {"spread": False},
}  # of the learning, by arm


class Tints(Settings):
    """Colours that nothing is learned from, in which keypoints are looked for, too."""

    inks: tuple[str, ...] = Field(("red",), min_length=1, description="of digits.INKS")
    grounds: tuple[str, ...] = Field(("black",), min_length=1, description="of digits.GROUNDS")


class FindKeypoints(Study):
    """Learns tokens, and judges the keypoints that they find."""

    study: str = "keypoints"
    name: str = "keypoints"
    arms: tuple[str, ...] = ("learned", "unspread", "random_unet", "random", "centre")
    path: str = Field("models/digits-attention/pipeline", description="a directory of Stable Diffusion 1.x or 2.x")
    digits: tuple[int, ...] = Field(tuple(range(10)), min_length=1, description="of which digits images are")
    width: int = Field(32, ge=16, le=512, multiple_of=8, description="of an image, in pixels; it is 16 high")
    posing: PosingSettings = PosingSettings(rounds=4, shift=(9.0, 1.5), scale=(0.6, 0.8), slant=0.2, warp=0.3)
    other: Tints = Tints(inks=("red", "green", "blue", "purple"))
    learning: KeypointSettings = KeypointSettings()
    labelled: int = Field(120, ge=2, description="images whose landmarks a regression is learned from")
    judged: int = Field(120, ge=2, description="images of digits that nothing was learned from")
    near: float = Field(
        1.2, gt=0, description="claimed: a keypoint is so many pixels from where its image has taken it"
    )
    apart: float = Field(1.5, gt=0, description="claimed: keypoints of an image are so many pixels apart")
    share: float = Field(0.5, gt=0, description="claimed: so much of a mean shape's error is left")

    def preflight(self) -> None:
        """There is a pipeline, and digits to pose."""
        if wrong := [each for each in self.digits if each not in range(10)]:
            raise ValueError(f"digits: {wrong[0]} is no digit; give numbers from 0 to 9")
        self.posing.check("posing")
        self.posing.model_copy(update=self.other.model_dump()).check("other")
        check_model(self.path, "model_index.json", "path")
        check_pipeline(resolve_model(self.path), "StableDiffusionPipeline")
        network = read_json(Path(resolve_model(self.path)) / "unet" / "config.json")
        if not any("CrossAttn" in str(each) for each in network.get("up_block_types", ())):
            raise ValueError(f"path: the network of {self.path!r} has no cross-attention on the way up to look at")
        how = self.learning
        if not how.keypoints <= how.candidates <= how.tokens:
            raise ValueError(
                f"learning: keypoints ({how.keypoints}) are chosen of candidates ({how.candidates}), and these of "
                f"tokens ({how.tokens}): let them rise in this order"
            )

    def reads(self) -> Mapping[str, str]:
        """The pipeline."""
        return {"path": self.path}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """An arm's tokens, and what they find."""
        from pipelines.studies.keypoints import learn, measure

        common = self.model_dump(mode="json", include={"digits", "width", "posing"}) | {"seed": seed}
        how = common | {"learning": self.learning.model_copy(update=_CHANGES.get(arm)).model_dump(mode="json")}
        judged = how | self.model_dump(mode="json", include={"labelled", "judged", "other"})
        if arm == "centre":
            return [task(measure, judged, label=f"{arm}, seed {seed}")]
        model = {"path": portable(self.path), "read": self._digests, "random": arm == "random_unet"}
        learned = task(learn, how | model, label=f"tokens of {arm}, seed {seed}")
        return [learned, task(measure, judged, learned, label=f"{arm}, seed {seed}")]

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in self.reads().values()}

    def claims(self) -> Iterator[Claim]:
        """Keypoints move with the image, stand apart and tell of landmarks; of each control that is not so."""
        near, apart, share = self.near, self.apart, self.share
        yield Claim("keypoints go where the image goes", "equivariance", "learned", "at most", near)
        yield Claim("they are not all in one place", "spread", "learned", "at least", apart)
        yield Claim("landmarks follow from them", "of_mean_shape", "learned", "at most", share)
        for arm, what in (("random", "of random tokens"), ("centre", "in the middle")):
            yield Claim(f"control: points {what} do not go along", "equivariance", arm, "at least", near)
        yield Claim("control: points in the middle are in one place", "spread", "centre", "at most", apart)
        for arm, what in (("centre", "points in the middle"), ("random_unet", "those of a network of random weights")):
            yield Claim(f"control: {what} tell little of landmarks", "of_mean_shape", arm, "at least", share)
        sentence = "control: without furthest-point selection they are nearer to one another"
        yield Claim(sentence, "spread", "unspread", "at most", 0.0, "learned", "difference")
        sentence = "asked: in colours that nothing was learned from, does a trained network help?"
        yield Claim(sentence, "equivariance/other", "learned", "at most", 0.0, "random_unet", "difference")
        sentence = "asked: do they know more than where the middle of the ink is?"
        yield Claim(sentence, "of_placed_shape", "learned", "at most", 1.0)
