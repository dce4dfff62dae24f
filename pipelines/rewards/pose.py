"""How near keypoints of an image are to the places where its prompt wants them: a reward of geometry alone."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, TypeAdapter

from pipelines.rewards import Reward, RewardFunction
from pipelines.storage.locations import find, resolve_model
from pipelines.storage.model_files import check_pipeline
from pipelines.storage.yaml_text import read_yaml

_Place = tuple[float, float]


class PoseOptions(Reward):
    """Minus the distance of keypoints from where the prompt's pose has them, a mean in pixels."""

    names = ("keypoint_pose",)
    models: ClassVar = {"tokens": "", "poses": ""}
    tokens: str = Field(description="safetensors file of tokens that find keypoints, a product of the study keypoints")
    poses: str = Field(
        description="YAML file of each prompt's pose: prompt → list of the places [x, y] of its keypoints, in pixels, "
        "in the order of the tokens; null where one may be anywhere"
    )

    def pose(self, prompt: str) -> np.ndarray:
        """The places (keypoints, 2) of a prompt, nan where any will do. Raises ValueError if there are none."""
        if prompt not in self._poses:
            raise ValueError(f"{self.poses} holds no pose for the prompt {prompt!r}")
        places = [each or (np.nan, np.nan) for each in self._poses[prompt]]
        if not np.isfinite(places).any():
            raise ValueError(f"{self.poses}: the pose of {prompt!r} has no place")
        return np.array(places)

    def check(self, prompts: Sequence[str]) -> None:
        """The file holds a pose for each prompt, all of as many keypoints."""
        for prompt in prompts:
            if self.pose(prompt).shape != self.pose(prompts[0]).shape:
                raise ValueError(f"{self.poses}: {prompt!r} has not as many keypoints as {prompts[0]!r}")

    @cached_property
    def _poses(self) -> dict[str, tuple[_Place | None, ...]]:
        try:
            held = read_yaml(find(self.poses) or Path(self.poses))
            return TypeAdapter(dict[str, tuple[_Place | None, ...]]).validate_python(held)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self.poses} is not a mapping of prompts to lists of places [x, y]: {why}") from error

    def load(self, name: str, device: str) -> RewardFunction:
        """What finds the keypoints; on the device "meta", where a run is tried out, what finds them all in one place,
        if the tokens and their pipeline are there."""
        from pipelines.keypoints import Found, Keypoints

        found = Found.read(resolve_model(self.tokens))
        count = len(found.chosen)
        check_pipeline(resolve_model(found.path), "StableDiffusionPipeline")
        keypoints = Keypoints(self.tokens, device) if device != "meta" else None

        def score(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
            wanted = np.stack([self.pose(prompt) for prompt in prompts])
            if wanted.shape[1] != count:
                raise ValueError(
                    f"{self.poses}: {wanted.shape[1]} places a prompt, for {count} keypoints of the tokens"
                )
            places = keypoints(images) if keypoints else np.zeros((len(images), count, 2))
            off: np.ndarray = np.linalg.norm(places - wanted, axis=2)
            return -np.nanmean(off, axis=1)

        return score
