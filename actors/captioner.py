"""Captioners say what is in an image."""

from collections.abc import Sequence

import numpy as np

from actors.placement import Seats
from actors.pool import Pool
from actors.work import Chunk
from actors.worker import Worker
from pipelines.settings import CaptionerSettings


class CaptionerActor(Worker):
    """The actor: a BLIP captioning model."""

    def __init__(self, settings: CaptionerSettings, device: str, threads: int) -> None:
        super().__init__(threads)
        from pipelines.captioner import Captioner

        self.captioner = Captioner(settings, device)

    def caption(self, images: np.ndarray) -> list[str]:
        """Captions of images (batch, height, width, 3) uint8."""
        return self.captioner.caption(images)


class Captioners(Pool):
    """All captioners."""

    def __init__(self, seats: Seats, settings: CaptionerSettings) -> None:
        super().__init__(seats, CaptionerActor, settings, seats.role.device, seats.role.threads)

    def caption(self, chunks: Sequence[Chunk]) -> None:
        """Caption every chunk as soon as it is drawn."""
        for chunk in chunks:
            chunk.captions = self.submit("caption", chunk.images)
