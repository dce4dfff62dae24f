"""Captioners say what is in an image."""

import numpy as np

from actors.worker import Worker
from pipelines.settings import CaptionerSettings


class CaptionerActor(Worker):
    """The actor: a BLIP captioning model."""

    def __init__(self, settings: CaptionerSettings, half: bool, frames: int, device: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.captioner import Captioner

        self.captioner = Captioner(settings, device, half, frames)

    def caption(self, images: np.ndarray) -> list[str]:
        """Captions of images (batch, height, width, 3) uint8."""
        return self.captioner.caption(images)
